"""How far the predictions move away from those of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.measuring import row_means

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KL:
    """Mean Kullback-Leibler divergence from the whole model's prediction P to the pruned one's Q, per window.

    KL(P || Q) = sum over tokens v of P(v) (log P(v) - log Q(v)), at every predicted token. Zero for the whole model.
    Beside a loss it needs the whole model's logits: one more head pass for every eight masks.
    """

    title: ClassVar[str] = "Kullback-Leibler divergence to the whole model"
    source: ClassVar[str] = "Sieberling et al. 2024 (EvoPress), arXiv 2410.14649"
    unit: ClassVar[str] = "nats per token"
    reads: ClassVar[Literal["text", "items"]] = "text"
    of: ClassVar[Literal["logits", "states"]] = "logits"
    compares: ClassVar[bool] = True

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import divergences

        assert whole is not None
        return divergences(whole, found)

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        return row_means(sums, counts)
