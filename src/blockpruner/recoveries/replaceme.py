"""ReplaceMe: removed blocks made up for by the block before them, at no cost in parameters."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.repairs.recovery import Bench, GapRecord, walks

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class ReplaceMe:
    """A linear map of what the block before a run of removed ones adds, folded into its last projection.

    With m what that block adds and d what the run would have: m (I + B) is nearest to m + d in least squares. The paper
    cuts one run of layers behind an mlp; here every run of a plan has its map, behind an attention block as well.
    ridge: penalty on |B|^2 (the paper: on |I + B|^2, 0), see `linear`; `auto` has held-out text choose. sinks, target:
    see `linear`. InputError where nothing can be folded (`folding.foldable` says why).

    In a chain: what a method after it would map of a block's own update has been made up for here, so that `bias`,
    `linear` and `adapter:loss=block` leave those gaps alone and fill the others. `linear:target=dense`, `span` and this
    with target=dense fit what is still missing to the dense model's stream. A run in which something stands already is
    not folded.
    """

    ridge: float | Literal["auto"] = "auto"
    sinks: float = 0.0
    target: Literal["block", "dense"] = "block"

    title: ClassVar[str] = "ReplaceMe"
    source: ClassVar[str] = "Shopkhoev et al. 2025, arXiv 2505.02819 (least squares)"
    needs: ClassVar[str] = "forward passes"
    passes: ClassVar[str] = "2n forward, n runs"

    def added_parameters(self, inputs: int, outputs: int) -> int:
        return 0

    def price(self, bench: Bench) -> str:
        from blockpruner.repairs.folded_runs import runs

        return walks(bench, count := len(runs(bench.anatomy, bench.mask)), "run", 2 * count)

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.folded_runs import fold_runs

        return fold_runs(bench, self.ridge, self.sinks, self.target)
