"""A run of removed layers made up for by one linear map of the stream."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.repairs.recovery import Bench, GapRecord, looks, states_held, walks

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Span:
    """In the place of layers that follow each other and are all gone: one map of the stream, x + x A + b.

    It is nearest, in least squares over tokens, to the dense model's stream behind the run, from the pruned model's own
    stream before it. rank, regressor, ridge, sinks: see `linear`. Blocks that left alone are not touched. The paper
    puts one trained layer there.
    """

    rank: int = 0
    regressor: Literal["auto", "input", "stream"] = "auto"
    ridge: float | Literal["auto"] = "auto"
    sinks: float = 0.0

    title: ClassVar[str] = "One linear map for a run of layers"
    source: ClassVar[str] = (
        "after LLM-Streamline, Chen et al. 2024, arXiv 2403.19135 (there trained); ours in closed form"
    )
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "2 to 3 forward; 2 per run with several stacks"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return outputs + (self.rank * (inputs + outputs) if self.rank else inputs * outputs)

    def price(self, bench: Bench) -> str:
        from blockpruner.repairs.spans import spans

        count = len(spans(bench.anatomy, bench.mask))
        return f"{walks(bench, count, 'run', looks(bench, count, 2))}, {states_held(bench)}"

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.closed_form import ClosedForm
        from blockpruner.repairs.span_maps import fill_spans

        return fill_spans(bench, ClosedForm(self.regressor, self.rank, self.ridge, self.sinks, "dense"))
