"""How fast a model computes here, as found on one micro-batch."""

import time
from dataclasses import dataclass

import torch

from blockpruner.artifacts import Traffic, Work


@dataclass(frozen=True)
class Pace:
    """Seconds per token of a block and of the head, and per byte of weights that is read.

    A state that is spilled is written and read again, which is taken to be as fast as weights are read.
    """

    block: float
    head: float
    byte: float = 0.0

    def seconds(self, work: Work, moved: Traffic) -> float:
        body = self.block * (work.attention_tokens + work.mlp_tokens)
        return body + self.head * work.head_tokens + self.byte * (moved.read + 2 * moved.spilled)


def now(model: torch.nn.Module) -> float:
    """Seconds on a clock that goes on, when all is done that was asked of the devices on which the model lies."""
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
    return time.perf_counter()
