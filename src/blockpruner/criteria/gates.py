"""Learned gates: which blocks the loss misses most, when each may be turned down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab, Needs
from blockpruner.searching.contract import Scores


@dataclass(frozen=True)
class Gates:
    """The probability, 0 to 1, that the gate of a move is open once gates are learned on frozen weights.

    Each move has one gate, which its blocks' outputs are multiplied with. Minimised is the loss of the examples, in
    nats, plus `sparsity` (nats) times the expected share of open gates, by Adam on the logit of each gate: a move
    stays open if what it adds is worth more than sparsity / number of moves. One step takes one example.

    kind: hard-concrete gates (stretched to -0.1 .. 1.1 and cut, temperature 2/3), or gates drawn 0 or 1 whose gradient
    is taken for that of their probability. steps, rate: of Adam; noise is drawn from (seed, step) alone.
    The probability grows with the logit and is kept to 16 digits, so ties are rare: gates that were given the very same
    gradients. One run of one optimiser has no spread over examples, so there is no standard error. Which moves' gates
    end up shut is noted as `gates shut ...` beside the scores. Memory: what a pass over one example keeps.
    """

    steps: int = 200
    rate: float = 0.1
    sparsity: float = 1.0
    kind: Literal["hard-concrete", "straight-through"] = "hard-concrete"
    seed: int = 0

    title: ClassVar[str] = "Learned gates"
    source: ClassVar[str] = "Louizos et al. 2018 (L0 regularisation), arXiv 1712.01312; one gate per move: ours"
    needs: ClassVar[Needs] = "backward passes"
    passes: ClassVar[str] = "1 forward, 1 backward of one example per step"
    moves: ClassVar[str] = "any"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0 or self.sparsity < 0:
            raise InputError(
                f"gates cannot be learned with steps={self.steps}, rate={self.rate}, sparsity={self.sparsity}",
                fix="give at least one step, a rate above 0, and a sparsity of 0 or more",
            )

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        from blockpruner.importance.gating import GATES, learned, shut

        logits = learned(lab, moves, self)
        shut(lab, moves, self, logits)
        reason = "gates are learned on all examples together, once"
        return {
            move: Estimate(
                value=value, stderr=None, n=len(lab.examples), unit="probability of an open gate", reason=reason
            )
            for move, value in zip(moves, GATES[self.kind].openness(logits).tolist(), strict=True)
        }

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        from blockpruner.importance.gradients import check_has_loss

        check_has_loss(lab.model, lab.examples)
        return 3.0 * self.steps / len(lab.examples)
