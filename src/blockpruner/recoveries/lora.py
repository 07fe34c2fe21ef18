"""LoRA on what is left of a pruned model, merged when it is done."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.errors import InputError
from blockpruner.repairs.recovery import Bench, GapRecord, Trained, check_taught

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Lora(Trained):
    """W + alpha/rank B A for the projections W of the blocks that are left; A, B trained, merged into W at the end.

    targets: `all` linear projections in blocks, or some, joined by +: `attention`, `mlp` and other kinds of blocks, or
    names of projections (`q_proj+v_proj`); experts that are stacked in one tensor are none, and the record names the
    kinds of blocks that have none. dropout: of what goes into A; the model's own stays off. loss: `lm`, or `kl` from
    the dense model's predictions, at `temperature`, or `fisher`, that to second order and without logits. hidden and
    vocabulary: see `distill`. maps: train what earlier methods put into gaps as well, as it is, without factors. Dense
    model and pruned one are the same weights, with LoRA off and the blocks put back, so there is no second copy.
    Merging adds no parameters.

    The defaults are Shortened LLaMA's: rank 8, alpha 16, dropout 0.05, AdamW at 1e-4 with 100 steps of warm-up and a
    linear decay, 64 windows a step, 4 at a time, 2 epochs, the best state by held-out loss. Its retraining is
    `--method lora:evaluate_every=100,patience=0 --calibration tatsu-lab/alpaca --column text --window
    256 --tokens all`; what we do otherwise:

    - text: Stanford's alpaca, packed into windows, all of whose tokens are predicted; there the cleaned copy of it, a
      row for each instruction, cut at 256 tokens, of which the response alone counts;
    - held out: the last fifth of the text; there 2,000 rows;
    - warm-up: a tenth of the steps at most, for short runs. With few tokens, take fewer windows a step and a larger lr;
    - precision: A and B in float32 whatever the model is, and merged into its own dtype; there float16 throughout.
    """

    epochs: float = 2.0
    accumulate: int = 16
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str = "all"
    loss: Literal["lm", "kl", "fisher"] = "lm"
    temperature: float = 1.0
    hidden: float = 0.0
    vocabulary: int = 0
    maps: bool = False

    title: ClassVar[str] = "LoRA"
    source: ClassVar[str] = "Hu et al. 2021; Shortened LLaMA, Kim et al. 2024, arXiv 2402.02834"
    needs: ClassVar[str] = "backward passes"
    passes: ClassVar[str] = "2 backward, 2 to 4 forward"
    package: ClassVar[str] = "peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise InputError(
                f"there is no LoRA with rank={self.rank}, alpha={self.alpha} and dropout={self.dropout}",
                fix="give a rank of 1 or more, alpha above 0, and dropout from 0 to below 1",
            )
        check_taught(self.loss, self.temperature, self.hidden, self.vocabulary)

    def numbers(self, bench: Bench) -> int:
        from blockpruner.repairs.factors import lora_targets

        found = lora_targets(bench.model, bench.anatomy, bench.mask, self.targets)
        maps = bench.start.added_parameters if self.maps else 0
        return maps + sum(self.rank * sum(module.weight.shape) for module in found.values())

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.factors import train_lora
        from blockpruner.repairs.taught import Taught

        shape = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        taught = Taught(self.loss, self.temperature, self.hidden, self.vocabulary)
        return train_lora(bench, self, shape, self.targets, taught, maps=self.maps)
