"""Every mask there is: the truth that other searches are held to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searches.one_shot import gone
from blockpruner.searching.contract import DENSE, Best, Chosen, Problem, Proposals, lowest

CHUNK = 64


@dataclass(frozen=True)
class Enumeration:
    """Evaluate every mask of the target's size, and take the one of lowest loss; for tiny cases.

    A mask is of the size if moves lead to it, one on top of the other, of which only the last reaches the target: any
    mask that a search by steps can end in. That of a number of blocks is every set of so many. Equals: the first, by
    the number of moves, then by their places in tie order.

    limit: InputError, with the number, if there are more masks, or more than so many on one level on the way.
    The scores of a step are the losses with another move in its place.

    Cost: for k of m moves, m! / (k! (m-k)!) evaluations, in sweeps of 64. What is stopped earlier leaves the best of
    the sweeps so far.
    """

    limit: int = 5000

    title: ClassVar[str] = "Exhaustive enumeration"
    source: ClassVar[str] = "the definition of the best mask"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def propose(self, problem: Problem) -> Proposals:
        ways = self._masks(problem)
        masks = tuple(ways)
        losses: dict[Mask, Estimate | None] = {}
        for start in range(0, len(masks), CHUNK):
            losses |= yield masks[start : start + CHUNK]
            finite = {mask: loss.value for mask, loss in losses.items() if loss is not None}
            if finite:
                yield in_place(problem, ways[min(finite, key=finite.__getitem__)], losses)
        lowest({Move(mask): loss for mask, loss in losses.items()})  # fails if none is finite

    def evaluations(self, problem: Problem) -> int:
        """Exact."""
        return len(self._masks(problem))

    def _masks(self, problem: Problem) -> dict[Mask, tuple[Move, ...]]:
        """Every mask of the size, and the first way to it."""
        moves, steps = problem.moves(DENSE), problem.most_steps()
        apart = len(gone(moves)) == sum(len(move.blocks) for move in moves)
        if apart and problem.target.unit in ("blocks", "layers"):
            number = math.comb(len(moves), steps)
            self._check(number, f"{number:,}")
            return {gone(taken): taken for taken in combinations(moves, steps)}
        found: dict[Mask, tuple[Move, ...]] = {}
        level: dict[Mask, tuple[Move, ...]] = {DENSE: ()}
        while level:
            deeper: dict[Mask, tuple[Move, ...]] = {}
            for mask, taken in level.items():
                for move in problem.moves(mask):
                    deeper.setdefault(mask | move.blocks, (*taken, move))
                self._check(len(found) + len(deeper), f"more than {self.limit:,}")
            reached = {mask: taken for mask, taken in deeper.items() if problem.reached(mask, len(taken))}
            found |= reached
            level = {mask: taken for mask, taken in deeper.items() if mask not in reached}
        return found

    def _check(self, number: int, words: str) -> None:
        if number > self.limit:
            raise InputError(
                f"there are {words} masks to evaluate, and limit={self.limit}",
                fix="ask for less, protect more layers, raise the limit, or use another search",
            )


def in_place(problem: Problem, taken: Sequence[Move], losses: Mapping[Mask, Estimate | None]) -> Best:
    """Decide for each move of `taken`; its scores are the losses, where known, with another move in its place."""
    decisions: list[Chosen] = []
    for move in taken:
        rest = gone(other for other in taken if other != move)
        masks = {other: rest | other.blocks for other in (move, *problem.moves(rest))}
        known = {other: mask for other, mask in masks.items() if mask in losses and problem.reached(mask, len(taken))}
        decisions.append(Chosen(move, {other: losses[mask] for other, mask in known.items()}))
    return Best(tuple(decisions))
