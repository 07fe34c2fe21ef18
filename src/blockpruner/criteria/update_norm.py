"""Update norm: the size of what a move adds to the residual stream, beside that of the stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UpdateNorm:
    """Score = mean over positions, then over examples, of ||Y - X|| / ||X||, X and Y the stream before and after.

    p: 1 or 2, of the norms. of: `output` divides by ||Y|| instead. relative: False leaves the denominator out.
    "A deeper look" names these norms; its code for them was not released, so that the denominator is our choice.
    Cost: one forward pass, and half of one more for the states inside layers where moves are single blocks.
    """

    p: Literal[1, 2] = 2
    of: Literal["input", "output"] = "input"
    relative: bool = True

    title: ClassVar[str] = "Relative update norm"
    source: ClassVar[str] = "Siddiqui et al. 2024, arXiv 2407.16286 (named there; the denominator is ours)"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "1 for layers, about 1.5 for blocks"
    moves: ClassVar[str] = "runs of blocks: blocks, layers, spans, stock pairs"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.streams import scores_by_state

        unit = f"L{self.p} norms of the {self.of}" if self.relative else f"L{self.p} norm"
        return scores_by_state(lab, moves, self._size, name=repr(self), unit=unit)

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.streams import passes

        return passes(lab, moves)

    def _size(self, before: "Tensor", after: "Tensor") -> "Tensor":
        from blockpruner.importance.streams import lengths

        size = (after - before).norm(self.p, dim=-1)
        return size / lengths(before if self.of == "input" else after, self.p) if self.relative else size
