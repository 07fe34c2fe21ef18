"""Two models on the same items: is one better, by how much, and how sure is that?

Only the items that one gets right and the other wrong tell right from wrong answers apart, so that a paired test sees
differences which two separate standard errors hide.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.special import bdtr

from blockpruner.artifacts import Record

DRAWS = 9999  # of a permutation or bootstrap: the smallest p-value is 1 / (DRAWS + 1)
LEVEL = 0.95  # of intervals
_CHUNK = 2_000_000  # numbers drawn at once


class Comparison(Record):
    """A contestant minus the reference on the same n items, in the unit of their values; low, high: 95 % interval.

    p: two-sided, of the null hypothesis that neither is better; gained, lost: items on which the contestant is better,
    worse; test: see `compare`; adjusted: p after Holm's correction over the tasks compared together. higher_is_better:
    of the values; None where nobody says, gained and lost are then the items on which they are higher, lower.
    """

    n: int
    difference: float
    stderr: float | None
    low: float
    high: float
    p: float
    gained: int
    lost: int
    test: Literal["mcnemar", "sign flips"]
    adjusted: float | None = None
    higher_is_better: bool | None = True

    @property
    def word(self) -> Literal["better", "worse", "different", "the same"]:
        """What the difference makes of the contestant, chance or not."""
        if not self.difference:
            return "the same"
        if self.higher_is_better is None:
            return "different"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


def compare(
    reference: Sequence[float], contestant: Sequence[float], seed: int = 0, *, higher_is_better: bool | None = True
) -> Comparison:
    """`contestant` beside `reference`, both with one value per item in the same order, at least one item.

    Values that are all 0 or 1: McNemar's test, exact: under the null hypothesis each item on which the two differ falls
    to either side like a coin. Interval: Wald's with one item added to either side (Bonett and Price 2012).
    Other values: the mean difference against those with randomly flipped signs, exact in level for differences that
    are symmetric under the null hypothesis; interval: percentiles of the paired bootstrap over items.
    """
    if len(reference) != len(contestant) or not len(reference):
        raise ValueError(f"{len(reference)} and {len(contestant)} values are no pairs")
    gaps = np.asarray(contestant, dtype=float) - np.asarray(reference, dtype=float)
    n, higher, lower = len(gaps), int((gaps > 0).sum()), int((gaps < 0).sum())
    difference = math.fsum(gaps) / n
    stderr = float(gaps.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    binary = {*map(float, reference), *map(float, contestant)} <= {0.0, 1.0}
    p = mcnemar(higher, lower) if binary else _sign_flips(gaps, seed)
    low, high = _adjusted_wald(higher, lower, n) if binary else _percentiles(gaps, seed)
    gained, lost = (lower, higher) if higher_is_better is False else (higher, lower)
    return Comparison(
        n=n,
        difference=difference,
        stderr=stderr,
        low=low,
        high=high,
        p=p,
        gained=gained,
        lost=lost,
        test="mcnemar" if binary else "sign flips",
        higher_is_better=higher_is_better,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value of `gained` heads among `gained + lost` tosses of a fair coin; 1 where there are none."""
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: p_(i) times the number of hypotheses not yet decided, made monotone, at most 1.

    Rejecting those at or below a level keeps the chance of any false rejection at or below it (Holm 1979).
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in values}


def together(found: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with their p-values adjusted for each other."""
    adjusted = holm({name: one.p for name, one in found.items()})
    return {name: one.model_copy(update={"adjusted": adjusted[name]}) for name, one in found.items()}


def _adjusted_wald(higher: int, lower: int, n: int) -> tuple[float, float]:
    up, down = (higher + 1) / (n + 2), (lower + 1) / (n + 2)
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def _sign_flips(gaps: "np.ndarray[tuple[int], np.dtype[np.float64]]", seed: int) -> float:
    """(1 + draws at least as far from 0 as what was seen) / (1 + draws)."""
    draw, seen = np.random.default_rng([seed, 1]), abs(gaps.sum()) * (1 - 1e-12)
    as_far = sum(
        int((abs(draw.choice((-1.0, 1.0), size=(rows, len(gaps))) @ gaps) >= seen).sum()) for rows in _rows(len(gaps))
    )
    return (1 + as_far) / (1 + DRAWS)


def _percentiles(gaps: "np.ndarray[tuple[int], np.dtype[np.float64]]", seed: int) -> tuple[float, float]:
    draw = np.random.default_rng([seed, 2])
    means = [gaps[draw.integers(len(gaps), size=(rows, len(gaps)))].mean(axis=1) for rows in _rows(len(gaps))]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _rows(n: int) -> list[int]:
    """DRAWS cut into as many at a time as fit."""
    most = max(1, _CHUNK // n)
    return [min(most, DRAWS - begun) for begun in range(0, DRAWS, most)]
