"""The scores of moves by one or more criteria as data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Mask, Move, parse_mask
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.importance.ranking import spearman
from blockpruner.plan import BlockText, ModelIdentity, MoveText
from blockpruner.searching.contract import Scores


class CriterionScores(Record):
    """What one criterion says. criterion: with all its options; higher score = keep; null: not a finite number.

    least_first: the moves in the order in which a one-shot plan would take them; equals in the order they were given,
    those without a score last; seconds are not among it, so that the same scores are the same bytes.
    """

    criterion: str
    scores: dict[MoveText, Estimate | None]
    least_first: tuple[MoveText, ...]

    @classmethod
    def of(cls, criterion: str, scores: Scores) -> Self:
        return cls(
            criterion=criterion,
            scores={str(move): score for move, score in scores.items()},
            least_first=tuple(map(str, least_first(scores))),
        )


class ScoreTable(Artifact):
    """Scores of the same moves on the same data. removed: what was gone already; the rest as in a plan."""

    FORMAT: ClassVar[str] = "blockpruner.scores"
    VERSION: ClassVar[int] = 1

    model: ModelIdentity | None = None
    calibration: dict[str, str | int | float | bool | None] | None = None
    question: str
    objective: str
    moves: str
    protected: tuple[str, ...] = ()
    removed: tuple[BlockText, ...] = ()
    seed: int
    dtype: str
    criteria: tuple[CriterionScores, ...] = Field(min_length=1)

    @classmethod
    def made(cls, **fields: Any) -> Self:
        return cls(format=cls.FORMAT, version=cls.VERSION, **fields)

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Spearman's rank correlation between every two criteria over the moves that both scored, if two or more."""
        return {a.criterion: {b.criterion: _agreement(a, b) for b in self.criteria} for a in self.criteria}


@dataclass(frozen=True)
class Recorded:
    """Scores of an earlier run as a criterion, so that many plans can be made of them: nothing is measured again.

    criterion: which one of the file; digest: of its scores; known, gone: these, and what was gone then. InputError
    where that is not what is gone now (a search that ranks again needs a criterion), or a move has no score in it.
    """

    criterion: str
    digest: str
    known: CriterionScores = field(repr=False)
    gone: Mask = field(repr=False)

    title: ClassVar[str] = "Scores from a file"
    source: ClassVar[str] = "an earlier run"
    needs: ClassVar[Needs] = "nothing"
    passes: ClassVar[str] = "none"
    moves: ClassVar[str] = "those in the file"

    @classmethod
    def read(cls, path: Path, model: ModelIdentity | None = None, name: str | None = None) -> Self:
        """The scores in `path` by the criterion `name`, with its options or without; None if there is but one.

        InputError if that says of no criterion, or of several, or the scores are of another model.
        """
        table = ScoreTable.load(path)
        found = [one for one in table.criteria if name in (None, one.criterion, one.criterion.partition(":")[0])]
        if len(found) != 1:
            names = ", ".join(one.criterion for one in table.criteria)
            which = "several criteria" if name is None else f"{'no' if not found else 'several'} {name!r}"
            raise InputError(
                f"{path} has scores of {which}: {names}", fix=f"name one of them: {path}:{table.criteria[0].criterion}"
            )
        if table.model is not None and model is not None and table.model.fingerprint != model.fingerprint:
            raise InputError(f"{path} has scores of {table.model.name}, another model", fix="score this model")
        (only,) = found
        digest = hashlib.sha256(only.model_dump_json().encode()).hexdigest()[:16]
        return cls(only.criterion, digest, only, parse_mask("+".join(table.removed) or "dense"))

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        self.cost(lab, moves)
        return {move: self.known.scores[str(move)] for move in moves}

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        missing = [str(move) for move in moves if str(move) not in self.known.scores]
        if missing or lab.mask != self.gone:
            reason = f"has no score of {missing[0]}" if missing else "is of a model from which other blocks are gone"
            raise InputError(
                f"the file of scores {reason}", fix="use --search one-shot or knapsack, and the same moves"
            )
        return 0.0


def least_first(scores: Scores) -> list[Move]:
    """Moves by rising score, the first of equals first; those without a score last."""
    known = {move: score.value for move, score in scores.items() if score is not None}
    return [*sorted(known, key=known.__getitem__), *(move for move in scores if move not in known)]


def _agreement(first: CriterionScores, second: CriterionScores) -> float | None:
    both = ((first.scores[move], second.scores.get(move)) for move in first.scores)
    pairs = [(a.value, b.value) for a, b in both if a is not None and b is not None]
    return spearman(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
