"""Values at positions added up to values of windows and their pieces, and which positions of examples those are."""

import torch
from torch import Tensor

from blockpruner.anatomy.parts import Stack
from blockpruner.engine.head import Head
from blockpruner.engine.masktree import Inputs
from blockpruner.measuring import Measure
from blockpruner.texts.examples import IGNORED, Examples


class Sums:
    """Adds up the values of a measure, row by row and segment by segment, over chunks of positions."""

    def __init__(self, measure: Measure, part: Examples, segment: int, head: Head | None = None) -> None:
        self._measure, self._targets, self._segment, self._head = measure, part.targets, segment, head
        rows, positions = part.targets.shape
        self._sums = torch.zeros(rows, -(-positions // segment), dtype=torch.float64)
        self._pooled: list[Tensor] = []

    def add(self, found: Tensor, whole: Tensor | None, positions: Tensor) -> None:
        """found, whole: outputs [rows, positions, ...]; with a head, what is found are states before it."""
        if self._measure.of == "states":
            sides = (found, found if whole is None else whole)
            more = [side.float().sum(dim=1) for side in sides]
            self._pooled = [a + b for a, b in zip(self._pooled, more, strict=True)] if self._pooled else more
            return
        targets = self._targets[:, positions]
        asked = targets != IGNORED
        beside = None if whole is None else marked(whole, asked)
        given, wanted = marked(found, asked), marked(targets, asked)
        values = self._head.token_losses(given, wanted) if self._head else self._measure.each(given, beside, wanted)
        row, place = (index.cpu() for index in asked.nonzero(as_tuple=True))
        segments = positions.cpu()[place] // self._segment
        self._sums.index_put_((row, segments), values.cpu().double(), accumulate=True)

    def done(self) -> tuple[Tensor, list[int]]:
        """The sums [rows, segments], times the number of segments, and for each how many values its row has."""
        if self._measure.of == "states":
            found, whole = self._pooled
            return self._measure.each(found, whole, self._targets).cpu().double(), [1] * len(found)
        segments = self._sums.shape[1]
        counts = (self._targets != IGNORED).sum(dim=1).repeat_interleave(segments)
        return self._sums * segments, counts.tolist()


def marked(values: Tensor, asked: Tensor) -> Tensor:
    """The rows [n, ...] of `values` at the places in `asked`; all of them without a copy, for logits are large."""
    return values.flatten(0, 1) if bool(asked.all()) else values[asked]


def positions_of(part: Examples) -> Tensor:
    """Positions of the output that count for some row; all of them where states are compared."""
    if part.question == "states":
        return torch.arange(part.targets.shape[1], device=part.targets.device)
    return (part.targets != IGNORED).any(dim=0).nonzero()[:, 0]


def tokens_of(stack: Stack, inputs: Inputs) -> int:
    """Tokens that the layers of this stack see: the decoder's where there is a decoder, else those of the text."""
    decodes = stack.name.startswith("decoder") and "decoder_input_ids" in inputs
    return inputs["decoder_input_ids" if decodes else "input_ids"].numel()
