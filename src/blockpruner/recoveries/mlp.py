"""A linear map and a small gated MLP in the place of each run of removed blocks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.errors import InputError
from blockpruner.repairs.recovery import Bench, GapRecord, Trained, looks, states_held, walks
from blockpruner.searching.costs import readable_bytes

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Mlp(Trained):
    """x A + b + (act(n G + g) * (n U + u)) D for each run of blocks, n being x at root mean square one.

    It takes the stream before the run to the dense model's behind it: A in closed form, from the stream as in
    `linear:target=dense`, then the MLP on what A leaves, by AdamW on states that were read once, so that no pass goes
    backward through the model. It begins with those neurons of the run's own MLPs that tell most of what is missing,
    and has their activation; where none are known, with random ones and SiLU. The loss is the mean
    square of what is missing of each channel beside that channel's variance in the dense model's stream, and so is the
    error of the record. neurons: of each MLP; 0 takes (k - 1) d / 3 for a run of k blocks in a stream of width d, so
    that a run adds as many parameters as a full-rank map for each of its blocks. A single block is left to the linear
    map. batch counts windows' worth of tokens, mixed from short windows.

    The paper has an MLP (or a layer) in the place of one run of whole layers, of the size of the model's own and with
    no linear map beside it, and takes the plain mean square. Runs here are of blocks, there may be many, and each is
    fitted on the model with those before it.
    """

    epochs: float = 6.0
    lr: float = 2e-3
    batch: int = 2
    accumulate: int = 1
    weight_decay: float = 0.1
    neurons: int = 0

    title: ClassVar[str] = "Small gated MLP for a run of blocks"
    source: ClassVar[str] = "after LLM-Streamline, Chen et al. 2024, arXiv 2403.19135 (differences: see the class)"
    needs: ClassVar[str] = "forward passes, and training on states"
    passes: ClassVar[str] = "2 to 3 forward; 2 per run with several stacks"
    restorable: ClassVar[bool] = False  # without the states there is nothing to go on with

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 0:
            raise InputError(f"there is no MLP of {self.neurons} neurons", fix="give 1 or more, or 0 for the usual")

    def numbers(self, bench: Bench) -> int:
        from blockpruner.repairs.run_mlps import neurons_of
        from blockpruner.repairs.run_states import runs_to_fill

        width = bench.width
        counts = [neurons_of(run, self.neurons, width) for run in runs_to_fill(bench.anatomy, bench.mask)]
        return sum(neurons * (3 * width + 2) + width for neurons in counts if neurons)

    def price(self, bench: Bench) -> str:
        from blockpruner.repairs.run_states import runs_to_fill

        runs = runs_to_fill(bench.anatomy, bench.mask)
        read = (
            f"{self.writing(bench)}{walks(bench, len(runs), 'run', looks(bench, len(runs), 2))}, {states_held(bench)}"
        )
        if not (numbers := self.numbers(bench)):
            return read
        several = sum(len(run.blocks) > 1 for run in runs)
        steps = self.steps(len(bench.examples), bench.examples.tokens)
        disk = readable_bytes(24 * numbers)
        return f"{read}, {steps:,} steps on the states of {several} of them, up to {disk} of checkpoints on disk"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return outputs + inputs * outputs  # of a single block; see `neurons` for runs

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.run_mlps import fill_runs

        return fill_runs(bench, self, self.neurons)
