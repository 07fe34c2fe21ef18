"""An objective that costs nothing: what a search would have cost is counted, and what it finds is made up."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy

from blockpruner.artifacts import Work
from blockpruner.blocks import Block, Mask
from blockpruner.searching.contract import Found, Values
from blockpruner.searching.permutations import BITS, number

# On Gemma 3 270M and C4, in nats per token, over the first five steps of an exhaustive search: how far the blocks lie
# apart from first to last (but for a few far behind), how much the effect of one differs between segments of 128 tokens
# (the differences of the eight best to the best have 0.07 to 0.13, so each block 0.05 to 0.09), and how much of such a
# difference is new at each step (0.28 to 0.56; experiments/racing_simulation.json).
RANGE, SPREAD, CHANGE = 0.8, 0.07, 0.36


class Counted(Protocol):
    """What is known of an objective without evaluating anything."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def pieces(self) -> int: ...

    def work(self, masks: Sequence[Mask], batch: int) -> Work: ...


@dataclass(frozen=True)
class Rehearsal:
    """Stands in for `objective`.

    Losses are such that races take about as many looks as real ones do: a sum over the blocks that are gone, each with
    an effect of its own and noise on every piece, which is partly new at each step. Requests for all data at once,
    after which nothing is open, are answered with zeros, so that long ones are cheap. told: of each request.
    """

    objective: Counted
    unit: str = "nothing"
    told: Callable[[Mapping[int, Sequence[Mask]]], None] = lambda _: None

    @property
    def batches(self) -> int:
        return len(self.objective.sizes)

    @property
    def pieces(self) -> int:
        return self.objective.pieces

    def losses(self, asked: Mapping[int, Sequence[Mask]]) -> Iterator[Found]:
        whole = len(asked) == self.batches
        self.told(asked)
        for batch, masks in asked.items():
            size = self.objective.sizes[batch]
            for mask in masks:
                yield batch, mask, (0.0,) * size if whole else self._values(mask, batch, size)

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        return self.objective.work(masks, batch)

    def _values(self, mask: Mask, batch: int, size: int) -> Values:
        same = sum(_normal(size, block, batch) for block in mask)
        new = sum(_normal(size, block, batch, len(mask)) for block in mask)
        noise = (1 - CHANGE**2) ** 0.5 * same + CHANGE * new
        return tuple(RANGE * sum(map(_uniform, mask)) + SPREAD * noise) if mask else (0.0,) * size


@cache
def _uniform(block: Block) -> float:
    return number("rehearsal", block) / 2**BITS


@cache
def _normal(size: int, *key: object) -> Any:
    """So many normal numbers that depend on the key alone."""
    return numpy.random.default_rng(number("rehearsal", *key)).standard_normal(size)
