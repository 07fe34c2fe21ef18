"""Maps that need no place of their own: folded into the last projection of the block before them.

What a kept block adds to the stream is m = h W (+ c). A map of m that is to be added, m B + b, is then the same as the
block with W (I + B) and c (I + B) + b, if nothing but a sum stands between its projection and the stream. Whether that
is so is not read off, but tried: the projection is given a random map (of rank one, which costs little), and the layer
must return what that should make.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockpruner.anatomy.parts import Anatomy, Layer, Part
from blockpruner.anatomy.probing import MISFIT, SeenLayer, evaluating, example_inputs, find_stacks, stood_in
from blockpruner.errors import is_out_of_memory
from blockpruner.surgery.gaps import reweighted


@dataclass(frozen=True)
class Projection:
    """The one projection that a block ends in. turned: whether its weight is [outputs, inputs], as of nn.Linear."""

    weight: str
    bias: str | None
    turned: bool

    def folded(self, model: nn.Module, inner: Tensor, added: Tensor) -> dict[str, Tensor] | None:
        """Its parameters with (I + inner) behind it and `added` put on; None if `added` is not zero and has no place.

        inner: [outputs, outputs], added: [outputs], float64. The products are made in float64 and rounded once.
        """
        behind = torch.eye(len(inner), dtype=torch.float64, device=inner.device) + inner
        weight = model.get_parameter(self.weight).data
        wide = weight.to(behind)
        folded = {self.weight: (behind.T @ wide if self.turned else wide @ behind).to(weight).contiguous()}
        if self.bias is not None:
            bias = model.get_parameter(self.bias).data
            return folded | {self.bias: (bias.to(behind) @ behind + added).to(bias)}
        return None if bool(added.any()) else folded

    def nudged(self, model: nn.Module, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Its parameters with I + left right^T behind it, both [outputs]; costs no more than reading them."""
        weight = model.get_parameter(self.weight).data
        wide = weight.to(left)
        more = torch.outer(right, left @ wide) if self.turned else torch.outer(wide @ left, right)
        nudged = {self.weight: (wide + more).to(weight)}
        if self.bias is not None:
            bias = model.get_parameter(self.bias).data
            nudged[self.bias] = (bias.to(left) + (bias.to(left) @ left) * right).to(bias)
        return nudged


def foldable(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, str]:
    """By block, as text, why no map can be folded into its last projection; empty where one can.

    Cost: one short forward pass, and per block four of its layer and a few readings of its weights.
    """
    with evaluating(model), torch.no_grad():
        seen = {layer.path: layer for layers in find_stacks(model, example_inputs(model)).values() for layer in layers}
        return {
            str(part.block): _obstacle(model, layer, part, seen[layer.path])
            for stack in anatomy.stacks
            for layer in stack.layers
            for part in layer.parts
        }


def projection(model: nn.Module, part: Part) -> Projection | str:
    """The projection that a block ends in, or why there is not one."""
    owners = {name.rpartition(".")[0] for name in part.outlets}
    linear = {owner: found for owner in owners if isinstance(found := model.get_submodule(owner), (nn.Linear, Conv1D))}
    if len(linear) != 1:
        names = ", ".join(name.removeprefix(f"{part.path}.") for name in part.outlets)
        return f"it does not end in one linear projection, but in {names}"
    ((owner, kind),) = linear.items()
    weight = f"{owner}.weight"
    tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is kind.weight and name != weight]
    if tied:
        return f"its projection is also {tied[0]}"
    return Projection(weight, f"{owner}.bias" if kind.bias is not None else None, isinstance(kind, nn.Linear))


def _obstacle(model: PreTrainedModel, layer: Layer, part: Part, seen: SeenLayer) -> str:
    if part.kept:
        return "other blocks use what it makes"
    if not layer.identity:
        return "norms or scales stand on the stream behind it"
    found = projection(model, part)
    if isinstance(found, str):
        return found
    later = layer.parts[layer.parts.index(part) + 1 :]
    silent = {path: spec for p in later for path, spec in {**p.modules, **p.idle}.items()}
    try:
        with stood_in(model, silent):
            whole = seen.flows()
            with stood_in(model, {**part.modules, **part.idle}):  # not the projection alone: it may be a share of it
                update = whole - seen.flows()
            width = model.get_parameter(found.weight).shape[0 if found.turned else 1]
            generator = torch.Generator().manual_seed(0)
            exact = torch.promote_types(whole.dtype, torch.float32)
            left, right = torch.randn(2, width, generator=generator).to(update.device, exact) / width**0.25
            expected = whole + torch.outer((update.to(exact) @ left).flatten(), right).reshape(update.shape).to(whole)
            with reweighted(model, found.nudged(model, left, right)):
                folded = seen.flows()
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return f"its projection cannot be changed alone ({type(error).__name__})"
    near, far = (1e-4, 1e-5) if whole.dtype.itemsize >= 4 else (5e-2, 2e-2)
    room = near * float(update.abs().max()) + far * float(whole.abs().max())
    behind = [path.rpartition(".")[2] for path in part.idle if "norm" in path.lower()]
    return "" if float((folded - expected).abs().max()) <= room else _between(behind)


def _between(norms: list[str]) -> str:
    said = f" (it has {', '.join(norms)})" if norms else ""
    return f"more than a sum stands between its last projection and the stream{said}"
