"""The scores of moves by one or more criteria as data."""

from typing import Any, ClassVar, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Move
from blockpruner.plan import BlockText, ModelIdentity, MoveText
from blockpruner.ranking import spearman
from blockpruner.searching import Scores


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


def least_first(scores: Scores) -> list[Move]:
    """Moves by rising score, the first of equals first; those without a score last."""
    known = {move: score.value for move, score in scores.items() if score is not None}
    return [*sorted(known, key=known.__getitem__), *(move for move in scores if move not in known)]


def _agreement(first: CriterionScores, second: CriterionScores) -> float | None:
    both = ((first.scores[move], second.scores.get(move)) for move in first.scores)
    pairs = [(a.value, b.value) for a, b in both if a is not None and b is not None]
    return spearman(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
