"""A small linear map in the place of each removed block, trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.errors import InputError
from blockpruner.repairs.recovery import Bench, GapRecord, Trained, count_gaps, looks, walks

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Adapter(Trained):
    """x U V + b in the place of each block, trained together with all else frozen.

    rank: of U V, 0 for one full matrix. loss: `block`, the square of what is missing of the block's update beside that
    update, on the states of the pruned model as it is recovered; `kl`, the divergence of the predictions from the dense
    model's, at `temperature`; `fisher`, that to second order and without logits; `lm`, the language-modelling loss.
    init: `linear`, the closed form of that rank; `zero`, V = 0, so that training begins at plain removal. What stands
    in a gap already is trained on as it is.

    The teacher is the same weights with the blocks put back, so there is no second copy. The paper compares constant
    updates with such learned maps under these losses; its rank, optimiser and amounts are not known, so those are ours.
    """

    lr: float = 1e-3
    rank: int = 64
    loss: Literal["block", "kl", "fisher", "lm"] = "kl"
    init: Literal["linear", "zero"] = "linear"
    temperature: float = 1.0

    title: ClassVar[str] = "Trained low-rank map"
    source: ClassVar[str] = "Siddiqui et al. 2024, arXiv 2407.16286 (settings ours)"
    needs: ClassVar[str] = "backward passes"
    passes: ClassVar[str] = "1 backward, 1 to 2 forward per epoch; n/2 forward with loss=block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or not self.temperature > 0:
            raise InputError(
                f"no map is trained with rank={self.rank} and temperature={self.temperature}",
                fix="give a rank of 0 or more and a temperature above 0",
            )

    def numbers(self, bench: Bench) -> int:
        width = bench.width
        return count_gaps(bench) * self.added_parameters(width, width)

    def price(self, bench: Bench) -> str:
        count = count_gaps(bench)
        begin = f"{walks(bench, count, 'gap', looks(bench, count, 1))}, then " if self.init == "linear" else ""
        return begin + super().price(bench)

    def effort(self, held: int, tokens: int, judged: int) -> str:
        if self.loss != "block":
            return super().effort(held, tokens, judged)
        windows, steps = self.windows(held, tokens), self.steps(held, tokens)
        each = f"{windows * tokens:,} tokens forward, up to the layer of each gap"
        return f"{steps} steps, {each}, {self.copies}, {len(self.looks(steps))} times {judged:,} held-out tokens"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return outputs + (self.rank * (inputs + outputs) if self.rank else inputs * outputs)

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.adapters import train_adapters

        return train_adapters(bench, self, self.rank, self.init, self.loss, self.temperature)
