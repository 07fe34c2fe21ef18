"""True Shapley values: what a move is worth on average over all orders in which the moves could go."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.importance.game import Game
from blockpruner.importance.ranking import spearman
from blockpruner.searching.contract import Scores
from blockpruner.searching.evaluations import estimate
from blockpruner.searching.permutations import Walk, shuffled

STRIDE = 8  # places of a walk that are evaluated at once when it may end early


@dataclass(frozen=True)
class _Sample:
    """Micro-batches that a draw is evaluated on: their weight against the mean of 1, the losses at both ends."""

    batches: tuple[int, ...]
    weight: float
    dense: float
    empty: float


@dataclass(frozen=True)
class Shapley:
    """The Shapley value of each move in the game of all of them, as the mean over random orders of removal.

    score(i) = mean over orders of loss(those before i and i gone) - loss(those before i gone), on top of lab.mask, in
    the unit of the objective; the exact value is the mean over all m! orders. The order of a draw depends on
    (seed, draw) alone. The standard error is over draws, n their number.

    permutations: orders walked. antithetic: each order is followed by its reverse; such a pair is one draw, so that
    there are permutations / 2 (rounded up), and where moves interact in pairs only, each pair is exact.
    data: with `cycle`, each draw is evaluated on one micro-batch, all of them in turn, weighted by their units, which
    leaves the estimate unbiased for the mean over all units; the standard error then has the differences between
    micro-batches in it, and is rather too large, since a balanced cycle takes part of them out. With `all`, every draw
    is evaluated on all units, and covers chance in the orders alone.

    Efficiency: the scores add up to loss(all gone) - loss(lab.mask gone) but for rounding, for any number of draws with
    `all`; with `cycle`, whenever all micro-batches were drawn equally often.

    truncation: a walk ends where the loss is within this share of |loss(all gone) - loss(lab.mask gone)| of
    loss(all gone); what remains of the rise is spread evenly over the moves not yet removed. Efficiency holds; the
    values of late places are smoothed: on a loss that only rises, a score is off by less than that share of the rise,
    on one that overshoots loss(all gone) on its way, by more. 0: walks are complete, and there is no bias.
    stable, check: after every `check` draws the ranking is compared with the one before; the run ends when their
    Spearman correlation is at least `stable` twice in a row (both rankings share draws, so it is high to begin with).
    0: never.

    Losses that are not finite: a move that turned a finite loss into another gets None, whose true value is not finite
    either; where the loss was not finite before a move went, that walk says nothing of it, and is left out of its mean.

    Cost in passes over all units: 2 + orders * (m - 1), the second term divided by the number of micro-batches with
    `cycle`. Half of the model is gone on average, and the mask tree shares half of what is left between the masks of a
    walk, so that single blocks cost about a quarter of that, heads apart. InputError if moves share a block.

    Sources: Shapley 1953; orders at random: Castro et al. 2009; early ends: Ghorbani and Zou 2019, arXiv 1904.02868,
    who count nothing for what is left; reversed orders: Mitchell et al. 2022, arXiv 2104.12199. What the deeper look
    at depth pruning (arXiv 2407.16286) calls Shapley is in `leave_one_out` and `coalitions`.
    """

    permutations: int = 64
    antithetic: bool = True
    truncation: float = 0.0
    stable: float = 0.0
    check: int = 8
    data: Literal["all", "cycle"] = "cycle"
    seed: int = 0

    title: ClassVar[str] = "Shapley value"
    source: ClassVar[str] = "Castro et al. 2009; Ghorbani and Zou 2019, arXiv 1904.02868"
    needs: ClassVar[Needs] = "forward passes"
    passes: ClassVar[str] = "2 + permutations x (m - 1), each on one micro-batch (data=all: on all)"
    moves: ClassVar[str] = "all that share no block"

    def __post_init__(self) -> None:
        right = {
            "permutations": self.permutations >= 1,
            "truncation": 0 <= self.truncation < 1,
            "stable": 0 <= self.stable <= 1,
            "check": self.check >= 1,
        }
        for name in (name for name, good in right.items() if not good):
            raise InputError(
                f"shapley: {name}={getattr(self, name)} is out of range",
                fix="permutations and check from 1, truncation from 0 to below 1, stable from 0 to 1",
            )

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        if not moves:
            return {}
        game = Game(lab, tuple(moves))
        samples = _samples(game, together=self.data == "all")
        draws: list[list[float]] = []
        ranking, agreed = None, 0
        for first in range(0, self._draws, self.check):
            draws += self._play(game, samples, range(first, min(first + self.check, self._draws)))
            means = map(_mean, zip(*draws, strict=True))
            before, ranking = ranking, [mean if math.isfinite(mean) else math.inf for mean in means]
            agreed = agreed + 1 if before and spearman(before, ranking) >= self.stable else 0
            if self.stable and agreed == 2:
                break
        columns = zip(moves, zip(*draws, strict=True), strict=True)
        return {move: _score(column, lab.evaluations.objective.unit) for move, column in columns}

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        """An upper bound: without what masks that are met again, smaller models, early ends and the mask tree save."""
        Game(lab, tuple(moves))
        orders = self._draws * (1 + self.antithetic)
        share = 1 if self.data == "all" else lab.evaluations.objective.batches
        return 2 + orders * max(0, len(moves) - 1) / share

    @property
    def _draws(self) -> int:
        return -(-self.permutations // 2) if self.antithetic else self.permutations

    def _play(self, game: Game, among: Sequence[_Sample], draws: range) -> list[list[float]]:
        """What each draw says of each player, in order; see `_mean`."""
        samples = {draw: self._sample(among, draw) for draw in draws}
        walks = {draw: self._walks(game, sample, draw) for draw, sample in samples.items()}
        message = f"orders of draws {draws.start + 1} to {draws.stop} of {self._draws}"
        stride = STRIDE if self.truncation else len(game.moves)
        for sample in dict.fromkeys(samples.values()):
            # Draws on the same data go together, so that their masks share prefixes.
            mine = [walk for draw in draws if samples[draw] is sample for walk in walks[draw]]
            while wanted := [gone for walk in mine for gone in walk.ahead(stride)]:
                losses = game.losses(wanted, sample.batches, message)
                for walk in mine:
                    walk.extend([losses[gone] for gone in walk.ahead(stride)])
        return [self._draw(samples[draw].weight, walks[draw]) for draw in draws]

    def _sample(self, among: Sequence[_Sample], draw: int) -> _Sample:
        """All in turn, every cycle in an order of its own, so that each draw may fall on any."""
        cycle, place = divmod(draw, len(among))
        return among[shuffled(len(among), self.seed, "cycle", cycle)[place]]

    def _walks(self, game: Game, sample: _Sample, draw: int) -> list[Walk]:
        order = shuffled(len(game.moves), self.seed, draw)
        rise = abs(sample.empty - sample.dense)
        near = self.truncation * rise if math.isfinite(rise) else 0.0
        orders = (order, order[::-1]) if self.antithetic else (order,)
        return [Walk(order, [sample.dense], sample.empty, near) for order in orders]

    def _draw(self, weight: float, walks: Sequence[Walk]) -> list[float]:
        rises = [walk.marginals() for walk in walks]
        return [weight * _mean([rise[player] for rise in rises]) for player in range(len(rises[0]))]


def _samples(game: Game, *, together: bool) -> list[_Sample]:
    """All micro-batches as one sample, or each by itself."""
    none, everyone = frozenset[int](), frozenset(range(len(game.moves)))
    groups = [tuple(game.batches)] if together else [(batch,) for batch in game.batches]
    ends = [game.losses([none, everyone], group, "no move, and all moves") for group in groups]
    units = [sum(game.units(batch, none) for batch in group) for group in groups]
    return [
        _Sample(group, count / fmean(units), end[none], end[everyone])
        for group, count, end in zip(groups, units, ends, strict=True)
    ]


def _score(values: Sequence[float], unit: str) -> Estimate | None:
    return estimate(_defined(values), unit) if math.isfinite(_mean(values)) else None


def _defined(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Iterable[float]) -> float:
    """The mean of those that say something: infinite if one of them is, NaN if none does."""
    defined = _defined(values)
    if not all(map(math.isfinite, defined)):
        return math.inf
    return math.fsum(value / len(defined) for value in defined) if defined else math.nan
