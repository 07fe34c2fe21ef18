"""Angular distance: the angle by which a move turns the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Angular:
    """Score = mean over positions, then over examples, of arccos(cos(X, Y)) / pi, X and Y the stream before and after.

    From 0 (nothing changes, exactly) to 1 (turned round); computed from the sum and the difference of the two unit
    vectors, since the arccosine of a float32 near 1 has few digits. It is a distance: that of a span is at most the
    sum of those of its layers.

    tokens: all positions, or the last one of every example alone, as Gromov et al. have it for spans of n layers.
    Cost: one forward pass, and half of one more for the states inside layers where moves are single blocks.
    """

    tokens: Literal["all", "last"] = "all"

    title: ClassVar[str] = "Angular distance of states"
    source: ClassVar[str] = "Gromov et al. 2024, arXiv 2403.17887"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "1 for layers and spans, about 1.5 for blocks"
    moves: ClassVar[str] = "runs of blocks: blocks, layers, spans, stock pairs"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.streams import scores_by_state

        return scores_by_state(lab, moves, self._angle, name=repr(self), unit="half turns")

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.streams import passes

        return passes(lab, moves)

    def _angle(self, before: "Tensor", after: "Tensor") -> "Tensor":
        from blockpruner.importance.streams import directions

        if self.tokens == "last":
            before, after = before[:, -1:], after[:, -1:]
        a, b = directions(before), directions(after)
        return 2 / pi * (a - b).norm(dim=-1).atan2((a + b).norm(dim=-1))
