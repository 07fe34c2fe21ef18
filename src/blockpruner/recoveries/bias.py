"""The mean update of a removed block, as a constant in its place."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.repairs.recovery import Bench, GapRecord, count_gaps, looks, walks

if TYPE_CHECKING:
    from blockpruner.repairs.closed_form import ClosedForm
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Bias:
    """Every token is given the mean, over tokens, of what the block would have added to the pruned model's stream.

    sinks: the weight of the first position of every row in that mean. The mean is the constant of the least square
    error. A gap whose error on held-out text does not become smaller stays empty.
    """

    sinks: float = 0.0

    title: ClassVar[str] = "Mean update"
    source: ClassVar[str] = "Siddiqui et al. 2024, arXiv 2407.16286 (there of the dense model)"
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "1 to 2 forward"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return outputs

    def form(self) -> "ClosedForm":
        """How each gap is filled."""
        from blockpruner.repairs.closed_form import ClosedForm

        return ClosedForm("nothing", sinks=self.sinks)

    def price(self, bench: Bench) -> str:
        return walks(bench, count := count_gaps(bench), "gap", looks(bench, count, 1))

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.closed_form import fill_gaps

        return fill_gaps(bench, self.form())
