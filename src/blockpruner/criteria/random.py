"""The baseline of every table: scores at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores
from blockpruner.searching.permutations import BITS, number


@dataclass(frozen=True)
class Random:
    """A number between 0 and 1 from (seed, move) alone: the same whatever else is scored, and whatever is gone.

    Cost: nothing.
    """

    seed: int = 0

    title: ClassVar[str] = "Random"
    source: ClassVar[str] = "baseline"
    needs: ClassVar[Needs] = "nothing"
    passes: ClassVar[str] = "0"
    moves: ClassVar[str] = "all"

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        return {move: self._score(move) for move in moves}

    def _score(self, move: Move) -> Estimate:
        value = number(self.seed, move) / 2**BITS
        return Estimate(value=value, stderr=None, n=0, unit="random number", reason="drawn at random, not measured")

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        return 0.0
