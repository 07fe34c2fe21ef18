"""How far the predictions move away from those of the whole model, in a measure with an upper bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.measuring import row_means

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JensenShannon:
    """Mean Jensen-Shannon divergence between the whole model's prediction P and the pruned one's Q, per window.

    JS = (KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2, at every predicted token; 0 to log 2, symmetric. Costs what
    `kl` costs.
    """

    title: ClassVar[str] = "Jensen-Shannon divergence to the whole model"
    source: ClassVar[str] = "Lin 1991, IEEE Transactions on Information Theory 37(1)"
    unit: ClassVar[str] = "nats per token"
    reads: ClassVar[Literal["text", "items"]] = "text"
    of: ClassVar[Literal["logits", "states"]] = "logits"
    compares: ClassVar[bool] = True

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import jensen_shannon

        assert whole is not None
        return jensen_shannon(whole, found)

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        return row_means(sums, counts)
