"""Moves as the players of a game, in which a coalition of them is gone and the loss is what that costs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from blockpruner.blocks import Block, Mask, Move
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab
from blockpruner.searching.evaluations import estimate

MASKS = 64  # masks per evaluation: the mask tree holds a state for each of them

Coalition = frozenset[int]  # players that are gone, by their places among the moves


@dataclass(frozen=True)
class Game:
    """The losses of `lab.mask` and a coalition of `moves`; InputError, naming two of them, if they share a block."""

    lab: Lab
    moves: tuple[Move, ...]

    def __post_init__(self) -> None:
        owner: dict[Block, Move] = {}
        for move in self.moves:
            for block in sorted(move.blocks, key=lambda block: block.order):
                if block in owner:
                    raise InputError(
                        f"{owner[block]} and {move} share {block}, so that one cannot go while the other stays",
                        fix="use moves of single blocks or layers with this criterion",
                    )
                owner[block] = move

    @property
    def batches(self) -> range:
        return range(self.lab.evaluations.objective.batches)

    def units(self, batch: int, gone: Coalition) -> int:
        """Number of units of a micro-batch, as seen in the losses of a coalition, which were asked for before."""
        mask = self._mask(gone)
        return len(self.lab.evaluations.part([mask], batch, "")[mask])

    def losses(self, coalitions: Iterable[Coalition], batches: Iterable[int], message: str) -> dict[Coalition, float]:
        """The mean loss over all units of these micro-batches, by coalition; NaN where one is not finite."""
        masks = {gone: self._mask(gone) for gone in coalitions}
        wanted, among = list(masks.values()), tuple(batches)
        units: dict[Mask, list[float]] = {mask: [] for mask in wanted}
        for start in range(0, len(wanted), MASKS):
            for batch in among:
                for mask, found in self.lab.evaluations.part(wanted[start : start + MASKS], batch, message).items():
                    units[mask] += found
        means = {mask: estimate(found, "") for mask, found in units.items()}
        return {gone: math.nan if (mean := means[mask]) is None else mean.value for gone, mask in masks.items()}

    def _mask(self, gone: Coalition) -> Mask:
        return self.lab.mask.union(*(self.moves[player].blocks for player in gone))
