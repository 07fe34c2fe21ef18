"""One ranking, and the moves go in its order; also what other searches by rank share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Chosen, Problem, Proposals, Ranked, Scores, lowest


@dataclass(frozen=True)
class OneShot:
    """Score every move once by the criterion of the run, and take them by rising score until the target is reached.

    The first in tie order of equals; a move without a finite score is not taken, and one that is no longer on offer,
    since it overlaps with what is gone, is passed over. If the list is at its end before the target (stock pairs,
    scores that are not finite), what is then on offer is scored on top of what is gone. The moves of an earlier plan
    (`Problem.start`) go first, and the rest is scored on top of them.

    The ranking is that of ShortGPT, Shortened LLaMA, LLM-Drop (its joint drop: moves `block`) and "A deeper look";
    there ties follow the sort at hand.

    Cost: that of the criterion, and one evaluation per step, all in one sweep, so that each step has its loss.
    """

    title: ClassVar[str] = "One-shot ranking"
    source: ClassVar[str] = "Men et al. 2024, arXiv 2403.03853; Kim et al. 2024, arXiv 2402.02834"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    starts: ClassVar[bool] = True

    def propose(self, problem: Problem) -> Proposals:
        return by_rank(problem)

    def evaluations(self, problem: Problem) -> int:
        """Exact for a number of blocks or layers, an upper bound for parameters; those of the criterion are extra."""
        return problem.most_steps()


def by_rank(problem: Problem, every: int | None = None) -> Proposals:
    """Rank what is on offer, take the first of it, and again, until the target is reached.

    every: how many moves to take before the next ranking; None: as many as the target asks for.
    """
    taken = begun(problem)
    if taken:
        yield from _decided((), taken, {})
    while not problem.reached(gone(taken), len(taken)):
        scores = yield Ranked(gone(taken), problem.moves(gone(taken)))
        more = in_order(problem, scores, taken, every)
        yield from _decided(taken, more, scores)
        taken = (*taken, *more)


def gone(moves: Iterable[Move]) -> Mask:
    """The blocks of all `moves`."""
    return DENSE.union(*(move.blocks for move in moves))


def begun(problem: Problem) -> tuple[Move, ...]:
    """The moves of the earlier plan as moves of this problem, in its order, until the target is reached.

    What goes together there and not here goes in parts. InputError for blocks that no move on offer may take.
    """
    taken: tuple[Move, ...] = ()
    for move in problem.start:
        left = move.blocks
        while left and not problem.reached(gone(taken), len(taken)):
            parts = [part for part in problem.moves(gone(taken)) if part.blocks <= left]
            if not parts and any(part.blocks <= left for part in problem.offered(gone(taken))):
                raise InputError(
                    f"with {Move(left)} of the plan to start from gone, {problem.target} cannot be met",
                    fix="leave out --from, or the number of blocks or layers",
                )
            if not parts:
                raise InputError(
                    f"the plan to start from takes {Move(left)}, which no {problem.granularity!r} move on offer takes",
                    fix="use the moves and the protected layers that the plan was found with, or --moves block",
                )
            taken, left = (*taken, parts[0]), left - parts[0].blocks
    return taken


def in_order(problem: Problem, scores: Scores, taken: Sequence[Move], at_most: int | None = None) -> tuple[Move, ...]:
    """The moves to take on top of `taken` by rising score, at least one, until the target or `at_most` is reached.

    scores: of what is on offer on top of `taken`. CheckFailedError if none of them is finite.
    """
    lowest(scores)
    known = {move: score.value for move, score in scores.items() if score is not None}
    more: list[Move] = []
    for move in sorted(known, key=known.__getitem__):
        mask = gone((*taken, *more))
        if len(more) == at_most or problem.reached(mask, len(taken) + len(more)):
            break
        if move in problem.moves(mask):
            more.append(move)
    return tuple(more)


def _decided(before: Sequence[Move], moves: Sequence[Move], scores: Scores) -> Proposals:
    """Evaluate each step in one sweep, then decide for it; it stood against what was ranked and is not yet gone."""
    masks = [gone((*before, *moves[:count])) for count in range(len(moves) + 1)]
    yield tuple(masks[1:])
    for move, mask in zip(moves, masks, strict=False):
        yield Chosen(move, {other: score for other, score in scores.items() if mask.isdisjoint(other.blocks)})
