"""The plain question: how much worse is the model without it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores
from blockpruner.searching.evaluations import estimate


@dataclass(frozen=True)
class LeaveOneOut:
    """How much the loss rises when the move alone goes, in the unit of the objective.

    score(i) = mean over units of loss(lab.mask and i gone) - loss(lab.mask gone), with the standard error of these
    paired differences. None where a loss is not finite.

    With the language-modelling loss it ranks as Shortened LLaMA's PPL, which is the exponential of the loss without
    the layer. It also ranks as the loss and logit "Shapley" that the deeper look released: of n moves that add d_i
    each, that one gives (n d_i - sum_j d_j) / (n - 1), which rises strictly with d_i. A Shapley value is neither; see
    `shapley`. Both papers score layers (the second their halves, too); here it is any move.

    Cost: one pass per move and one of the model as it is; the mask tree halves that for single blocks.
    """

    title: ClassVar[str] = "Leave-one-out loss increase"
    source: ClassVar[str] = "Kim et al. 2024, arXiv 2402.02834 (PPL); Siddiqui et al. 2024, arXiv 2407.16286"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "m + 1; about half of it with the mask tree"
    moves: ClassVar[str] = "all"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        masks = {move: lab.mask | move.blocks for move in moves}
        evaluations = lab.evaluations
        evaluations.losses((lab.mask, *masks.values()), f"{len(masks)} moves left out, one by one")
        whole = evaluations.values(lab.mask)
        return {
            move: estimate(
                [without - as_is for without, as_is in zip(evaluations.values(mask), whole, strict=True)],
                evaluations.objective.unit,
            )
            for move, mask in masks.items()
        }

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        """Without what the mask tree saves."""
        return len(moves) + 1.0
