"""Teaching without logits: how far predictions are apart, to second order, as a metric of the states before the head.

Logits are linear in the state h that reaches the head, z = W h + b, so that for a small difference d of two states

    KL(p || p') = 1/2 d^T F_p d + O(|d|^3),  F_p = W^T (diag(p) - p p^T) W.

With the mean of F_p over tokens, F = W^T diag(mean p) W - mean (W^T p)(W^T p)^T, a step of training takes no logits:
where the vocabulary costs more than the layers (262,144 tokens at 640 dimensions), a third of the operations of `kl`
(benchmarks/fisher_cost.py).
Cost: one forward pass of the dense model with its head over SAMPLE tokens (`at_the_head`). Memory: hidden^2 numbers,
and the logits of some positions while these are summed. The metric is that of the dense model's head, which stays.
Source: the Fisher information of a softmax, Amari 1998; its mean as a metric for distillation: ours.
"""

from functools import cached_property

import torch
from torch import Tensor

from blockpruner.repairs.at_the_head import AtTheHead

ROWS = 2**15  # of the head's weights that are multiplied at once


class FisherMetric(AtTheHead):
    """1/2 d^T F d, in nats, summed over predicted tokens; d: from the dense model's state before the head to the pruned
    one's.

    A factor that a model puts on its logits is left out of the value, and a cap on them of the metric.
    """

    def prepare(self) -> None:
        _ = self.metric

    def far(self, own: Tensor, aim: Tensor) -> Tensor:
        apart = (own - aim).float()
        return 0.5 * ((apart @ self.metric) * apart).sum()

    @property
    def at_once(self) -> int:
        return 2**16

    @cached_property
    @torch.no_grad()
    def metric(self) -> Tensor:
        """F in float32, [hidden, hidden]; the model must be whole."""
        weight = self.head.weight.detach()
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
