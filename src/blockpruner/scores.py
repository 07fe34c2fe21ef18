"""The scores of moves by one or more criteria as data, and how far two rankings agree."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Move
from blockpruner.plan import BlockText, ModelIdentity, MoveText
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
        """Spearman's rank correlation between every two criteria."""
        lists = {one.criterion: list(one.scores.values()) for one in self.criteria}
        return {a: {b: spearman(lists[a], lists[b]) for b in lists} for a in lists}


def least_first(scores: Scores) -> list[Move]:
    """Moves by rising score, the first of equals first; those without a score last."""
    known = {move: score.value for move, score in scores.items() if score is not None}
    return [*sorted(known, key=known.__getitem__), *(move for move in scores if move not in known)]


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all, from 1; equals share the mean of their places."""
    order = sorted(values)
    places: Mapping[float, list[int]] = {}
    for place, value in enumerate(order, 1):
        places.setdefault(value, []).append(place)
    return [statistics.fmean(places[value]) for value in values]


def spearman(first: Sequence[Estimate | None], second: Sequence[Estimate | None]) -> float | None:
    """Spearman's rank correlation over the moves that both scored; None for fewer than two, or where all are equal."""
    pairs = [(a.value, b.value) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    sides = [ranks(side) for side in zip(*pairs, strict=True)]
    if len(pairs) < 2 or any(len(set(side)) < 2 for side in sides):
        return None
    return statistics.correlation(*sides)
