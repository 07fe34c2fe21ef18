"""Teaching by a part of the vocabulary: the divergence of predictions, both sums over tokens estimated from a draw.

With pi[v] the chance that token v is drawn, and both models' logits z[v] - log pi[v] of the drawn tokens alone, the
softmax of these stands for that of all tokens, each drawn one for 1 / pi[v] of its kind; the loss is the divergence
of the two, T^2 KL(p || q) at temperature T. Every pass draws anew, so that no token is left out for long: with one draw
for the whole training a pruned model learns to think of the others. Sums are right on average, the divergence of
their logarithms nearly so.
Cost: the head's work is vocabulary / V of that of `kl`; one pass of the dense model with its head over SAMPLE tokens.
Memory: a copy of the drawn tokens' weights, and LOGITS_AT_ONCE logits of each model.
Source: importance sampling of a softmax, Bengio and Senecal 2008, IEEE Trans. Neural Networks 19(4); the draw is that
of the objective `sampled-loss`; for a divergence of two models: ours.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from blockpruner.errors import UnsupportedModelError
from blockpruner.metrics import divergences
from blockpruner.objectives.sampled_loss import SampledLoss
from blockpruner.repairs.at_the_head import AtTheHead, before_head
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.teaching import LOGITS_AT_ONCE
from blockpruner.texts.examples import Examples


class SampledDivergence(AtTheHead):
    """The estimate of temperature^2 KL(dense || pruned) from `vocabulary` tokens, in nats, summed over predicted ones.

    The head is the dense model's for both, and nothing may stand behind it: UnsupportedModelError for a scale or a cap.
    """

    def __init__(self, pupil: Pupil, text: Examples, vocabulary: int, temperature: float = 1.0) -> None:
        super().__init__(pupil, text)
        self.vocabulary, self.temperature = vocabulary, temperature
        self.drawn: tuple[Tensor, Tensor | None, Tensor]

    def prepare(self) -> None:
        """Draw; from torch's generator, which a training seeds for each pass."""
        seed = int(torch.randint(2**62, ()))
        tokens, chances = SampledLoss(vocabulary=self.vocabulary, seed=seed).draw(self.thought_of)
        weight, bias = self.head.weight.detach(), self.head.bias
        tokens, less = tokens.to(weight.device), chances.log().float().to(weight.device)
        self.drawn = weight[tokens], None if bias is None else bias.detach()[tokens], less

    def far(self, own: Tensor, aim: Tensor) -> Tensor:
        return self.temperature**2 * divergences(self._logits(aim), self._logits(own)).sum()

    @property
    def at_once(self) -> int:
        return max(1, LOGITS_AT_ONCE // len(self.drawn[0]))

    def _logits(self, states: Tensor) -> Tensor:
        weight, bias, less = self.drawn
        return nn.functional.linear(states.to(weight), weight, bias).float() / self.temperature - less

    @cached_property
    @torch.no_grad()
    def thought_of(self) -> Tensor:
        """What the dense model thinks of each token on average over the sample, [vocabulary]; the model is whole."""
        size = len(self.head.weight)
        total = torch.zeros(size)
        for row in self.sample.to(self.pupil.model.device).rows():
            for logits, _ in self.predicted(row):
                total += logits.float().softmax(-1).sum(0)[:size].cpu()
        return total / total.sum()

    def probe(self, examples: Examples, numbers: Mapping[str, nn.Parameter]) -> None:
        super().probe(examples, numbers)
        row = next(examples.to(self.pupil.model.device).rows())
        with torch.no_grad():
            mine = self.head(before_head(self.pupil.model, row)[:, -1:]).float()
            theirs = self.pupil.model(**row.inputs, **self.ends.extra).logits[:, -1:].float()
        room = 1e-3 if self.pupil.model.dtype.itemsize >= 4 else 5e-2
        if mine.shape != theirs.shape or float((mine - theirs).abs().max()) > room * float(theirs.abs().max()):
            raise UnsupportedModelError(
                f"something stands behind the head of {type(self.pupil.model).__name__}, as a scale or a cap does",
                fix="leave out vocabulary",
            )
