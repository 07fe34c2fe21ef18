"""The proof of an anatomy on the model's own weights, layer by layer and in the whole model."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from blockpruner.anatomy.branches import (
    Dissection,
    carries,
    not_understood,
    nulled_stream,
    runs_to_stream,
    skeleton,
)
from blockpruner.anatomy.parts import Layer, Part, Spec
from blockpruner.anatomy.probing import MISFIT, SeenLayer, nulled, stood_in, unfilled
from blockpruner.errors import UnsupportedModelError, is_out_of_memory


def prove_layer(layer: SeenLayer, dissection: Dissection) -> bool:
    """Prove a dissection on the layer's own weights; returns whether the layer is the identity without its blocks.

    Without what stands in the place of blocks removed earlier too, that is; it stays in all else that is compared.

    Each block alone, without and with the modules that idle then, equals its last projection at zero; all of them
    together leave the skeleton.
    """
    everything: dict[str, Spec] = dict(dissection.idle)
    for branch in dissection.branches:
        everything |= {**branch.modules, **branch.idle}
        alone = runs_to_stream(layer, branch.modules)
        if not torch.equal(runs_to_stream(layer, {**branch.modules, **branch.idle}), alone):
            raise not_understood(
                layer, f"leaving out {', '.join(branch.idle)} changes the layer without its {branch.kind}"
            )
        reference = nulled_stream(layer, branch.outlets)
        if not torch.equal(alone, reference):
            gap = float((alone - reference).abs().max())
            (path,) = branch.modules
            reason = f"without {path} it differs by {gap:.3g} from the same with {', '.join(branch.outlets)} at zero"
            raise not_understood(layer, reason)
    outlets = [outlet for branch in dissection.branches for outlet in branch.outlets]
    bare = skeleton(layer) if dissection.whole else nulled_stream(layer, outlets)
    if not torch.equal(runs_to_stream(layer, everything), bare):
        raise not_understood(layer, "with all blocks silent it does more than with their projections at zero")
    with unfilled(layer.module):
        identity = torch.equal(runs_to_stream(layer, everything), layer.stream)
    if not identity and dissection.whole and not carries(layer):
        raise not_understood(layer, "with all its projections at zero its stream does not get through")
    return identity


def proved(model: PreTrainedModel, layers: list[Layer], inputs: Mapping[str, torch.Tensor]) -> list[Layer]:
    """The layers, proved in the whole model: there too a silent block equals one whose last projection is zero.

    What a block hands on beside the stream (keys and values, a table of positions) shows in the layers between. Where
    others use it, the block's module is kept running, and only its contribution is silenced; likewise for whole layers.
    """
    layers = list(layers)
    for first in (0, 1):
        for whole in (False, True):
            chosen = [i for i in range(first, len(layers), 2) if layers[i].parts and not (whole and layers[i].shell)]
            if _agrees(model, [layers[i] for i in chosen], whole, inputs):
                continue
            for number, i in enumerate(chosen):
                before = [layers[j] for j in chosen[:number]]
                layers[i] = _keeping(model, before, layers[i], whole, inputs)
            if not _agrees(model, [layers[i] for i in chosen], whole, inputs):
                paths = ", ".join(layers[i].path for i in chosen)
                raise UnsupportedModelError(
                    f"{type(model).__name__}: other layers use more of {paths} than what they add to the stream",
                    fix="nothing is removed that is not proved; docs/teaching.md explains this",
                )
    return layers


def _agrees(model: PreTrainedModel, layers: list[Layer], whole: bool, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model without these layers' blocks, or these `whole` layers, is the one in which they add nothing."""
    parts = [part for layer in layers for part in layer.parts]
    if whole:
        specs = {layer.path: layer.through for layer in layers if not layer.shell}
    else:
        specs = {path: spec for part in parts for path, spec in part.modules.items()}
    # What a module remembers of the call before would be right by chance, were that call about the same tokens.
    model(**{name: ids.flip(1) for name, ids in inputs.items()})
    try:
        with stood_in(model, specs):
            found = model(**inputs)[0]
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return False
    muffled = {path: {**spec, "keep": True} for path, spec in specs.items()} if whole else {}
    with stood_in(model, muffled), nulled(model, [] if whole else [name for part in parts for name in part.outlets]):
        return torch.equal(found, model(**inputs)[0])


def _keeping(
    model: PreTrainedModel, before: list[Layer], layer: Layer, whole: bool, inputs: Mapping[str, torch.Tensor]
) -> Layer:
    """The layer, with whatever others need of it kept running; the layers `before` are removed as well."""
    if whole:
        if _agrees(model, [*before, layer], whole, inputs):
            return layer
        if layer.identity:
            return replace(layer, shell=True, shared=0)
        return replace(layer, through={**layer.through, "keep": True})
    parts: list[Part] = []
    for part in layer.parts:
        parts.append(part)
        if not _agrees(model, [*before, replace(layer, parts=tuple(parts))], whole, inputs):
            modules = {path: {**spec, "keep": True} for path, spec in part.modules.items()}
            parts[-1] = replace(part, modules=modules, idle={})
    return replace(layer, parts=tuple(parts))
