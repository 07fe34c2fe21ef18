"""The size of a block's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores


@dataclass(frozen=True)
class Magnitude:
    """The sum of |W|^p over the weights that leave with a move; p = 1 is Shortened LLaMA's.

    Weights: all parameters of its blocks but biases, norms too, as there; what only emptied layers need counts as well.
    Looks at no data, so there is no standard error.
    """

    p: Literal[1, 2] = 1

    title: ClassVar[str] = "Magnitude of weights"
    source: ClassVar[str] = "Kim et al. 2024 (Shortened LLaMA), arXiv 2402.02834"
    needs: ClassVar[Needs] = "weights"
    passes: ClassVar[str] = "none"
    moves: ClassVar[str] = "any"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.block_weights import floats, holdings, in_float, leaving, sums

        held = holdings(lab.model, lab.anatomy)
        weights = floats(lab.model, (name for move in moves for name in leaving(held, move, lab.mask)))
        sizes = {
            name: (math.fsum(float((w.abs() ** self.p).sum()) for (w,) in in_float(weight)),)
            for name, weight in weights.items()
        }
        unit = "sum of |weights|" if self.p == 1 else "sum of squared weights"
        return {
            move: Estimate(value=value, stderr=None, n=1, unit=unit, reason="weights are what they are: no data")
            if math.isfinite(value)
            else None
            for move, (value,) in sums(held, moves, lab.mask, sizes).items()
        }

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        return 0.0
