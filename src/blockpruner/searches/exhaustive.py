"""BlockPruner's search: at every step, try every move that remains."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blockpruner.searching.contract import DENSE, Chosen, Problem, Proposals, lowest


@dataclass(frozen=True)
class Exhaustive:
    """At every step evaluate each remaining move on top of those taken, and take the one of lowest loss.

    Strictly lowest, the first in tie order of equals; a loss that is not finite never wins; nothing is ever put back.

    ends: the first and the last layer of each stack that have a block left are never candidates, as in SLEB (Song et
    al. 2024, arXiv 2402.09025; moves `layer`). They are never removed, so they are the first and the last of all.

    Cost: with m moves at the start and k steps, k*m - k*(k-1)/2 evaluations.
    """

    ends: bool = False

    title: ClassVar[str] = "Exhaustive greedy (BlockPruner)"
    source: ClassVar[str] = "Zhong et al. 2024, arXiv 2406.10594; with ends=true Song et al. 2024, arXiv 2402.09025"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def propose(self, problem: Problem) -> Proposals:
        problem = self._task(problem)
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
        problem = self._task(problem)
        moves, steps = len(problem.moves(DENSE)), problem.most_steps()
        return steps * moves - steps * (steps - 1) // 2

    def _task(self, problem: Problem) -> Problem:
        """What is asked for, the ends protected if they are to be; InputError if the rest cannot reach the target."""
        if not self.ends:
            return problem
        layers: dict[str, list[int]] = {}
        for stack, layer in problem.outline.layers():
            layers.setdefault(stack, []).append(layer)
        ends = {(stack, end) for stack, found in layers.items() for end in (min(found), max(found))}
        return replace(problem, protected=problem.protected | ends)
