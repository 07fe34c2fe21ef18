"""Ranks of numbers, and how alike two rankings are."""

import statistics
from collections.abc import Sequence


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all, the lowest at 1; equals share the mean of their places. No NaN."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, 1)))}
    last = {value: place for place, value in enumerate(ordered, 1)}
    return [(first[value] + last[value]) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The rank correlation of two lists without NaN, from -1 to 1, ties at the mean of their ranks.

    1 for equal rankings, those without any difference too; else 0 where one of them has no differences.
    """
    places = ranks(first), ranks(second)
    if places[0] == places[1]:
        return 1.0
    if min(len(set(side)) for side in places) == 1:
        return 0.0
    return statistics.correlation(*places)
