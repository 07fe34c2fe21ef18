"""The other baseline of every table: the last layers go first."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Block, Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores


@dataclass(frozen=True)
class Deepest:
    """How near to the input it is: the last layers go first, and in a layer the last block.

    Of the n blocks of a stack, in the order they run, the block in place p from 0 scores 1 - (p + 1/2) / n; a move
    scores the mean of its blocks. So a layer scores 1 - (l + 1/2) / L where all layers are alike, and several stacks
    shrink at the same pace, each from its end. Places are those in the whole model, whatever is gone.

    Cost: nothing.
    """

    title: ClassVar[str] = "Last layers first"
    source: ClassVar[str] = "baseline"
    needs: ClassVar[Needs] = "nothing"
    passes: ClassVar[str] = "0"
    moves: ClassVar[str] = "all"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        blocks = lab.anatomy.outline.blocks
        stacks: dict[str, list[Block]] = {}
        for block in blocks:
            stacks.setdefault(block.stack, []).append(block)
        height = {
            block: 1 - (place + 0.5) / len(stack) for stack in stacks.values() for place, block in enumerate(stack)
        }
        return {move: _estimate(fmean(sorted(height[block] for block in move.blocks))) for move in moves}

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        return 0.0


def _estimate(value: float) -> Estimate:
    return Estimate(value=value, stderr=None, n=0, unit="share of the stack after it", reason="a place, not measured")
