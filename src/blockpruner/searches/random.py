"""The baseline of every table: remove at random."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.searching.contract import DENSE, Chosen, Problem, Proposals


@dataclass(frozen=True)
class Random:
    """At every step take one of the remaining moves at random, whatever its loss, which is evaluated only to be told.

    Cost: one evaluation per step.
    """

    seed: int = 0

    title: ClassVar[str] = "Random removal"
    source: ClassVar[str] = "baseline"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def propose(self, problem: Problem) -> Proposals:
        mask, steps = DENSE, 0
        while not problem.reached(mask, steps):
            moves = problem.moves(mask)
            move = moves[self._draw(steps) % len(moves)]
            mask, steps = mask | move.blocks, steps + 1
            losses = yield (mask,)
            yield Chosen(move, {move: losses[mask]})

    def evaluations(self, problem: Problem) -> int:
        """Exact for a number of blocks or layers; an upper bound for parameters."""
        return problem.most_steps()

    def _draw(self, step: int) -> int:
        """A number from (seed, step) alone: no generator's state to store, the same on every Python."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{step}".encode()).digest())
