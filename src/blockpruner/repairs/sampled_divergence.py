"""Teaching by a part of the vocabulary: the divergence of predictions, both sums over tokens estimated from a draw.

With pi[v] the chance that token v is drawn, and z[v] / T - log pi[v] of the drawn tokens alone for both models' logits
z, the softmax of these stands for that of all tokens at temperature T, each drawn one for 1 / pi[v] of its kind; the
loss is the divergence of the two, T^2 KL(p || q). Every pass draws anew, so that no token is left out for long: with
one draw for the whole training a pruned model learns to think of the others. Sums are right on average, the divergence
of their logarithms nearly so.
Cost: the head's work is vocabulary / V of that of `kl`, and a draw per pass, which sorts V numbers; one pass of the
dense model with its head over SAMPLE tokens (`at_the_head`).
Memory: a copy of the drawn tokens' weights, and LOGITS_AT_ONCE logits of each model.
Source: importance sampling of a softmax, Bengio and Senecal 2008, IEEE Trans. Neural Networks 19(4); the draw is that
of the objective `sampled-loss`; for a divergence of two models: ours.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.errors import UnsupportedModelError
from blockpruner.metrics import divergences
from blockpruner.objectives.sampled_loss import chances_of, drawn
from blockpruner.repairs.at_the_head import AtTheHead
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.teaching import LOGITS_AT_ONCE, short_of
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
        tokens, chances = drawn(self.chances, self.vocabulary, seed=int(torch.randint(2**62, ())))
        weight, bias = self.head.weight.detach(), self.head.bias
        tokens, less = tokens.to(weight.device), chances.log().float().to(weight.device)
        self.drawn = weight[tokens], None if bias is None else bias.detach()[tokens], less

    def far(self, own: Tensor, aim: Tensor) -> Tensor:
        return self.temperature**2 * divergences(self.logits(aim), self.logits(own)).sum()

    @property
    def at_once(self) -> int:
        return max(1, LOGITS_AT_ONCE // len(self.drawn[0]))

    def logits(self, states: Tensor) -> Tensor:
        """z / T - log pi of the drawn tokens, in float32."""
        weight, bias, less = self.drawn
        return nn.functional.linear(states.to(weight), weight, bias).float() / self.temperature - less

    @cached_property
    @torch.no_grad()
    def chances(self) -> Tensor:
        """Of each token [V] to be drawn, by what the dense model thinks of it over the sample; the model is whole."""
        size = len(self.head.weight)
        total = torch.zeros(size)
        for row in self.sample.to(self.pupil.model.device).rows():
            for logits, _ in self.predicted(row):
                total += logits.float().softmax(-1).sum(0)[:size].cpu()
        return chances_of(total, self.vocabulary)

    def probe(self, examples: Examples, numbers: Mapping[str, nn.Parameter]) -> None:
        super().probe(examples, numbers)
        row = short_of(next(examples.rows())).to(self.pupil.model.device)
        given: list[Any] = []
        handle = self.head.register_forward_hook(lambda _module, _args, output: given.append(output))
        try:
            with torch.no_grad():
                logits = self.pupil.model(**row.inputs, **self.ends.extra).logits
        finally:
            handle.remove()
        if not given or given[-1].shape != logits.shape or not torch.equal(given[-1].float(), logits.float()):
            raise UnsupportedModelError(
                f"something stands behind the head of {type(self.pupil.model).__name__}, as a scale or a cap does",
                fix="leave out vocabulary",
            )
