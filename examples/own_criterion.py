"""A criterion of your own in 30 lines, beside those that come with the package.

    python examples/own_criterion.py

A criterion is a frozen dataclass: its fields are its options, its class variables say what it is, `scores` gives each
move a number, higher = keep. This one asks how much the loss rises when a move goes from a model that has lost its last
layer already, for what is spare in the whole model need not be spare there.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import blockpruner as bp
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores
from blockpruner.searching.evaluations import estimate


@dataclass(frozen=True)
class WithoutTheLast:
    """How much the loss rises when the move goes from a model that lacks the last `layers` layers already."""

    layers: int = 1

    title: ClassVar[str] = "Leave-one-out after a cut"
    source: ClassVar[str] = "this example"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "m + 1"
    moves: ClassVar[str] = "all"

    def scores(self, lab: Lab, moves: Sequence[bp.Move]) -> Scores:
        deepest = max(block.layer for block in lab.anatomy.outline.blocks)
        cut = frozenset(b for b in lab.anatomy.outline.blocks if b.layer > deepest - self.layers)
        masks = {move: lab.mask | cut | move.blocks for move in moves}
        lab.evaluations.losses([lab.mask | cut, *masks.values()], "scoring")
        before, unit = lab.evaluations.values(lab.mask | cut), lab.evaluations.objective.unit
        return {
            move: estimate([a - b for a, b in zip(lab.evaluations.values(mask), before, strict=True)], unit)
            for move, mask in masks.items()
        }

    def cost(self, lab: Lab, moves: Sequence[bp.Move]) -> float:
        return len(moves) + 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    loaded = bp.load(options.model)
    table = bp.score(
        loaded.model,
        loaded.tokenizer,
        criteria=[WithoutTheLast(), "leave-one-out"],
        calibration=options.calibration,
        tokens=options.tokens,
        window=min(options.tokens, 128),
        quiet=True,
    )
    for criterion in table.criteria:
        print(f"{criterion.criterion}: {', '.join(criterion.least_first[:6])} first")


if __name__ == "__main__":
    main()
