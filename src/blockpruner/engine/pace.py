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


def now(device: torch.device) -> float:
    """Seconds on a clock that goes on, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
