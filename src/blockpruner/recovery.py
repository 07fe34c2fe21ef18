"""What a recovery promises: a repair of a pruned model, what it adds, and the record of what it did."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Mask
from blockpruner.searching import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.examples import Examples
    from blockpruner.gaps import Repair
    from blockpruner.parts import Anatomy


@dataclass(frozen=True)
class Bench:
    """All that a recovery may look at.

    model: the dense one, which is only borrowed; mask: the blocks that are gone; examples: to fit on; held_out: others,
    by which choices are made; force: repair also what gets worse by it; progress: called with (done, total, message).
    """

    model: "PreTrainedModel"
    anatomy: "Anatomy"
    mask: Mask
    examples: "Examples"
    held_out: "Examples"
    force: bool = False
    progress: Progress | None = None

    def report(self, done: int, total: int, message: str) -> None:
        if self.progress is not None:
            self.progress(done, total, message)


class GapRecord(Record):
    """What was done at one gap.

    removed: the blocks that were there; place: where, or what changed; added_parameters; settings: as chosen;
    error: mean square, on held-out text, of what is still missing, beside that of all that was missing before (0 is
    perfect, 1 is as without); applied: whether it is part of the repair; reason: why not.
    """

    removed: str
    place: str
    added_parameters: int
    settings: dict[str, str | int | float]
    error: float | None
    applied: bool
    reason: str = ""


class RecoveryRecord(Artifact):
    """What a recovery did to a model without the blocks of `removed`, and what that was worth.

    method: as on the command line; examples, held_out: fingerprints; tokens: that were fitted on, and held out; dense,
    pruned, recovered: losses on the held-out examples, None where the model has none or it is not finite; choices were
    made by that same text, so what is reported of a recovery is to be measured on yet other text;
    recovered_share: of the increase of the loss that is won back, 0 to 1; applied: whether the repair is used; reason:
    why not.
    """

    FORMAT: ClassVar[str] = "blockpruner.recovery"
    VERSION: ClassVar[int] = 1

    method: str
    removed: str
    examples: str
    held_out: str
    tokens: tuple[int, int]
    gaps: tuple[GapRecord, ...]
    added_parameters: int
    dense: Estimate | None
    pruned: Estimate | None
    recovered: Estimate | None
    recovered_share: float | None
    applied: bool
    reason: str = ""


class Recovery(Protocol):
    """A way to win back quality: a frozen dataclass, its fields the options of the method, one file in `recoveries/`.

    title, source: its name and paper; needs: what it takes, in words; passes: its cost over the examples, in words
    (n gaps, L layers).
    """

    title: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]
    passes: ClassVar[str]

    def added_parameters(self, inputs: int, outputs: int) -> int:
        """How many parameters it adds for one removed block between streams of these widths."""
        ...

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        """The repair of the model without `bench.mask`, and what was done at each gap, in the order of depth.

        InputError where the method is not defined for the model or its numbers. Deterministic.
        """
        ...
