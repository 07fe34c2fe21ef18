"""Pure tensor mathematics of losses: rows of logits in, one number per row out, in float32."""

from collections.abc import Callable

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 2**23  # float32 copies of so many logits at a time: 32 MiB
_BUFFERED = 2**20  # float32 numbers that are worked on again and again in the same place: 4 MiB, near the processor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats, in float32.

    loss[p] = logsumexp(logits[p]) - logits[p, target[p]]; logits: [positions, vocabulary], any float type, read in
    float32; targets: [positions]. Works through some rows at a time, all in the same two places: fresh memory for
    each costs more than the arithmetic.
    """
    if logits.requires_grad:
        return _by_rows(lambda z, t: torch.nn.functional.cross_entropy(z.float(), t, reduction="none"), logits, targets)
    rows = max(1, min(len(logits), _BUFFERED // logits.shape[-1]))
    narrow = logits.dtype != torch.float32
    wide, scores = (logits.new_empty(rows, logits.shape[-1], dtype=torch.float32) for _ in range(2))
    losses = scores.new_empty(len(logits))
    for start in range(0, len(logits), rows):
        some, asked = logits[start : start + rows], targets[start : start + rows, None]
        count = len(some)
        torch.log_softmax(wide[:count].copy_(some) if narrow else some, dim=-1, out=scores[:count])
        torch.gather(scores[:count], 1, asked, out=losses[start : start + count, None])
    return losses.neg_()


def divergences(whole: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row of logits, KL(softmax(whole) || softmax(found)), in nats."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return _expected(log_p, log_q)

    return _by_rows(kl, whole, found)


def jensen_shannon(whole: Tensor, found: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row of logits, in nats, 0 to log 2."""

    def js(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=p.device))
        return (_expected(log_p, log_m) + _expected(log_q, log_m)) / 2

    return _by_rows(js, whole, found)


def distances(whole: Tensor, found: Tensor) -> Tensor:
    """Euclidean distance of each row of logits."""
    return _by_rows(lambda p, q: (p.float() - q.float()).norm(dim=-1), whole, found)


def _expected(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum of p (log p - log q), where a token that p rules out adds nothing."""
    return torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def _by_rows(measure: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    rows = max(1, _NUMBERS_AT_ONCE // first.shape[-1])
    parts = zip(first.split(rows), second.split(rows), strict=True)
    return torch.cat([measure(one, other) for one, other in parts])
