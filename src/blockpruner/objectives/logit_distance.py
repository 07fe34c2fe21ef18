"""How far the logits move away from those of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.measuring import row_means

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogitDistance:
    """Mean Euclidean distance between the logits of the whole model and of the pruned one, per window.

    d = || z_whole - z_pruned ||_2 over the vocabulary, at every predicted token. Unlike a divergence it also sees a
    constant added to all logits, which changes no prediction. Costs what `kl` costs.
    """

    title: ClassVar[str] = "Distance of logits to the whole model"
    source: ClassVar[str] = "Siddiqui et al. 2024 (A deeper look at depth pruning), arXiv 2407.16286"
    unit: ClassVar[str] = "logits"
    reads: ClassVar[Literal["text", "items"]] = "text"
    of: ClassVar[Literal["logits", "states"]] = "logits"
    compares: ClassVar[bool] = True

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import distances

        assert whole is not None
        return distances(whole, found)

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        return row_means(sums, counts)
