"""What a criterion promises: a score for every move, higher = keep."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Progress, Scores
from blockpruner.searching.evaluations import Evaluations, Notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.anatomy.parts import Anatomy
    from blockpruner.texts.examples import Examples

Needs = Literal["nothing", "weights", "forward passes", "backward passes"]


@dataclass(frozen=True)
class Lab:
    """All that a criterion may look at.

    evaluations: losses of masks on `examples`, by the objective of the run; notes: intermediate results that survive a
    kill; mask: what is gone already, so that scores are those of what is left; progress: called with (done, total,
    message).
    """

    model: "PreTrainedModel"
    anatomy: "Anatomy"
    examples: "Examples"
    evaluations: Evaluations
    notes: Notes = field(default_factory=Notes)
    mask: Mask = DENSE
    progress: Progress | None = None

    def report(self, done: int, total: int, message: str) -> None:
        if self.progress is not None:
            self.progress(done, total, message)


class Criterion(Protocol):
    """How important moves are: a frozen dataclass, its fields the options of the method, one file in `criteria/`.

    title, source: its name and paper; needs: the most that it does with the model; passes: its cost over the data, in
    words (m moves, L layers); moves: what it is defined for, in words.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[Needs]
    passes: ClassVar[str]
    moves: ClassVar[str]

    def scores(self, lab: Lab, moves: Sequence[Move]) -> Scores:
        """The score of each move on top of `lab.mask`, in their order; None where it is not a finite number.

        Higher = keep. An Estimate has a standard error over examples, or None and the reason why there is none.
        Deterministic: randomness comes from a seed among its options.
        """
        ...

    def cost(self, lab: Lab, moves: Sequence[Move]) -> float:
        """About how many forward passes over all examples it takes; a backward pass counts as two.

        InputError, as `scores` would say it, where the criterion is not defined for the model or for these moves.
        """
        ...


def run_of_blocks(lab: Lab, move: Move) -> tuple[int, int]:
    """The first and the last of the blocks of `move`, by their places among those left; nothing else lies between.

    InputError, naming the move, if something does, or if it is spread over stacks: then it has no state before and
    no state after it.
    """
    left = [block for block in lab.anatomy.outline.blocks if block not in lab.mask]
    places = sorted(left.index(block) for block in move.blocks)
    if places[-1] - places[0] + 1 != len(places) or len({block.stack for block in move.blocks}) > 1:
        raise InputError(
            f"the blocks of {move} do not follow each other, so there is no state before and after them",
            fix="use moves of single blocks, layers or spans with this criterion",
        )
    return places[0], places[-1]
