"""A request for losses cut into units of work of about the same cost, for workers that share it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from blockpruner.blocks import Block, Mask, format_mask

Cost = Callable[[Sequence[Mask], int], float]


@dataclass(frozen=True)
class Unit:
    """Masks that one worker evaluates on one micro-batch in one sweep."""

    batch: int
    masks: tuple[Mask, ...]

    def __str__(self) -> str:
        ends = dict.fromkeys(map(format_mask, (self.masks[0], self.masks[-1])))
        return f"micro-batch {self.batch}, {len(self.masks)} masks ({' to '.join(ends)})"


def cut(asked: Mapping[int, Sequence[Mask]], workers: int, blocks: Sequence[Block], cost: Cost) -> list[Unit]:
    """The units of a request, to be handed out in this order.

    Micro-batches go whole as long as there is one for each worker, which costs nothing more than a single process; the
    rest are cut into runs of masks that share their first layers, so that all workers have a part of each.
    blocks: in the order they run; cost: of a sweep, counted.
    """
    place = {block: number for number, block in enumerate(blocks)}
    # Depth first through the tree of prefixes: masks that agree on the first layers stand side by side.
    ordered = {
        b: sorted(masks, key=lambda m: [*sorted(map(place.__getitem__, m)), math.inf]) for b, masks in asked.items()
    }
    batches = list(ordered)
    whole = len(batches) - len(batches) % workers
    units = [Unit(batch, tuple(ordered[batch])) for batch in batches[:whole]]
    for batch in batches[whole:]:
        units += [Unit(batch, run) for run in _runs(ordered[batch], batch, len(batches) - whole, workers, cost)]
    return units


def _runs(masks: Sequence[Mask], batch: int, batches: int, workers: int, cost: Cost) -> list[tuple[Mask, ...]]:
    """`masks` cut into runs of about the same cost; how many is best where `batches` are cut like this.

    A run of its own computes its first prefix again, half a forward pass on average. n runs of each micro-batch are
    ceil(batches n / workers) rounds, each of 1/n of the sweep and that half pass.
    """
    first = cost(masks[:1], batch)
    own = [first, *(cost(pair, batch) - cost(pair[:1], batch) for pair in pairwise(masks))]
    total = sum(own)

    def rounds(number: int) -> float:
        return math.ceil(batches * number / workers) * (total / number + (first / 2 if number > 1 else 0))

    number = min(range(1, min(len(masks), workers) + 1), key=rounds)
    middles = (end - each / 2 for end, each in zip(accumulate(own), own, strict=True))
    marked = zip((min(number - 1, int(number * middle / total)) for middle in middles), masks, strict=True)
    return [tuple(mask for _, mask in run) for _, run in groupby(marked, key=lambda pair: pair[0])]
