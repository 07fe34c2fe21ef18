"""What stands in a gap for a moment, to see what reaches it and what becomes of what it adds.

On its way into the stream that is either nothing or a scale, as Granite's layers have one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Part
from blockpruner.anatomy.probing import Call, Enough, first_tensor, stood_in
from blockpruner.surgery.gaps import Gap, attach

ROUNDED = 1e-2  # what a scale may be off by in half precision
ROUNDING = {True: 1e-5, False: 2e-2}  # of a stream in single precision, and in half


def arrival(model: PreTrainedModel, gap: Gap, module: nn.Module, call: Call) -> float | None:
    """s, if the layer adds s u to the stream for any u that is put in the gap, else None; proved with noise for u.

    module, call: the layer and its call in the model without the block, where a stand-in is in the gap. What is left
    behind the gap in the layer is silent meanwhile.
    """
    layer = gap.layer
    silent = {path: spec for part in parts_behind(gap) for path, spec in {**part.modules, **part.idle}.items()}
    stream = dict(call.inputs())[layer.hidden]
    with stood_in(model, silent):
        attach(model, gap.path, None)
        before = tensor_of(call.again(module, {layer.hidden: stream.clone()}))
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
        update = noise * before.float().std().to(before)
        attach(model, gap.path, Giving(update))
        try:
            found = tensor_of(call.again(module, {layer.hidden: stream.clone()})) - before
        except RuntimeError:  # of a shape that does not fit there
            return None
    there, put = (each.cpu().double() for each in (found, update))  # some devices have no float64
    scale = float((there * put).sum() / put.square().sum())
    scale = 1.0 if abs(scale - 1) < ROUNDED else scale
    room = ROUNDING[before.dtype.itemsize >= 4] * float((before.abs() + update.abs()).max())
    near = float((found - scale * update).abs().max()) <= room
    return scale if near and abs(scale) > ROUNDED else None


def parts_behind(gap: Gap) -> tuple[Part, ...]:
    """The blocks behind a gap in its layer."""
    return () if gap.part is None else gap.layer.parts[gap.layer.parts.index(gap.part) + 1 :]


class Taking(nn.Module):
    """In the place of a replacement: takes what it is given, and leaves."""

    seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden.clone()
        raise Enough


class Giving(nn.Module):
    """In the place of a replacement: gives what it was made with."""

    def __init__(self, update: Tensor) -> None:
        super().__init__()
        self.update = update

    def forward(self, hidden: Tensor) -> Tensor:
        return self.update.clone()


def tensor_of(output: Any) -> Tensor:
    """The stream among what a layer returns."""
    found = first_tensor(output)
    assert found is not None  # read_anatomy has seen it
    return found
