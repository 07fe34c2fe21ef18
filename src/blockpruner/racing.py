"""Races: the best of many masks, found by looking longer only at those that are still in question.

What is to be found out is the mean over the pieces of fixed windows, a finite population: a mask that was evaluated on
all pieces is known exactly. All candidates are evaluated on the same few pieces first. Whatever is then shown to be
worse than the leader leaves the race, the rest is evaluated on as many pieces again, and so on.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import correlation, covariance, fmean, variance
from typing import Any

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask
from blockpruner.permutations import shuffled
from blockpruner.searching import Pieces, Problem, Values

FEWEST = 8  # pieces that are seen before anything leaves


@dataclass(frozen=True)
class Difference:
    """An estimate of the difference of two means over all pieces. value, stderr: in the unit of the values.

    freedom: degrees of freedom of the standard error; infinite where the difference is known.
    """

    value: float
    stderr: float
    freedom: float

    def margin(self, alpha: float) -> float:
        """How far the truth may be on one side of the value, but for a share `alpha` of all cases (Student's t)."""
        if not self.stderr:
            return 0.0
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, 1 - alpha)) * self.stderr


def difference(
    one: Values, other: Values, total: int, before: Sequence[tuple[Values, Values]] = (), alpha: float = 0.05
) -> Difference:
    """The mean of `one` less that of `other` over all `total` pieces, from the first of them that both were seen on.

    The pieces are drawn without replacement, so the variance has the factor 1 - n / total. before: what the same two
    were at earlier steps, on more pieces: if d is the difference now, on n pieces, and e an earlier one, on m > n,
    then mean_n(d) + b (mean_m(e) - mean_n(e)) with the least squares slope b has the variance
    var(d) (1/m - 1/total) + var(d - b e) (1/n - 1/m), as in two-phase sampling. Of all these the one with the least
    margin at `alpha` is taken.
    """
    size = min(len(one), len(other))
    now = [a - b for a, b in zip(one[:size], other[:size], strict=True)]
    spread = variance(now) if size > 1 else 0.0
    found = [_seen(fmean(now), spread / size * (1 - size / total), size - 1)]
    for first, second in before:
        more = min(len(first), len(second))
        if more <= size or size < 4:
            continue
        then = [a - b for a, b in zip(first[:more], second[:more], strict=True)]
        if variance(then[:size]) == 0:
            continue
        slope = covariance(then[:size], now) / variance(then[:size])
        left = spread * (1 - correlation(then[:size], now) ** 2) * (size - 1) / (size - 2) if spread else 0.0
        value = fmean(now) + slope * (fmean(then) - fmean(then[:size]))
        found.append(_seen(value, spread * (1 / more - 1 / total) + left * (1 / size - 1 / more), size - 2))
    return min(found, key=lambda each: each.margin(alpha))


def _seen(value: float, squared: float, freedom: float) -> Difference:
    return Difference(value, math.sqrt(max(0.0, squared)), freedom if squared > 0 else math.inf)


@dataclass(frozen=True)
class Outcome:
    """What a race ended in.

    kept: the masks that won, best first; ties: those that were not shown to be worse than the last of them, only not
    to be better by more than epsilon; values: of every mask, on the pieces it was seen on, in one order; estimates: of
    the mean over all pieces, None where a value is not finite.
    """

    kept: tuple[Mask, ...]
    ties: tuple[Mask, ...]
    values: Mapping[Mask, Values]
    estimates: Mapping[Mask, Estimate | None]


Earlier = Sequence[Mapping[Mask, Values]]
Running = Generator[Pieces, Any, Outcome]


@dataclass(frozen=True)
class Race:
    """With probability at least 1 - delta, none that was left out is better than the kept by more than epsilon.

    A mask leaves when it is shown to be worse than the last of those to be kept, and the race ends when none of the
    rest is shown to be better than that by epsilon, or all were seen on everything, and so are known. delta is spread
    evenly over masks and rounds (union bound); each comparison has a t interval, which is exact for normal means:
    benchmarks/racing_simulation.py counts errors on recorded losses.
    """

    epsilon: float = 0.003
    delta: float = 0.05
    seed: int = 0

    def run(self, problem: Problem, masks: Sequence[Mask], keep: int = 1, before: Earlier = ()) -> Running:
        """Yield `Pieces`, to be sent values, and return what came of it.

        before: what the same moves led to at earlier steps, the last step first, by the masks of now.
        Cost: all masks on FEWEST pieces or a few more, and ever fewer masks on twice as many each time.
        """
        order = shuffled(problem.batches, self.seed, "race")
        stops, total = _rounds([problem.sizes[batch] for batch in order]), sum(problem.sizes)
        alpha = self.delta / max(1, (len(masks) - keep) * len(stops))
        held: dict[Mask, Values] = dict.fromkeys(masks, ())
        running, apart = tuple(masks), dict[Mask, Difference]()
        for start, stop in pairwise([0, *stops]):
            found = yield Pieces(running, order[start:stop])
            held |= {mask: held[mask] + found[mask] for mask in running}
            finite = [mask for mask in running if all(map(math.isfinite, held[mask]))]
            ranked = sorted(finite, key=lambda mask: fmean(held[mask]))
            kept, rest = ranked[:keep], ranked[keep:]
            apart = {mask: _apart(mask, kept[-1], held, total, before, alpha) for mask in rest}
            below = {mask: each.value - each.margin(alpha) for mask, each in apart.items()}
            running = (*kept, *(mask for mask in rest if below[mask] <= 0))
            if all(low > -self.epsilon for low in below.values()):
                break
        kept = running[:keep]
        ties = running[keep:] if kept and len(held[kept[0]]) < total else ()
        last = kept[-1] if kept else None
        estimates = {mask: _estimate(mask, last, held, problem, before) for mask in masks}
        return Outcome(kept, ties, held, estimates)


def _rounds(sizes: Sequence[int]) -> list[int]:
    """After which micro-batches to look: once FEWEST pieces are seen, whenever it is twice as many, and at the end."""
    stops, seen, goal = list[int](), 0, FEWEST
    for count, size in enumerate(sizes, 1):
        seen += size
        if seen >= goal or count == len(sizes):
            stops.append(count)
            goal = 2 * seen
    return stops


def _apart(
    mask: Mask, last: Mask, held: Mapping[Mask, Values], total: int, before: Earlier, alpha: float = 0.05
) -> Difference:
    pairs = [(step[mask], step[last]) for step in before if mask in step and last in step]
    return difference(held[mask], held[last], total, pairs, alpha)


def _estimate(
    mask: Mask, last: Mask | None, held: Mapping[Mask, Values], problem: Problem, before: Earlier
) -> Estimate | None:
    """The mean of `mask` over all pieces: that of `last` on what it was seen on, and the difference to it."""
    if last is None or not all(map(math.isfinite, held[mask])):
        return None
    found = _apart(mask, last, held, sum(problem.sizes), before)
    mine = Estimate.of(held[last], problem.unit)
    both = None if mine.stderr is None else math.hypot(mine.stderr, found.stderr)
    return Estimate(value=mine.value + found.value, stderr=both, n=len(held[mask]), unit=problem.unit)
