"""How far the predictions move away from those of the whole model, in a measure with an upper bound."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.measuring import PerRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JensenShannon(PerRow):
    """Mean Jensen-Shannon divergence between the whole model's prediction P and the pruned one's Q, per window.

    JS = (KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2, at every predicted token; 0 to log 2, symmetric. Costs what
    `kl` costs.
    """

    title: ClassVar[str] = "Jensen-Shannon divergence to the whole model"
    source: ClassVar[str] = "Lin 1991, IEEE Transactions on Information Theory 37(1)"
    unit: ClassVar[str] = "nats per token"

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import jensen_shannon

        assert whole is not None
        return jensen_shannon(whole, found)
