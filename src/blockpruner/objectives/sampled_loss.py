"""Language-modelling loss over a part of the vocabulary, for models whose head costs more than their blocks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.errors import InputError
from blockpruner.objectives.loss import Loss

if TYPE_CHECKING:
    from torch import Tensor

EVEN = 0.1  # of the draw goes to all tokens alike: what is lost on tokens that the whole model never thinks of


@dataclass(frozen=True)
class SampledLoss(Loss):
    """The loss with the sum over the vocabulary estimated from `vocabulary` of its tokens, drawn once for a whole run.

    loss[p] = log(exp z[p, t] + sum over other drawn v of exp(z[p, v]) / pi[v]) - z[p, t], t = target[p]. pi[v] is the
    chance that v is drawn, in proportion to q[v] = (1 - EVEN) mean over p of p(v | p) + EVEN / V by the whole model on
    the same text, and at most 1: the frequent tokens are all there. The sum is right on average (Horvitz-Thompson), its
    logarithm a little low, the more so the farther a model is from the whole one; all masks have the same tokens, so
    that what they err by is much the same for masks that compete. A plan's losses, and targets like loss=+0.1, go by
    the estimate; what races promise holds for it. `experiments/LOG.md` says how far it is off.

    vocabulary: tokens that are drawn; all where there are no more. seed: of the draw.
    Cost: the head's work is vocabulary / V of what it was, after one pass of the whole model, its head twice, for q.
    InputError where something stands behind the head, as a soft cap does, or the model has several stacks.
    """

    vocabulary: int = 16384
    seed: int = 0

    unit: ClassVar[str] = "nats per token, estimated"
    title: ClassVar[str] = "Language-modelling loss, the sum over the vocabulary estimated from a part of it"
    source: ClassVar[str] = "Bengio and Senecal 2008, IEEE Trans. Neural Networks 19(4); the draw: Rosen 1997, JSPI 62"

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or not 0 <= self.seed < 2**63:
            raise InputError(
                f"no loss has vocabulary={self.vocabulary} and seed={self.seed}",
                fix="write sampled-loss:vocabulary=16384, and a seed of 0 to 2^63 - 1",
            )

    def draw(self, probabilities: "Tensor") -> "tuple[Tensor, Tensor]":
        """Tokens and their chances, both [vocabulary], from what the whole model thinks of each, [V]."""
        return drawn(chances_of(probabilities, self.vocabulary), self.vocabulary, self.seed)


def chances_of(probabilities: "Tensor", count: int) -> "Tensor":
    """The chance of each token [V] to be among `count` drawn ones: min(1, c q), with c so that they add up to that."""
    share = probabilities.double().cpu() / probabilities.sum().cpu()
    q = (1 - EVEN) * share + EVEN / len(share)
    wanted = min(count, len(q))
    chances = q * wanted / q.sum()
    while bool((chances > 1).any()):
        certain = chances >= 1
        left = wanted - int(certain.sum())
        chances = (q * left / q[~certain].sum()).masked_fill(certain, 1.0)
    return chances


def drawn(chances: "Tensor", count: int, seed: int) -> "tuple[Tensor, Tensor]":
    """`count` tokens, in ascending order, and their chances.

    Pareto sampling: those with the least odds of u[v] against pi[v], u uniform in (0, 1). It draws as many as were
    asked for, and to change q a little changes few of them, so that another machine draws nearly the same.
    """
    import torch

    uniform = torch.rand(len(chances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    odds = uniform / (1 - uniform) * (1 - chances) / chances
    tokens = odds.argsort(stable=True)[:count].sort().values
    return tokens, chances[tokens]
