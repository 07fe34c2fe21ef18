"""Local improvement of any plan: one move back, another in its place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searches.enumeration import in_place
from blockpruner.searches.one_shot import begun, gone, in_order
from blockpruner.searching.contract import DENSE, Problem, Proposals, lowest
from blockpruner.searching.permutations import shuffled


@dataclass(frozen=True)
class Swap:
    """Exchange a removed move for a kept one, the best exchange of all each round, until none lowers the loss.

    It begins with the moves of an earlier plan (`Problem.start`), as far as the target asks for them; what is missing
    goes in the order of the losses on top of them. Each round evaluates every mask that has one removed move put back
    and one other taken, or none where the target stays reached without it (removal is not monotone), and goes to the
    one of lowest loss, the first of equals, if that is lower by more than `gain`, in units of the loss.

    rounds: at most so many. tries: of all exchanges so many at random per round, from (seed, round); 0: all. A round
    of all of them without a gain ends the search: no single exchange helps. The plan may still not be the best.

    Moves that stay come first in the plan, then those exchanged for; each is on offer on top of those before it. The
    scores of a step are the losses with another move in its place. What is stopped earlier leaves the plan of the
    last round that was finished.

    Cost: for k steps and m moves, k * (m - k) evaluations or fewer per round, 1 for the start, or 1 + m without one.
    """

    tries: int = 0
    gain: float = 0.0
    rounds: int = 10
    seed: int = 0

    title: ClassVar[str] = "Local improvement by swaps"
    source: ClassVar[str] = "local search; that removal is not monotone: Sieberling et al. 2024, arXiv 2410.14649"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tries < 0 or self.gain < 0 or self.rounds < 1:
            raise InputError(
                f"swap: tries={self.tries},gain={self.gain},rounds={self.rounds} is out of range",
                fix="tries and gain from 0, rounds from 1",
            )

    def propose(self, problem: Problem) -> Proposals:
        taken, known = begun(problem), dict[Mask, Estimate | None]()
        while not problem.reached(gone(taken), len(taken)):
            masks = {move: gone((*taken, move)) for move in problem.moves(gone(taken))}
            known |= yield tuple(masks.values())
            taken = (*taken, *in_order(problem, {move: known[mask] for move, mask in masks.items()}, taken))
        yield in_place(problem, taken, known)
        known |= yield (gone(taken),)
        for number in range(self.rounds):
            yield in_place(problem, taken, known)
            near = _exchanged(problem, taken)
            masks = tuple(near)
            looked = tuple(
                masks[place] for place in sorted(shuffled(len(near), self.seed, number)[: self.tries or None])
            )
            known |= yield looked
            best = min(looked, key=lambda mask: _value(known, mask), default=gone(taken))
            if _value(known, gone(taken)) - _value(known, best) > self.gain:
                taken = near[best]
            elif len(looked) == len(near):
                break
        lowest({Move(gone(taken)): known[gone(taken)]})
        yield in_place(problem, taken, known)

    def evaluations(self, problem: Problem) -> int:
        """An upper bound, that of all rounds: with k steps and m moves, k * m for each and for the start, plus one."""
        moves, steps, start = len(problem.moves(DENSE)), problem.most_steps(), begun(problem)
        exchanges = moves * steps if self.tries == 0 else min(self.tries, moves * steps)
        first = 0 if problem.reached(gone(start), len(start)) else moves * steps
        return first + 1 + self.rounds * exchanges


def _exchanged(problem: Problem, taken: Sequence[Move]) -> dict[Mask, tuple[Move, ...]]:
    """Every mask with one move of `taken` put back and one other, or none, in its place, that reaches the target."""
    found: dict[Mask, tuple[Move, ...]] = {}
    for move in taken:
        rest = tuple(other for other in taken if other != move)
        if not _on_offer(problem, rest):
            continue  # stock pairs may stand on each other
        ways = [rest, *((*rest, other) for other in problem.moves(gone(rest)) if other != move)]
        for way in ways:
            if problem.reached(gone(way), len(way)):
                found.setdefault(gone(way), way)
    return found


def _on_offer(problem: Problem, moves: Sequence[Move]) -> bool:
    """Whether each move is on offer on top of those before it."""
    return all(move in problem.moves(gone(moves[:place])) for place, move in enumerate(moves))


def _value(losses: Mapping[Mask, Estimate | None], mask: Mask) -> float:
    """Its loss, infinite if that is not a finite number."""
    loss = losses[mask]
    return math.inf if loss is None else loss.value
