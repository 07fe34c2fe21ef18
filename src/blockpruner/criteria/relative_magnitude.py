"""Relative magnitude: how much of the residual stream after a move comes from the move."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RelativeMagnitude:
    """Score = mean over positions, then over examples, of ||f|| / ||X + f||, X the stream before, f what is added.

    L2 norms; f is the difference of the states after and before, so that X + f is the state after. ShortGPT writes the
    norm of a quotient, ||f / (X + f)||, which is read here as the quotient of the norms. This is
    `update-norm:p=2,of=output`, under the name by which ShortGPT and LLM-Drop compare it with the cosine.
    Cost: one forward pass, and half of one more for the states inside layers where moves are single blocks.
    """

    title: ClassVar[str] = "Relative magnitude"
    source: ClassVar[str] = "Men et al. 2024 (ShortGPT), arXiv 2403.03853; He et al. 2024 (LLM-Drop), arXiv 2406.15786"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "1 for layers, about 1.5 for blocks"
    moves: ClassVar[str] = "runs of blocks: blocks, layers, spans, stock pairs"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.streams import scores_by_state

        return scores_by_state(lab, moves, _share, name=repr(self), unit="L2 norms of the output")

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.streams import passes

        return passes(lab, moves)


def _share(before: "Tensor", after: "Tensor") -> "Tensor":
    from blockpruner.importance.streams import lengths

    return (after - before).norm(dim=-1) / lengths(after)
