"""How far the predictions move away from those of the whole model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.measuring import PerRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KL(PerRow):
    """Mean Kullback-Leibler divergence from the whole model's prediction P to the pruned one's Q, per window.

    KL(P || Q) = sum over tokens v of P(v) (log P(v) - log Q(v)), at every predicted token. Zero for the whole model.
    Beside a loss it needs the whole model's logits: one more head pass for every eight masks.
    """

    title: ClassVar[str] = "Kullback-Leibler divergence to the whole model"
    source: ClassVar[str] = "Sieberling et al. 2024 (EvoPress), arXiv 2410.14649"
    unit: ClassVar[str] = "nats per token"

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import divergences

        assert whole is not None
        return divergences(whole, found)
