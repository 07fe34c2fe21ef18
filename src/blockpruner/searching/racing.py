"""Races: the best of many masks, found by looking longer only at those that are still in question.

What is to be found out is the mean over the pieces of fixed windows, a finite population: a mask that was evaluated on
all pieces is known exactly. All candidates are evaluated on the same few pieces first. Whatever is then shown to be
worse than the leader leaves the race, the rest is evaluated on more, and so on.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import covariance, fmean
from typing import Any

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Pieces, Problem, Values
from blockpruner.searching.permutations import shuffled

FEWEST, BATCHES = 8, 2  # pieces and micro-batches that are seen before anything leaves
WINDOW = 512  # tokens where none are named: the intervals below take its pieces for independent


@dataclass(frozen=True)
class Difference:
    """An estimate of the difference of two means over all pieces. value, stderr: in the unit of the values.

    freedom: degrees of freedom of the standard error; infinite where the difference is known.
    """

    value: float
    stderr: float
    freedom: float

    def margin(self, alpha: float) -> float:
        """How far the truth may be on one side of the value, but for a share `alpha` of all cases (Student's t).

        Pieces that all differ by the same say nothing of the others, so that the margin is then infinite.
        """
        if not self.stderr:
            return 0.0 if self.freedom == math.inf else math.inf
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, 1 - alpha)) * self.stderr


def difference(steps: Sequence[tuple[Values, Values]], total: int, alpha: float = 0.05) -> Difference:
    """The mean of the first of two less that of the second over all `total` pieces, from what both were seen on.

    steps: their values now, and at each earlier step, the last one first; all in the same order of the pieces, which is
    random. Pieces are drawn without replacement, so that the mean of n has the variance s^2 (1/n - 1/total).

    What a move does now is much like what it did a step before. If d is the difference now and e the one before, both
    seen on n pieces, and E the estimate of the mean of e, then mean(d - b e) + b E with the least squares slope b has
    the variance var(d - b e) (1/n - 1/total) + b^2 var(E): only the change has to be estimated (multi-phase sampling
    with a regression estimator). E may rest on a step before in the same way. Whichever has the less margin at
    `alpha` is taken: this, or what is seen now.
    """
    found: Difference | None = None
    then: list[float] = []
    for one, other in reversed(steps):
        now = [a - b for a, b in zip(one, other, strict=False)]
        ways = [_mean(now, total)]
        if found is not None and min(len(now), len(then)) >= FEWEST // 2:
            ways.append(_through(now, then, found, total))
        found, then = min(ways, key=lambda way: way.margin(alpha)), now
    assert found is not None
    return found


def _mean(values: Sequence[float], total: int) -> Difference:
    size = len(values)
    if size == total:
        return Difference(fmean(values), 0.0, math.inf)
    variance = _squares(values) / max(1, size - 1) * (1 / size - 1 / total)
    return Difference(fmean(values), math.sqrt(variance), size - 1)


def _through(now: Sequence[float], then: Sequence[float], before: Difference, total: int) -> Difference:
    """The mean of `now` by way of what is known of the mean of `then`."""
    size = min(len(now), len(then))
    now, then = now[:size], then[:size]
    squares = _squares(then)
    slope = (size - 1) * covariance(then, now) / squares if squares else 0.0
    left = max(0.0, _squares(now) - slope**2 * squares) / (size - 2)
    variance = left * (1 / size - 1 / total) + (slope * before.stderr) ** 2
    value = fmean(now) + slope * (before.value - fmean(then))
    return Difference(value, math.sqrt(variance) if left else 0.0, min(size - 2, before.freedom))


def _squares(values: Sequence[float]) -> float:
    """The sum of the squared distances from their mean."""
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


@dataclass(frozen=True)
class Outcome:
    """What a race ended in.

    kept: the masks that won, best first; ties: those that were not shown to be worse than all of them, only not to be
    better by more than epsilon; values: of every mask, on the pieces it was seen on, in one order; estimates: of
    the mean over all pieces, that of the whole model and the difference to it, None where a value is not finite.
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

    A mask leaves when it is shown to be worse than all that are to be kept, and the race ends when none of the rest may
    be better than one of them by epsilon, or all were seen on everything, and so are known. delta is spread evenly over
    comparisons, half of it on the first look, where there are so few pieces that it widens the intervals most, and the
    rest evenly on the others (union bound); these are t intervals, exact for independent pieces and normal means, but
    for the choice of the smaller of two margins, with which a few more of them miss. Neither quite holds for text:
    pieces of one window resemble each other, so that long windows make errors more frequent. On recorded losses, where
    neighbours in windows of 256 tokens correlate by 0.03 to 0.20, 2 of 14,400 races erred, of which delta allows 720
    (experiments/racing_simulation.json).

    growth: of what is seen from one look to the next, at least. More of it makes fewer looks, on more pieces in all.
    InputError where these are none.
    """

    epsilon: float = 0.003
    delta: float = 0.05
    seed: int = 0
    growth: float = 1.25

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and 0 < self.delta < 1 < self.growth):
            fix = "give epsilon of 0 or more, delta between 0 and 1, and growth above 1"
            raise InputError(f"{self} is out of range", fix=fix)

    def run(self, problem: Problem, masks: Sequence[Mask], keep: int = 1, before: Earlier = ()) -> Running:
        """Yield `Pieces`, to be sent values, and return what came of it.

        before: what the same moves led to at earlier steps, the last step first, by the masks of now.
        Cost: all masks on FEWEST pieces or a few more, and ever fewer masks on `growth` times as many each time; the
        whole model on all, which every search has seen.
        """
        order = shuffled(problem.batches, self.seed, "race")
        whole = (yield Pieces((DENSE,), order))[DENSE]
        stops, total = _rounds([problem.sizes[batch] for batch in order], self.growth), sum(problem.sizes)
        each = self.delta / max(1, keep * (len(masks) - keep)) / 2
        held: dict[Mask, Values] = dict.fromkeys(masks, ())
        running = tuple(masks)
        for start, stop in pairwise([0, *stops]):
            alpha = each if not start else each / (len(stops) - 1)
            found = yield Pieces(running, order[start:stop])
            held |= {mask: held[mask] + found[mask] for mask in running}
            finite = [mask for mask in running if all(map(math.isfinite, held[mask]))]
            ranked = sorted(finite, key=lambda mask: fmean(held[mask]))
            kept, rest = ranked[:keep], ranked[keep:]
            below = {mask: _below(mask, kept, held, total, before, alpha) for mask in rest}
            running = (*kept, *(mask for mask in rest if below[mask] <= 0))
            if all(low > -self.epsilon for low in below.values()):
                break
        kept = running[:keep]
        ties = running[keep:] if kept and len(held[kept[0]]) < total else ()
        return Outcome(kept, ties, held, _estimates(kept, held, whole, problem.unit, before))


def _rounds(sizes: Sequence[int], growth: float) -> list[int]:
    """After which micro-batches to look: once FEWEST pieces are seen, whenever it is `growth` as many, at the end."""
    stops, seen, goal = list[int](), 0, FEWEST
    for count, size in enumerate(sizes, 1):
        seen += size
        if (seen >= goal and count >= BATCHES) or count == len(sizes):
            stops.append(count)
            goal = growth * seen
    return stops


def _below(
    mask: Mask, kept: Sequence[Mask], held: Mapping[Mask, Values], total: int, before: Earlier, alpha: float
) -> float:
    """By how much `mask` is worse than each of `kept` at the least."""
    apart = (_apart(mask, other, held, total, before, alpha) for other in kept)
    return min(each.value - each.margin(alpha) for each in apart)


def _apart(
    mask: Mask, last: Mask, held: Mapping[Mask, Values], total: int, before: Earlier, alpha: float = 0.05
) -> Difference:
    pairs = [(step[mask], step[last]) for step in (held, *before) if mask in step and last in step]
    finite = [pair for pair in pairs if all(map(math.isfinite, (*pair[0], *pair[1])))]
    return difference(finite, total, alpha)


def _estimates(
    kept: Sequence[Mask], held: Mapping[Mask, Values], whole: Values, unit: str, before: Earlier
) -> dict[Mask, Estimate | None]:
    """The mean of each mask over all pieces: of the whole model, and the differences to it of the last one kept, and to
    that of the others. Means over what was looked at would say as much about which pieces these are."""
    if not kept:
        return dict.fromkeys(held)
    last, total = kept[-1], len(whole)
    seen, earlier = {**held, DENSE: whole}, [{**step, DENSE: whole} for step in before]
    base = _sum(Estimate.of(whole, unit), _apart(last, DENSE, seen, total, earlier), len(held[last]))
    return {mask: base if mask == last else _beside(base, mask, last, held, total, before) for mask in held}


def _beside(
    base: Estimate, mask: Mask, last: Mask, held: Mapping[Mask, Values], total: int, before: Earlier
) -> Estimate | None:
    if not all(map(math.isfinite, held[mask])):
        return None
    return _sum(base, _apart(mask, last, held, total, before), len(held[mask]))


def _sum(one: Estimate, more: Difference, pieces: int) -> Estimate:
    stderr = None if one.stderr is None else math.hypot(one.stderr, more.stderr)
    return Estimate(value=one.value + more.value, stderr=stderr, n=pieces, unit=one.unit, reason=one.reason)
