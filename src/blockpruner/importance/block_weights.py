"""Which parameters leave with which blocks, and sums over those of a move.

What the criteria count that look at weights (magnitude, Taylor, Fisher) is counted here, once for all of them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockpruner.anatomy.parts import Anatomy, Layer
from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError

NUMBERS_AT_ONCE = 2**23  # entries of a tensor that are read in float32 at a time: 32 MiB


@dataclass(frozen=True)
class Holding:
    """Parameters, by name, that leave the model once all of `blocks` are gone: a block's own, or a layer's shared."""

    blocks: Mask
    names: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Those that weight criteria count: all but biases, as in Shortened LLaMA; matrices, experts, norm vectors."""
        return tuple(name for name in self.names if not name.endswith("bias"))


def holdings(model: nn.Module, anatomy: Anatomy) -> tuple[Holding, ...]:
    """What each block of `model` (whole, or with its stand-ins for a while) holds, and what each layer's blocks share.

    The sizes are those of the anatomy: nothing for a block that is kept, tied parameters only where all that tie them
    leave. A layer of one block has one holding.
    """
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return tuple(
        Holding(blocks, tuple(names))
        for stack in anatomy.stacks
        for layer in stack.layers
        for blocks, names in _of_layer(model, layer, everywhere).items()
        if names
    )


def leaving(held: Iterable[Holding], move: Move, mask: Mask) -> list[str]:
    """Names of the weights that leave when `move` is made on top of `mask`, the shared ones of emptied layers too."""
    after = mask | move.blocks
    return [name for h in held if h.blocks <= after and not h.blocks <= mask for name in h.weights]


def staying(held: Iterable[Holding], mask: Mask) -> list[str]:
    """Names of all weights that some move on top of `mask` may still take."""
    return [name for h in held if not h.blocks <= mask for name in h.weights]


def floats(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names; InputError if one is no floating-point numbers, as in quantized checkpoints."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    found = {name: everything[name] for name in names}
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise InputError(
                f"{name} holds {parameter.dtype}, packed weights that cannot be summed or differentiated",
                fix="give the model before it was quantized",
            )
    return found


def sums(
    held: Iterable[Holding], moves: Iterable[Move], mask: Mask, values: Mapping[str, Sequence[float]]
) -> dict[Move, tuple[float, ...]]:
    """Per move on top of `mask`, the values of what leaves with it added up, entry by entry.

    values: by name of the weight, equally many numbers for each. A move with which nothing leaves has zeros.
    """
    held = tuple(held)
    width = len(next(iter(values.values()), (0.0,)))
    found: dict[Move, tuple[float, ...]] = {}
    for move in moves:
        rows = [values[name] for name in leaving(held, move, mask)]
        found[move] = tuple(_sum(column) for column in zip(*rows, strict=True)) if rows else (0.0,) * width
    return found


def in_float(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of tensors of one size, in float32, some entries at a time: no second copy of any of them."""
    flat = (tensor.detach().flatten().split(NUMBERS_AT_ONCE) for tensor in tensors)
    for pieces in zip(*flat, strict=True):
        yield tuple(piece.float() for piece in pieces)


class MeanProducts:
    """Per weight matrix or vector, the sum of |w * dL/dw|, L the mean of the losses of all windows.

    Takes gradients of single windows (a sink of `gradients`); signed until all windows are in, in float32, so it holds
    one gradient of what is not done yet. values: by name, a row of one number; 0 where no gradient came.
    """

    def __init__(self, parameters: Mapping[str, Tensor], windows: int) -> None:
        self.parameters, self.windows = parameters, windows
        self.values = {name: [0.0] for name in parameters}
        self.held: dict[str, Tensor] = {}

    def take(self, window: int, name: str, gradient: Tensor) -> None:
        if name in self.held:
            self.held[name] += gradient
        else:
            self.held[name] = gradient.to(torch.float32, copy=True)

    def done(self, prefix: str) -> None:
        for name in [name for name in self.held if name.startswith(prefix)]:
            gradient = self.held.pop(name)
            pieces = in_float(self.parameters[name], gradient)
            self.values[name] = [_sum([float((w * g).abs().sum()) / self.windows for w, g in pieces])]


class SquaredProducts:
    """Per weight matrix or vector and window, the sum of (w * dL/dw)^2 / 2, L the loss of that window.

    Holds no gradient. values: by name, one number per window; 0 where no gradient came.
    """

    def __init__(self, parameters: Mapping[str, Tensor], windows: int) -> None:
        self.parameters = parameters
        self.values = {name: [0.0] * windows for name in parameters}

    def take(self, window: int, name: str, gradient: Tensor) -> None:
        pieces = in_float(self.parameters[name], gradient)
        self.values[name][window] = _sum([float((w * g).square().sum()) / 2 for w, g in pieces])

    def done(self, prefix: str) -> None: ...


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _of_layer(model: nn.Module, layer: Layer, everywhere: Mapping[int, int]) -> dict[Mask, list[str]]:
    own = {part.block: _names(model, [*part.modules, *part.idle], everywhere) for part in layer.parts}
    found = {frozenset([part.block]): [] if part.kept else own[part.block] for part in layer.parts}
    if layer.shared:
        inside = {name for names in own.values() for name in names}
        leaving = layer.idle if layer.shell else [layer.path]
        rest = [name for name in _names(model, leaving, everywhere) if name not in inside]
        together = frozenset(own)
        found[together] = found.get(together, []) + rest
    return found


def _names(model: nn.Module, paths: Iterable[str], everywhere: Mapping[int, int]) -> list[str]:
    """Parameters at these paths and nowhere else, each under its first name; the anatomy counts them in this way.

    everywhere: how many names each parameter of the model has, by its id.
    """
    here = [
        (name, p)
        for path in paths
        for name, p in model.get_submodule(path).named_parameters(prefix=path, remove_duplicate=False)
    ]
    times = Counter(id(p) for _, p in here)
    first = {id(p): name for name, p in reversed(here)}
    return [name for name, p in here if times[id(p)] == everywhere[id(p)] and first[id(p)] == name]
