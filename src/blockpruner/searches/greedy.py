"""Greedy removal that looks longer only where the decision is close."""

from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Move
from blockpruner.searching.contract import DENSE, Chosen, Problem, Proposals, Values, lowest
from blockpruner.searching.racing import Earlier, Race

STREAMED = 4.0  # `growth` where every look reads all weights: at 32,768 tokens fewer than four a step (docs/scale.md)
STEPS = 4  # back, for which values are held: what came before is in the estimates of these


@dataclass(frozen=True)
class Greedy:
    """At every step the remaining moves race, and the winner goes; the last mask is evaluated on everything.

    With probability at least 1 - delta per step the move that goes is within epsilon (nats per token, for the loss) of
    the best there is at that step, by the mean over the calibration windows; see `racing`. What each move did at the
    steps before serves to tell what it does now. Losses that are not finite never win; nothing is ever put back.

    growth: see `Race`; where weights are streamed it is STREAMED unless named, since every look reads them all again.

    Losses and scores have as n the pieces that a move was seen on; ties are the moves that it was not shown to beat.

    Cost: as many masks as `exhaustive`, most of them on a part of the data.
    """

    epsilon: float = 0.003
    delta: float = 0.05
    seed: int = 0
    growth: float = 1.25

    title: ClassVar[str] = "Greedy with races"
    source: ClassVar[str] = "BlockPruner's loop; races after Maron and Moore 1993, two-phase sampling after Neyman 1938"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Race(self.epsilon, self.delta, self.seed, self.growth)

    def propose(self, problem: Problem) -> Proposals:
        race = Race(self.epsilon, self.delta, self.seed, self.growth)
        mask, steps, past = DENSE, 0, list[dict[Move, Values]]()
        while not problem.reached(mask, steps):
            moves = {mask | move.blocks: move for move in reversed(problem.moves(mask))}
            moves = dict(reversed(moves.items()))  # in tie order, and of moves that lead to the same mask the first
            before: Earlier = [{gone: seen[m] for gone, m in moves.items() if m in seen} for seen in past]
            outcome = yield from race.run(problem, tuple(moves), before=before)
            scores = {move: outcome.estimates[gone] for gone, move in moves.items()}
            mask = outcome.kept[0] if outcome.kept else mask | lowest(scores).blocks  # which fails, and says why
            past = [{move: outcome.values[gone] for gone, move in moves.items()}, *past[: STEPS - 1]]
            steps += 1
            if problem.reached(mask, steps):
                losses = yield (mask,)
                lowest({moves[mask]: losses[mask]})  # fails if it is not finite on everything
            best, ties = moves[mask], tuple(moves[tie] for tie in outcome.ties)
            yield Chosen(best, scores, ties, scores[best])

    def evaluations(self, problem: Problem) -> int:
        """As `exhaustive`: exact for single blocks and whole layers up to a number of them, else an upper bound."""
        moves, steps = len(problem.moves(DENSE)), problem.most_steps()
        return steps * moves - steps * (steps - 1) // 2
