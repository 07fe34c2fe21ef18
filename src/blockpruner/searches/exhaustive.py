"""BlockPruner's search: at every step, try every move that remains."""

from dataclasses import dataclass
from typing import ClassVar

from blockpruner.searching import DENSE, Chosen, Problem, Proposals, lowest


@dataclass(frozen=True)
class Exhaustive:
    """At every step evaluate each remaining move on top of those taken, and take the one of lowest loss.

    Strictly lowest, the first in tie order of equals; a loss that is not finite never wins; nothing is ever put back.

    Cost: with m moves at the start and k steps, k*m - k*(k-1)/2 evaluations.
    """

    title: ClassVar[str] = "Exhaustive greedy (BlockPruner)"
    source: ClassVar[str] = "Zhong et al. 2024, arXiv 2406.10594"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = False

    def propose(self, problem: Problem) -> Proposals:
        mask, steps = DENSE, 0
        while not problem.reached(mask, steps):
            moves = problem.moves(mask)
            losses = yield tuple(mask | move.blocks for move in moves)
            scores = {move: losses[mask | move.blocks] for move in moves}
            best = lowest(scores)
            yield Chosen(best, scores)
            mask, steps = mask | best.blocks, steps + 1

    def evaluations(self, problem: Problem) -> int:
        """Exact for single blocks and whole layers up to a number of them; an upper bound otherwise."""
        moves, steps = len(problem.moves(DENSE)), problem.most_steps()
        return steps * moves - steps * (steps - 1) // 2
