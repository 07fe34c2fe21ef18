"""Teaching without logits: how far predictions are apart, to second order, as a metric of the states before the head.

Logits are linear in the state h that reaches the head, z = W h + b, so that for a small difference d of two states

    KL(p || p') = 1/2 d^T F_p d + O(|d|^3),  F_p = W^T (diag(p) - p p^T) W.

With the mean of F_p over tokens, F = W^T diag(mean p) W - mean (W^T p)(W^T p)^T, a step of training takes no logits:
where the vocabulary costs more than the layers (262,144 tokens at 640 dimensions), a third of the operations of `kl`
(benchmarks/fisher_cost.py).
Cost: one forward pass of the dense model with its head over SAMPLE tokens. Memory: hidden^2 numbers, and the logits of
some positions while these are summed. The metric is that of the dense model's head, which stays as it is.
Source: the Fisher information of a softmax, Amari 1998; its mean as a metric for distillation: ours.
"""

import contextlib
from collections.abc import Mapping
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import Enough, without_cache
from blockpruner.errors import UnsupportedModelError
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.teaching import Predictions
from blockpruner.texts.examples import IGNORED, Examples

Loss = Literal["lm", "kl", "fisher"]
SAMPLE = 2048  # tokens that the mean is taken over, whole windows
ROWS = 2**15  # of the head's weights that are multiplied at once


class Taught(NamedTuple):
    """What a pruned model is taught; see the recovery `distill`."""

    loss: Loss
    temperature: float = 1.0
    hidden: float = 0.0

    @property
    def told(self) -> dict[str, str | int | float]:
        """What a record says of it: the loss, and what is not as usual."""
        return {key: value for key, value in self._asdict().items() if value != self._field_defaults.get(key)}

    def lesson(self, pupil: Pupil, sample: Examples) -> Predictions:
        """sample: text that `fisher` takes its metric from."""
        if self.loss == "fisher":
            return FisherMetric(pupil, sample)
        return Predictions(pupil, self.loss, self.temperature, self.hidden)


class FisherMetric(Predictions):
    """1/2 d^T F d, in nats, summed over predicted tokens; d: from the dense model's state before the head to the pruned
    one's. Judged by the loss of predictions, as all others are.

    A factor that a model puts on its logits is left out of the value, and a cap on them of the metric.
    """

    def __init__(self, pupil: Pupil, sample: Examples) -> None:
        super().__init__(pupil)
        head_of(pupil.model)  # what has none is refused at once
        self.sample = sample.part(0, max(1, min(len(sample), SAMPLE // sample.tokens)))

    def backward(self, part: Examples, scale: float) -> float:
        part = part.to(self.pupil.model.device)
        with torch.inference_mode(False), torch.enable_grad():
            metric = self.metric
            with torch.no_grad():
                aim = before_head(self.pupil.model, part)
            with self.pupil.pruned():  # on the way back too, where operations look at weights again
                apart = (before_head(self.pupil.model, part) - aim).float()[part.targets != IGNORED]
                value = 0.5 * ((apart @ metric) * apart).sum()
                if value.requires_grad:
                    (value * scale).backward()
            return float(value.detach())

    def probe(self, examples: Examples, numbers: Mapping[str, nn.Parameter]) -> None:
        plain = Predictions(self.pupil)  # whether the parts that `judge` sees are those of the whole
        plain.probe(examples, numbers)
        self.whole = plain.whole

    @cached_property
    @torch.no_grad()
    def metric(self) -> Tensor:
        """F in float32, [hidden, hidden]; the model must be whole."""
        weight = head_of(self.pupil.model).weight.detach()
        total = torch.zeros(len(weight), device=weight.device)
        squares = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        count = 0
        for row in self.sample.to(self.pupil.model.device).rows():
            for logits, _ in self.predicted(row):
                chances = logits.float().softmax(-1).to(weight.device)[:, : len(weight)]
                means = (chances.to(weight.dtype) @ weight).float()
                total += chances.sum(0)
                squares += means.T @ means
                count += len(chances)
        for rows, chances in zip(weight.split(ROWS), total.split(ROWS), strict=True):
            squares -= rows.float().T @ (chances[:, None] * rows.float())
        return -squares / count


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear map from states to logits; UnsupportedModelError where there is none."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} is no linear map of states to logits", fix="use loss=kl"
        )
    return head


def before_head(model: PreTrainedModel, part: Examples) -> Tensor:
    """The states that reach the head of the model as it is now, [rows, tokens, hidden]; the head does not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise Enough

    handle = head_of(model).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(Enough):
            model(**part.inputs, **without_cache(model))
    finally:
        handle.remove()
    if not found or found[0].shape[:2] != part.targets.shape:
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} is not given one state for each token", fix="use loss=kl"
        )
    return found[0]
