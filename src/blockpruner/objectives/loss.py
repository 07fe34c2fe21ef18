"""Language-modelling loss: what the model was trained to make small."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.measuring import PerRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss(PerRow):
    """Mean negative log-likelihood of the tokens that are to be predicted, per window; the logarithm of perplexity.

    loss(mask, window) = mean over predicted tokens of -log p(token | what the model is given).
    """

    title: ClassVar[str] = "Language-modelling loss (logarithm of perplexity)"
    source: ClassVar[str] = "Zhong et al. 2024, arXiv 2406.10594; Kim et al. 2024, arXiv 2402.02834"
    unit: ClassVar[str] = "nats per token"
    of: ClassVar[Literal["logits", "losses", "states"]] = "losses"
    compares: ClassVar[bool] = False

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import token_losses

        return token_losses(found, targets)
