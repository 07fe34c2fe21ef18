"""A linear map of the stream in the place of a removed block, in closed form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.repairs.recovery import Bench, GapRecord, count_gaps, looks, walks

if TYPE_CHECKING:
    from blockpruner.repairs.closed_form import ClosedForm
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Linear:
    """x A + b, with the least square error, at all tokens, beside what is missing; no training.

    rank: of A at most, the best of that rank in the metric of the outputs; 0 is full. regressor: x is the block's own
    normed `input`, or the `stream`; `auto` takes what has the smaller error on held-out text, block by block. ridge:
    penalty on |A|^2 beside the median variance of an entry of x, more where an entry varies more; `auto` has held-out
    text choose. sinks: the weight of the first position of every row. target: what the `block` would add to the pruned
    model's stream, or what brings that to the `dense` model's stream behind the block.
    """

    rank: int = 0
    regressor: Literal["auto", "input", "stream"] = "auto"
    ridge: float | Literal["auto"] = "auto"
    sinks: float = 0.0
    target: Literal["block", "dense"] = "block"

    title: ClassVar[str] = "Linear map in closed form"
    source: ClassVar[str] = "ridge and reduced-rank regression (Izenman 1975), per removed block: ours"
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "1 to 2 forward; 2 to 4 with target=dense"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return outputs + (self.rank * (inputs + outputs) if self.rank else inputs * outputs)

    def form(self) -> "ClosedForm":
        """How each gap is filled."""
        from blockpruner.repairs.closed_form import ClosedForm

        return ClosedForm(self.regressor, self.rank, self.ridge, self.sinks, self.target)

    def price(self, bench: Bench) -> str:
        models = 2 if self.target == "dense" else 1
        return walks(bench, count := count_gaps(bench), "gap", looks(bench, count, models))

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.closed_form import fill_gaps

        return fill_gaps(bench, self.form())
