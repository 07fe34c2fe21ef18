"""First-order Taylor: how far the loss moves, to first order, with each weight of a block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores


@dataclass(frozen=True)
class Taylor:
    """The sum of |w * dL/dw| over the weights that leave with a move, L the mean loss over all examples, in nats.

    As in Shortened LLaMA the gradient is that of all examples together, signed, before the absolute value is taken;
    unlike there, how many of them are computed at once changes nothing. Weights: all parameters of its blocks but
    biases, norms too; what only emptied layers need counts as well. An absolute value of a sum over all data is no mean
    over examples, so there is no standard error. Memory: see `backward_walk`.
    """

    title: ClassVar[str] = "First-order Taylor"
    source: ClassVar[str] = "Kim et al. 2024 (Shortened LLaMA), arXiv 2402.02834"
    needs: ClassVar[Needs] = "backward passes"
    passes: ClassVar[str] = "2 forward, 1 backward"
    moves: ClassVar[str] = "any"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.block_weights import MeanProducts
        from blockpruner.importance.gradients import weight_sums

        reason = "the absolute value of a sum over all data is no mean over windows"
        return {
            move: Estimate(value=value, stderr=None, n=len(lab.examples), unit="nats", reason=reason)
            if math.isfinite(value)
            else None
            for move, (value,) in weight_sums(lab, moves, MeanProducts, "taylor").items()
        }

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.gradients import check_has_loss

        check_has_loss(lab.model, lab.examples)
        return 4.0
