"""How far the logits move away from those of the whole model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.measuring import PerRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogitDistance(PerRow):
    """Mean Euclidean distance between the logits of the whole model and of the pruned one, per window.

    d = || z_whole - z_pruned ||_2 over the vocabulary, at every predicted token. Unlike a divergence it also sees a
    constant added to all logits, which changes no prediction. Costs what `kl` costs.
    """

    title: ClassVar[str] = "Distance of logits to the whole model"
    source: ClassVar[str] = "Siddiqui et al. 2024 (A deeper look at depth pruning), arXiv 2407.16286"
    unit: ClassVar[str] = "logits"

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import distances

        assert whole is not None
        return distances(whole, found)
