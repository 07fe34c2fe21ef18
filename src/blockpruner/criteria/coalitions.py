"""How the loss differs, on average, between models of one size that have a move and models that lack it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.importance.game import Coalition, Game
from blockpruner.searching.contract import Scores
from blockpruner.searching.permutations import shuffled

_log = logging.getLogger("blockpruner")


@dataclass(frozen=True)
class Coalitions:
    """A difference of means at one coalition size, which the deeper look's MMLU script calls a Shapley value.

    For every micro-batch, `draws` sets of int(share * m) moves are drawn that stay, all others go, on top of lab.mask.
    score(i) = mean loss of the draws in which i is absent - mean loss of those in which it is present, over all units,
    in the unit of the objective. Where moves do not interact, its expectation is (n d_i - sum_j d_j) / (n - 1), with
    d_i what i alone adds, for every share: scores add up to about 0, and are not comparable with those of `shapley`.

    The published use draws 10 sets per question of MMLU, keeps 0.9, and has the 0/1 error of the answer for a loss;
    here sets are drawn per micro-batch, so that micro-batches of one item are the published protocol, with another
    generator of random numbers.

    The standard error is that of two means of independent samples, draws weighted by their units; n is the number of
    draws. It is None where i was absent, or present, in one draw only; a score is None where i was never absent or
    never present (more draws help; a log line says so). A draw whose loss is not finite counts against the moves that
    were absent in it, which get None, and says nothing of the others.

    Cost: `draws` passes. InputError if moves share a block, or if none of them would stay.
    Source: Siddiqui et al. 2024, arXiv 2407.16286.
    """

    share: float = 0.9
    draws: int = 10
    seed: int = 0

    title: ClassVar[str] = "Difference of means over coalitions of one size"
    source: ClassVar[str] = "Siddiqui et al. 2024, arXiv 2407.16286 (MMLU loss Shapley)"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "draws"
    moves: ClassVar[str] = "all that share no block"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.draws < 1:
            raise InputError(
                f"coalitions: share={self.share},draws={self.draws} is out of range",
                fix="share between 0 and 1, draws from 1",
            )

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        if not moves:
            return {}
        size = int(self.share * len(moves))
        if size == 0:
            raise InputError(
                f"coalitions: {self.share} of {len(moves)} moves is none, so that no move would ever be present",
                fix="use a larger share or more moves",
            )
        game = Game(lab, tuple(moves))
        seen: list[_Seen] = []
        for batch in game.batches:
            gone = [frozenset(shuffled(len(moves), self.seed, batch, draw)[size:]) for draw in range(self.draws)]
            losses = game.losses(gone, [batch], f"coalitions of micro-batch {batch + 1}")
            seen += [_Seen(absent, losses[absent], game.units(batch, absent)) for absent in gone]
        scores = {move: _score(player, seen, lab.evaluations.objective.unit) for player, move in enumerate(moves)}
        missing = [str(move) for move, score in scores.items() if score is None]
        if missing:
            _log.warning(
                "coalitions: no score for %s: never absent, never present, or absent where the loss was not finite, "
                "in %d draws",
                ", ".join(missing),
                len(seen),
            )
        return scores

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        """Without what the mask tree saves."""
        Game(lab, tuple(moves))
        return float(self.draws)


@dataclass(frozen=True)
class _Seen:
    """One draw: who was absent, the mean loss over its units, their number."""

    absent: Coalition
    loss: float
    units: int


def _score(player: int, seen: Sequence[_Seen], unit: str) -> Estimate | None:
    absent = [draw for draw in seen if player in draw.absent]
    present = [draw for draw in seen if player not in draw.absent and math.isfinite(draw.loss)]
    if not absent or not present or not all(math.isfinite(draw.loss) for draw in absent):
        return None
    value = _mean(absent) - _mean(present)
    n = len(absent) + len(present)
    if min(len(absent), len(present)) == 1:
        side = "absent" if len(absent) == 1 else "present"
        return Estimate(value=value, stderr=None, n=n, unit=unit, reason=f"{side} in one draw only")
    return Estimate(value=value, stderr=math.sqrt(_variance(absent) + _variance(present)), n=n, unit=unit)


def _mean(draws: Sequence[_Seen]) -> float:
    """Over units."""
    return math.fsum(draw.units * draw.loss for draw in draws) / sum(draw.units for draw in draws)


def _variance(draws: Sequence[_Seen]) -> float:
    """Of their mean over units, as a ratio of sums over draws; s^2 / n where all have as many units."""
    mean, units = _mean(draws), sum(draw.units for draw in draws)
    squares = math.fsum((draw.units * (draw.loss - mean)) ** 2 for draw in draws)
    return squares / units**2 * len(draws) / (len(draws) - 1)
