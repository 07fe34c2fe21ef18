"""The neurons of a model's MLPs as functions of the stream, for an MLP that is to stand for them to begin with.

Nothing is read off names: what reaches the last projection of a block must be an activation of one linear map of its
input, or that times another, and the input a gain and a constant on the normed stream, each on real tokens. Mixtures of
experts and what else is not proved have no neurons here.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from blockpruner.anatomy.parts import Layer, Part
from blockpruner.anatomy.probing import Call, recorded
from blockpruner.repairs.closed_form import Given
from blockpruner.repairs.folding import projection
from blockpruner.repairs.updates import behind, flat

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2")  # that are tried
NEAR = {True: 1e-3, False: 5e-2}  # of what is proved beside its largest entry, in single precision and in half


@dataclass(frozen=True)
class Neurons:
    """act(n G + g) * (n U + u) of the normed stream n: gate, up [inputs, neurons], biases [neurons], in float32.

    Where nothing is multiplied with the activation, U is zero and u is one.
    """

    activation: str
    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def __len__(self) -> int:
        return len(self.gate_bias)

    def of(self, normal: Tensor) -> Tensor:
        """[tokens, neurons] of n [tokens, inputs]."""
        act = ACT2FN[self.activation]
        return act(normal @ self.gate + self.gate_bias) * (normal @ self.up + self.up_bias)

    def chosen(self, which: Tensor) -> "Neurons":
        """Those of these numbers."""
        sides = (self.gate[:, which], self.gate_bias[which], self.up[:, which], self.up_bias[which])
        return Neurons(self.activation, *sides)


def joined(found: Sequence[Neurons], device: torch.device) -> Neurons:
    """All that have the activation of the first, in one, on one device."""
    alike = [each for each in found if each.activation == found[0].activation]
    sides = ([s.to(device) for s in (each.gate, each.gate_bias, each.up, each.up_bias)] for each in alike)
    return Neurons(alike[0].activation, *(torch.cat(side, dim=-1) for side in zip(*sides, strict=True)))


@torch.no_grad()
def neurons_in(
    model: PreTrainedModel, layer: Layer, part: Part, normal: Given, module: nn.Module, call: Call
) -> Neurons | None:
    """The neurons of one block of the dense model, whose layer and call these are; None where they are not proved."""
    last = projection(model, part)
    if isinstance(last, str):
        return None
    owner = last.weight.rpartition(".")[0]
    inside = {
        f"{path}.{name}" if name else path: each
        for path in (*part.modules, *part.idle)
        for name, each in model.get_submodule(path).named_modules()
        if isinstance(each, (nn.Linear, Conv1D))
    }
    with recorded(inside) as calls:
        whole = behind(model, layer)(module, call)
    once = {path: seen[0] for path in inside if len(seen := calls.get(path, ())) == 1}
    if owner not in once:
        return None
    wanted = flat(next(value for _, value in once.pop(owner).inputs())).float()
    later = layer.parts[layer.parts.index(part) :]
    streams = [dict(call.inputs())[layer.hidden], behind(model, layer, later)(module, call)]
    near = NEAR[whole.dtype.itemsize >= 4]
    maps = [
        each for path, seen in once.items() for each in _maps(inside[path], seen, streams, normal, len(wanted.T), near)
    ]
    tried = [
        (_apart(ACT2FN[activation](gate.made) * (1 if up is None else up.made), wanted), activation, gate, up)
        for gate, up in _pairs(maps)
        for activation in ACTIVATIONS
    ]
    apart, activation, gate, up = min(tried, key=lambda each: each[0], default=(math.inf, "", None, None))
    if gate is None or not apart <= near:
        return None
    factor = (torch.zeros_like(gate.weight), torch.ones_like(gate.bias)) if up is None else (up.weight, up.bias)
    return Neurons(activation, gate.weight, gate.bias, *factor)


@dataclass(frozen=True)
class _Map:
    """A linear map of the normed stream, [inputs, outputs], and what it made."""

    weight: Tensor
    bias: Tensor
    made: Tensor


def _pairs(maps: list[_Map]) -> Iterator[tuple[_Map, _Map | None]]:
    yield from itertools.permutations(maps, 2)
    yield from ((each, None) for each in maps)


def _maps(
    linear: nn.Linear | Conv1D, seen: Call, streams: list[Tensor], normal: Given, width: int, near: float
) -> Iterator[_Map]:
    """The maps to so many neurons that a linear module is, or is made of, if it is given the normed stream."""
    given = flat(next(value for _, value in seen.inputs())).float()
    weight, bias = linear.weight.detach().float(), linear.bias
    weight = weight if isinstance(linear, Conv1D) else weight.T
    made = given @ weight
    bias = torch.zeros_like(made[0]) if bias is None else bias.detach().float()
    for stream in streams:
        n = flat(normal.of(stream)).float()
        if n.shape != given.shape:
            continue
        mean, other = n.mean(0), given.mean(0)
        gain = ((n - mean) * (given - other)).sum(0) / (n - mean).square().sum(0).clamp_min(torch.finfo(n.dtype).tiny)
        constant = other - gain * mean
        if not _apart(n * gain + constant, given) <= near:
            continue
        for start in range(0, weight.shape[1] - width + 1, width):  # gate and up may be one matrix
            columns = slice(start, start + width)
            inner = weight[:, columns]
            yield _Map(gain[:, None] * inner, bias[columns] + constant @ inner, made[:, columns] + bias[columns])
        return


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference beside the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
