"""What a recovery promises: a repair of a pruned model, what it adds, and the record of what it did."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.searching.contract import Progress
from blockpruner.searching.costs import readable_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.anatomy.parts import Anatomy
    from blockpruner.surgery.gaps import Repair
    from blockpruner.texts.examples import Examples


def _unrepaired() -> "Repair":
    from blockpruner.surgery.gaps import UNREPAIRED

    return UNREPAIRED


@dataclass(frozen=True)
class Bench:
    """All that a recovery may look at.

    model: the dense one, which is only borrowed; mask: the blocks that are gone; examples: to fit on; held_out: others,
    by which choices are made; force: repair also what gets worse by it; progress: called with (done, total, message);
    start: what earlier methods of a chain have made, which the repair contains and goes on from; folder: for the
    checkpoints of what is trained, None keeps none.
    """

    model: "PreTrainedModel"
    anatomy: "Anatomy"
    mask: Mask
    examples: "Examples"
    held_out: "Examples"
    force: bool = False
    progress: Progress | None = None
    start: "Repair" = field(default_factory=_unrepaired)
    folder: Path | None = None

    @property
    def width(self) -> int:
        """Of the stream."""
        return stream_width(self.model)

    def report(self, done: int, total: int, message: str) -> None:
        if self.progress is not None:
            self.progress(done, total, message)


class Judged(Record):
    """The loss on held-out examples after so many steps of training; None: not finite.

    In nats per predicted token; of `mlp` and `streamline`, what is missing of states, as their classes say.
    """

    step: int
    loss: float | None


class GapRecord(Record):
    """What was done at one gap, or to what else `place` says.

    removed: the blocks that were there, empty where a block that is left was fitted anew; place: where, or what
    changed; added_parameters; settings: as chosen; error: mean square, on held-out text, of what is still missing,
    beside that of all that was missing before (0 is perfect, 1 is as without; `mlp` weighs channels, so that its errors
    stand beside its own alone); applied: whether it is part of the repair; reason: why not; curve: of what was trained,
    for all gaps that were trained together.
    """

    removed: str
    place: str
    added_parameters: int
    settings: dict[str, str | int | float]
    error: float | None
    applied: bool
    reason: str = ""
    curve: tuple[Judged, ...] = ()


class StepRecord(Record):
    """What one method of a chain did. recovered: the loss on the held-out examples with it and all before it;
    applied: whether the repair has it; reason: why not."""

    method: str
    gaps: tuple[GapRecord, ...]
    recovered: Estimate | None
    applied: bool
    reason: str = ""


class RecoveryRecord(Artifact):
    """What a chain of recoveries did to a model without the blocks of `removed`, and what that was worth.

    method: as on the command line; examples, held_out: fingerprints; seen: both texts as `overlap.sketch` has them;
    tokens: that were fitted on, and held out; dense, pruned, recovered: losses on the held-out examples, None where the
    model has none or it is not finite; choices were made by that same text, so what is reported of a recovery is to be
    measured on yet other text, and `evaluate` says where it is not; recovered_share: of the increase of the loss, what
    is won back (1: all of it, below 0: it is worse still), None where pruning made nothing worse; applied: whether
    anything of the repair is used; reason: why not. Version 1 was of one method.
    """

    FORMAT: ClassVar[str] = "blockpruner.recovery"
    VERSION: ClassVar[int] = 2

    method: str
    removed: str
    examples: str
    held_out: str
    seen: str = ""
    tokens: tuple[int, int]
    steps: tuple[StepRecord, ...]
    added_parameters: int
    dense: Estimate | None
    pruned: Estimate | None
    recovered: Estimate | None
    recovered_share: float | None
    applied: bool
    reason: str = ""

    @property
    def gaps(self) -> tuple[GapRecord, ...]:
        """Of all steps."""
        return tuple(gap for step in self.steps for gap in step.gaps)

    @classmethod
    def from_value(cls, value: object, source: str) -> Self:
        if isinstance(value, dict) and value.get("format") == cls.FORMAT and value.get("version") == 1:
            step = {key: value.get(key) for key in ("method", "gaps", "recovered", "applied", "reason")}
            rest = {key: part for key, part in value.items() if key != "gaps"}
            value = rest | {"version": cls.VERSION, "steps": [step]}
        return super().from_value(value, source)


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

    def price(self, bench: Bench) -> str:
        """What that takes at most on this bench, in words."""
        ...

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        """The repair of the model without `bench.mask`, and what was done at each gap, in the order of depth.

        It contains `bench.start`. InputError where the method is not defined for the model or its numbers.
        Deterministic.
        """
        ...


def count_gaps(bench: Bench) -> int:
    """How many places there are that something can stand in."""
    from blockpruner.surgery.gaps import gaps

    return len(gaps(bench.anatomy, bench.mask))


def looks(bench: Bench, count: int, models: int) -> float:
    """Forward passes that looks at `count` gaps take: led through layer by layer, or each by a pass up to its layer.

    models: 2 if the dense one is looked at as well.
    """
    stacks = bench.anatomy.stacks
    led = models + 1.5 * models * count / len(stacks[0].layers)
    return round(led if len(stacks) == 1 else models * count / 2, 1)


def walks(bench: Bench, count: int, place: str, passes: float) -> str:
    """The price of a closed form that takes so many forward passes in all, for `count` places."""
    fit, judged = (len(examples) * examples.tokens for examples in (bench.examples, bench.held_out))
    places, said = place if count == 1 else f"{place}s", f"{passes:g} forward pass{'' if passes == 1 else 'es'}"
    return f"{count} {places}: about {said} over {fit:,} + {judged:,} tokens"


def stream_width(model: "PreTrainedModel") -> int:
    """As the configuration has it, else that of what tokens are embedded in."""
    named = getattr(model.config.get_text_config(), "hidden_size", None)
    if named is None:
        embeddings: Any = model.get_input_embeddings()
        named = embeddings.weight.shape[-1]
    return int(named)


def states_held(bench: Bench) -> str:
    """What the states around a run take, in words: two streams on their way, and both sides of what stands there."""
    tokens = sum(examples.tokens * len(examples.targets) for examples in (bench.examples, bench.held_out))
    size = readable_bytes(4 * tokens * bench.width * bench.model.dtype.itemsize)
    return f"up to {size} of states in memory and on disk"


@dataclass(frozen=True)
class Trained:
    """The options that all trained recoveries share.

    epochs: times that all windows are seen; tokens: to train on in all, instead (0: by epochs). lr: the largest step of
    AdamW; it rises over `warmup` steps, a tenth of all at most, and falls by `schedule`; beta2, weight_decay: of AdamW,
    the latter of matrices alone, not of gains and biases. batch: windows in one pass; accumulate: passes in one step,
    whose loss is the mean over all their predicted tokens.
    clip: the largest norm of a gradient, 0 for none. evaluate_every: steps between looks at the held-out loss (0: ten
    times in all), the best of which is kept; patience: looks without a better one that end the training, 0 for no end.
    masters: what the trained numbers are summed in, float32 or the model's own dtype (`stored`). written: share of the
    windows that the dense model writes itself from their first tokens (`repairs.written`): new text for what a method
    before this one was fitted to. seed: of the order of the windows, of what is written, of random beginnings and of
    dropout.
    """

    tokens: int = 0
    epochs: float = 1.0
    lr: float = 1e-4
    batch: int = 4
    accumulate: int = 4
    warmup: int = 100
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 0
    patience: int = 3
    masters: Literal["float32", "stored"] = "float32"
    written: float = 0.0
    seed: int = 0

    whole: ClassVar[bool] = False  # whether all weights are trained, which are then a second copy of the dense model's
    package: ClassVar[str] = ""  # that it needs beside those of blockpruner itself
    restorable: ClassVar[bool] = True  # whether its checkpoints alone give back what it made
    teacher: ClassVar[bool] = False  # whether the dense model runs as well, where no option says so

    def __post_init__(self) -> None:
        least = {"tokens": 0, "batch": 1, "accumulate": 1, "warmup": 0, "evaluate_every": 0, "patience": 0, "seed": 0}
        wrong = [name for name, bound in least.items() if getattr(self, name) < bound]
        wrong += [name for name in ("weight_decay", "clip") if getattr(self, name) < 0]
        wrong += [name for name in ("lr", "epochs") if not getattr(self, name) > 0]
        wrong += [] if 0 < self.beta2 < 1 else ["beta2"]
        wrong += [] if 0 <= self.written <= 1 else ["written"]
        if wrong:
            raise InputError(
                f"nothing can be trained with {wrong[0]}={getattr(self, wrong[0])}",
                fix="give lr, epochs, batch and accumulate above 0, beta2 between 0 and 1, written from 0 to 1, and no "
                "negative number",
            )

    @property
    def taught(self) -> bool:
        """Whether the dense model runs beside the one that is trained."""
        return self.teacher or getattr(self, "loss", "lm") != "lm" or bool(getattr(self, "hidden", 0.0))

    @property
    def keeps_head(self) -> bool:
        """Whether the loss is one of states under the dense model's head, about which nothing is learnt then."""
        return getattr(self, "loss", "lm") == "fisher" or bool(getattr(self, "vocabulary", 0))

    def windows(self, held: int, tokens: int) -> int:
        """How many windows are seen in all, of `held` windows of so many tokens."""
        return max(1, -(-self.tokens // tokens) if self.tokens else round(self.epochs * held))

    def steps(self, held: int, tokens: int) -> int:
        """How many steps that makes."""
        return -(-self.windows(held, tokens) // (self.batch * self.accumulate))

    def looks(self, steps: int) -> list[int]:
        """The steps after which the held-out loss is looked at: 0, the last one and those between."""
        every = self.evaluate_every or max(1, -(-steps // 10))
        return sorted({0, steps, *range(0, steps, every)})

    def numbers(self, bench: Bench) -> int:
        """About how many numbers are trained: here all that are left."""
        gone = bench.anatomy.outline.removed_parameters(bench.mask)
        return bench.anatomy.total_parameters - gone + bench.start.added_parameters

    def price(self, bench: Bench) -> str:
        """What the training takes at most, in words: work, memory, and two checkpoints of all numbers and moments."""
        judged = len(bench.held_out) * bench.held_out.tokens
        each = 3 * (4 if self.masters == "float32" else bench.model.dtype.itemsize)
        disk = readable_bytes(2 * each * self.numbers(bench))
        effort = self.effort(len(bench.examples), bench.examples.tokens, judged)
        return f"{self.writing(bench)}{effort}, up to {disk} of checkpoints on disk"

    def writing(self, bench: Bench) -> str:
        """What the dense model writes first, in words."""
        held, tokens = len(bench.examples), bench.examples.tokens
        count = round(self.written * min(held, self.windows(held, tokens)))
        return f"{count:,} windows of {tokens} tokens written, " if count else ""

    def effort(self, held: int, tokens: int, judged: int) -> str:
        """What is computed on `held` windows of so many tokens, and copied; judged: held-out tokens."""
        windows, steps = self.windows(held, tokens), self.steps(held, tokens)
        said = f"{steps} steps, {windows * tokens:,} tokens forward and backward"
        beside = f", as many forward in the dense model, {self.copies}" if self.taught else f", {self.copies}"
        return f"{said}{beside}, {len(self.looks(steps))} times {judged:,} held-out tokens"

    @property
    def copies(self) -> str:
        """What is held beside one copy of the weights, in words."""
        more = "a second copy of the weights and AdamW's state of all of them"
        return more if self.whole else "no second copy of the weights"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return 0


def check_taught(loss: str, temperature: float, hidden: float, vocabulary: int) -> None:
    """InputError for what nothing can be taught with."""
    if not temperature > 0 or not hidden >= 0:
        raise InputError(
            f"nothing is taught with temperature={temperature} and hidden={hidden}",
            fix="give a temperature above 0, and hidden of 0 or more",
        )
    if loss == "fisher" and (hidden or temperature != 1):
        raise InputError("loss=fisher has no temperature and no hidden states beside it", fix="leave them out")
    if vocabulary < 0 or vocabulary == 1 or (vocabulary and (loss != "kl" or hidden)):
        raise InputError(
            f"no loss={loss} with hidden={hidden} is estimated from vocabulary={vocabulary}",
            fix="write loss=kl,vocabulary=16384, or leave vocabulary out",
        )
