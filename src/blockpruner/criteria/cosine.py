"""Block influence: how much a move turns the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cosine:
    """Score = mean over positions, then over examples, of 1 - cos(X, Y), X and Y the stream before and after; 0 to 2.

    Computed as half the squared distance of the two unit vectors, which is the same, and exactly 0 where nothing
    changes; in float32 ("A deeper look": in the model's dtype), over every position, the first one too. Zeros have no
    direction, and lie at 1/2 from every other vector.

    residual: False compares X with Y - X, what the move adds. LLM-Drop's ablation of this name, which ruins models,
    compares the output of the norm before the block with the raw output of the block; here the stream itself stands
    for its normed copy, since not every architecture has one, and what a norm or scale after the block makes of its
    output is part of Y - X.
    Cost: one forward pass, and half of one more for the states inside layers where moves are single blocks.
    """

    residual: bool = True

    title: ClassVar[str] = "Cosine distance of states (block influence)"
    source: ClassVar[str] = (
        "Men et al. 2024 (ShortGPT), arXiv 2403.03853; He et al. 2024 (LLM-Drop), arXiv 2406.15786; "
        "Siddiqui et al. 2024, arXiv 2407.16286"
    )
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "1 for layers, about 1.5 for blocks"
    moves: ClassVar[str] = "runs of blocks: blocks, layers, spans, stock pairs"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.streams import scores_by_state

        return scores_by_state(lab, moves, self._influence, name=repr(self), unit="cosine distance")

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.streams import passes

        return passes(lab, moves)

    def _influence(self, before: "Tensor", after: "Tensor") -> "Tensor":
        from blockpruner.importance.streams import directions

        other = after if self.residual else after - before
        return (directions(before) - directions(other)).square().sum(-1) / 2
