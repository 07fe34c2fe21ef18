"""Pure tensor mathematics of losses."""

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 2**23  # float32 copies of so many logits at a time: 32 MiB


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats, in float32.

    loss[p] = logsumexp(logits[p]) - logits[p, target[p]]; logits: [positions, vocabulary], any float type, read in
    float32; targets: [positions]. Works through some rows at a time, so that no second tensor of that size exists.
    """
    rows = max(1, _NUMBERS_AT_ONCE // logits.shape[-1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(part.float(), row, reduction="none") for part, row in parts])
