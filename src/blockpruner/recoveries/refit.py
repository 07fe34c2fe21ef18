"""The last projections of the blocks that are left, fitted anew to the dense model's stream in closed form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.repairs.recovery import Bench, GapRecord, walks

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Refit:
    """W + D for the last projection W of every block behind the first gap; adds no parameters, no training.

    D brings the stream behind the block nearest to the dense model's, in least squares over tokens, block by block in
    the order of depth: what is left makes up for what is gone, with the features that it has. Best behind a method that
    fills the gaps (`linear:target=dense,refit`). ridge: penalty on |D|^2 beside the mean variance of an entry of what
    goes into W; `auto` has held-out text choose for each output by itself. sinks: see `linear`.
    """

    ridge: float | Literal["auto"] = "auto"
    sinks: float = 0.0

    title: ClassVar[str] = "Kept blocks fitted anew"
    source: ClassVar[str] = (
        "least squares reconstruction, as He, Zhang and Sun 2017, arXiv 1707.06168, do for channels: ours for depth"
    )
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "about 6 forward"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return 0

    def price(self, bench: Bench) -> str:
        return walks(bench, len(bench.anatomy.outline.blocks) - len(bench.mask), "block", 6)

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.refitting import refit_kept

        return refit_kept(bench, self.ridge, self.sinks)
