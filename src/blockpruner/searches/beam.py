"""Beam search: greedy removal that keeps several masks, so that a dear first removal may pay later."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Best, Chosen, Losses, Problem, Proposals, Request, lowest
from blockpruner.searching.racing import Race

Path = tuple[Chosen, ...]


@dataclass(frozen=True)
class Beam:
    """At every step extend each of the `width` best masks by every remaining move, and keep the `width` best of those.

    A mask that several of them lead to counts once, by the way that arose first; the first of equals is the better
    one; a loss that is not finite never wins. With width 1 this is `exhaustive`, step by step.

    The plan is the way to the best mask, and each of its steps carries its loss. It is not nested: its first parts
    were evaluated and were among the `width` best of their size, but a search to their size may end elsewhere.

    Masks with as many moves are compared, however many parameters these remove. With a params target some masks reach
    it before others: those among the `width` best of their step are put aside, the rest of these are extended until
    none is left, and the lowest loss of all put aside wins, the earlier one of equals.

    race: the `width` best of each step are found by a race (see `racing`), from which the losses of its steps are; what
    wins in the end is decided by full evaluations. epsilon, delta, growth: of races, as in `greedy`.

    Cost: with m moves at the start and k steps, at most m + width * (k-1) * (m - k/2) evaluations. What is stopped
    before a mask has reached the target leaves no plan, and goes on from its journal when it is run again.
    """

    width: int = 4
    race: bool = False
    seed: int = 0
    epsilon: float = 0.003
    delta: float = 0.05
    growth: float = 1.25

    title: ClassVar[str] = "Beam search"
    source: ClassVar[str] = "Lowerre 1976 (beam search), on BlockPruner's loop: ours"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"a beam of width={self.width} holds nothing", fix="give a width of 1 or more")
        Race(self.epsilon, self.delta, self.seed, self.growth)

    def propose(self, problem: Problem) -> Proposals:
        beams: dict[Mask, Path] = {DENSE: ()}
        ended: list[tuple[float, Path]] = []
        while beams:
            masks = tuple(dict.fromkeys(mask | move.blocks for mask in beams for move in problem.moves(mask)))
            losses, best = yield from self._looked(problem, masks)
            grown = _grown(problem, beams, losses)
            done = tuple(mask for mask in best if problem.reached(mask, len(grown[mask])))
            known: Losses = (yield done) if done else {}
            ended += [(loss.value, grown[mask]) for mask, loss in known.items() if loss is not None]
            beams = {mask: grown[mask] for mask in best if mask not in done}
            if ended:
                yield Best(min(ended, key=lambda end: end[0])[1])
            elif not beams:
                lowest({Move(mask): None for mask in known or grown})  # fails, and names them

    def evaluations(self, problem: Problem) -> int:
        """An upper bound, since masks that several beams lead to are evaluated once; with width 1 as `exhaustive`."""
        moves, beams, total = len(problem.moves(DENSE)), 1, 0
        for step in range(problem.most_steps()):
            new = beams * (moves - step)
            total, beams = total + new, min(self.width, new)
        return total

    def _looked(self, problem: Problem, masks: tuple[Mask, ...]) -> Generator[Request, Any, tuple[Losses, list[Mask]]]:
        """The losses, and the `width` masks of lowest loss, best first, those that arose first before their equals."""
        if self.race:
            race = Race(self.epsilon, self.delta, self.seed, self.growth)
            outcome = yield from race.run(problem, masks, self.width)
            return outcome.estimates, list(outcome.kept)
        losses: Losses = yield masks
        finite = {mask: loss.value for mask, loss in losses.items() if loss is not None}
        return losses, sorted(finite, key=finite.__getitem__)[: self.width]


def _grown(problem: Problem, beams: dict[Mask, Path], losses: Losses) -> dict[Mask, Path]:
    """Every mask one move further, with the way to it that arose first."""
    grown: dict[Mask, Path] = {}
    for mask, path in beams.items():
        scores = {move: losses[mask | move.blocks] for move in problem.moves(mask)}
        for move in scores:
            grown.setdefault(mask | move.blocks, (*path, Chosen(move, scores, loss=scores[move])))
    return grown
