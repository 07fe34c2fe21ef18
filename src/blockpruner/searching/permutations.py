"""Random orders that depend on a key alone, and walks along them: pure numbers."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

BITS = 256


def number(*key: object) -> int:
    """BITS uniform bits from `key` alone: no generator's state to store, the same on every Python."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, key)).encode()).digest())


def shuffled(count: int, *key: object) -> tuple[int, ...]:
    """The numbers below `count` in a uniformly random order, which depends on `count` and `key` alone."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = number(*key, last) % (last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


@dataclass
class Walk:
    """Players leave in `order`; losses[k] is the loss without the first k of them, `end` the loss without them all.

    The walk is over when one player is left, or as soon as the loss is nearer than `near` to `end` (0: never).
    """

    order: tuple[int, ...]
    losses: list[float]
    end: float
    near: float = 0.0

    @property
    def over(self) -> bool:
        return len(self.losses) == len(self.order) or abs(self.losses[-1] - self.end) < self.near

    def ahead(self, steps: int) -> list[frozenset[int]]:
        """Who is gone at each of the next `steps` places whose losses it wants; none if it is over."""
        at = len(self.losses)
        stop = at if self.over else min(at + steps, len(self.order))
        return [frozenset(self.order[:gone]) for gone in range(at, stop)]

    def extend(self, losses: Iterable[float]) -> None:
        """The losses at the next places; those behind the place where the walk is over are not looked at."""
        for loss in losses:
            if not self.over:
                self.losses.append(loss)

    def marginals(self) -> dict[int, float]:
        """By how much the loss rose when each player left; what is left at the end is spread evenly over the rest.

        They add up to `end` minus losses[0]. NaN where the loss was not finite before the player left, so that
        nothing can be said; infinite where it was finite before, and no longer after.
        """
        rest = len(self.order) - len(self.losses) + 1
        steps = [_rise(before, after) for before, after in pairwise(self.losses)]
        steps += [_rise(self.losses[-1], self.end) / rest] * rest
        return dict(zip(self.order, steps, strict=True))


def _rise(before: float, after: float) -> float:
    if not math.isfinite(before):
        return math.nan
    return after - before if math.isfinite(after) else math.inf
