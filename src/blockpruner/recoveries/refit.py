"""The last projections of the blocks that are left, fitted anew to the dense model's stream in closed form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.errors import InputError
from blockpruner.repairs.recovery import Bench, GapRecord, walks

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Refit:
    """W + D for the last projection W of every block behind the first gap; adds no parameters, no training.

    D brings the stream behind the block nearest to the dense model's, in least squares over tokens, block by block in
    the order of depth: what is left makes up for what is gone, with the features that it has. Best behind a method that
    fills the gaps (`linear:target=dense,refit`), whose maps are fitted anew in their turn. A block with which held-out
    text is worse off stays as it is, and so does one that an earlier method changed to make up for the gap behind it.
    ridge: penalty on |D|^2 beside the mean variance of an entry of what goes into W; `auto` has held-out text choose,
    block by block. sinks: see `linear`.
    """

    ridge: float | Literal["auto"] = "auto"
    sinks: float = 0.0

    title: ClassVar[str] = "Kept blocks fitted anew"
    source: ClassVar[str] = (
        "least squares reconstruction, as He, Zhang and Sun 2017, arXiv 1707.06168, do for channels: ours for depth"
    )
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "2 to 8 forward; 2 per block with several stacks"

    def __post_init__(self) -> None:
        if (self.ridge != "auto" and not self.ridge >= 0) or not 0 <= self.sinks <= 1:
            raise InputError(
                f"nothing can be fitted with ridge={self.ridge} and sinks={self.sinks}",
                fix="give a ridge of 0 or more, or auto, and sinks of 0 to 1",
            )

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return 0

    def price(self, bench: Bench) -> str:
        stacks, blocks = bench.anatomy.stacks, bench.anatomy.outline.blocks
        first = next((number for number, block in enumerate(blocks) if block in bench.mask), len(blocks))
        count = sum(block not in bench.mask for block in blocks[first:])
        passes = 2 + 3 * count / len(stacks[0].layers) if len(stacks) == 1 else 2 * count
        return walks(bench, count, "block", round(passes, 1))

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.refitting import refit_kept

        return refit_kept(bench, self.ridge, self.sinks)
