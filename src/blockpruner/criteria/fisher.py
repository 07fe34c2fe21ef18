"""Second-order Taylor with the diagonal of the empirical Fisher information in place of the Hessian."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores
from blockpruner.searching.evaluations import estimate


@dataclass(frozen=True)
class Fisher:
    """The sum of F w^2 / 2 over the weights that leave with a move, F = the mean over examples of (dL_i/dw)^2.

    L_i: the loss of example i, a mean over its tokens, in nats; the score is in nats squared, since F stands for the
    curvature only where losses are those of a trained model. It is a mean over examples, with its standard error.
    Examples are windows, not tokens, so F is smaller than one of single tokens, much alike in order. Weights as in
    `taylor`, whose first-order term this leaves out: at an optimum that is zero. Memory: see `backward_walk`.
    """

    title: ClassVar[str] = "Second-order Taylor (diagonal Fisher)"
    source: ClassVar[str] = "LeCun et al. 1989 (Optimal brain damage); Theis et al. 2018, arXiv 1801.05787"
    needs: ClassVar[Needs] = "backward passes"
    passes: ClassVar[str] = "2 forward, 1 backward"
    moves: ClassVar[str] = "any"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.block_weights import SquaredProducts
        from blockpruner.importance.gradients import weight_sums

        found = weight_sums(lab, moves, SquaredProducts, "fisher")
        return {move: estimate(values, "nats squared") for move, values in found.items()}

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.gradients import check_has_loss

        check_has_loss(lab.model, lab.examples)
        return 4.0
