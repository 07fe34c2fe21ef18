"""Whether an encoder still means the same: agreement of its embeddings with its own, before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.measuring import PerRow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Embedding(PerRow):
    """One minus the cosine between the embedding of a window by the pruned model and by the whole one.

    The embedding is the mean of the last hidden states over all tokens, as sentence encoders take it; 0 for the whole
    model, 2 at most. For models without a head.
    """

    title: ClassVar[str] = "Disagreement with the whole model's embeddings"
    source: ClassVar[str] = "ours; mean pooling as in Reimers and Gurevych 2019, arXiv 1908.10084"
    unit: ClassVar[str] = "1 - cosine"
    of: ClassVar[Literal["logits", "losses", "states"]] = "states"

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        assert whole is not None
        found, whole = found.float(), whole.float()
        # 1 - cos(a, b) as half the squared distance of the unit vectors: exact where they agree
        return (found / found.norm(dim=-1, keepdim=True) - whole / whole.norm(dim=-1, keepdim=True)).square().sum(
            -1
        ) / 2
