"""Model -> Anatomy: where the blocks sit, how they join the residual stream, and the proof.

An anatomy is data: paths, stand-ins as JSON, sizes. It is read from behaviour (`branches`), once per distinct layer
structure, and proved on the model's own weights (`proof`): silencing one block equals setting its last projection to
zero, bit for bit, and silencing all of them leaves the layer's skeleton. Then it is proved in the whole model, where
a block may hand on more than the stream; what others need of it is kept running there. What a recovery put in the place
of a removed block is no block: it stays in all that is compared, and a layer that has it stays, also without blocks.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from blockpruner.anatomy.branches import (
    Dissection,
    Spec,
    dissect,
    template,
)
from blockpruner.anatomy.caches import CacheUse, cache_use
from blockpruner.anatomy.parts import Anatomy, Layer, Part, Stack
from blockpruner.anatomy.probing import (
    MISFIT,
    SeenLayer,
    evaluating,
    example_inputs,
    fillings,
    find_stacks,
)
from blockpruner.anatomy.proof import prove_layer, proved
from blockpruner.blocks import Block
from blockpruner.errors import UnsupportedModelError, is_out_of_memory
from blockpruner.loading.lending import at_hand

_log = logging.getLogger("blockpruner")


def read_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find and prove the blocks of `model`, in eval mode; it is left as it was.

    Cost: eighteen forward passes of 2 x 16 tokens, more where blocks hand on more than the stream, and per layer about
    four of that layer per block. UnsupportedModelError names the layer, what was seen, and why it is no proof.
    """
    try:
        with evaluating(model), torch.no_grad():
            return _read(model)
    except MISFIT as error:
        if is_out_of_memory(error) or isinstance(error, UnsupportedModelError):
            raise
        reason = f"{type(model).__name__}: a layer does not run a second time ({type(error).__name__}: {error})"
        raise UnsupportedModelError(reason, fix="report the model's type and this message") from error


def _read(model: PreTrainedModel) -> Anatomy:
    inputs = example_inputs(model)
    seen = find_stacks(model, inputs)
    use = cache_use(model, _within(layer for layers in seen.values() for layer in layers), inputs)
    stacks: list[Stack] = []
    left: dict[str, UnsupportedModelError] = {}
    for path, layers in seen.items():
        name = _stack_name(path, list(seen)) if len(seen) > 1 or model.config.is_encoder_decoder else ""
        try:
            stacks.append(_stack(model, name, path, layers, use))
        except UnsupportedModelError as error:
            left[path] = error
    if not stacks:
        raise next(iter(left.values()))
    for error in left.values():
        _log.warning("left alone: %s", error.what)
    layers = proved(model, [layer for stack in stacks for layer in stack.layers], inputs)
    flops = _compute(model, inputs)
    made = iter(_finished(layer, use, flops) for layer in layers)
    finished = tuple(replace(stack, layers=tuple(itertools.islice(made, len(stack.layers)))) for stack in stacks)
    reasons = {path: error.what for path, error in left.items()}
    return Anatomy(finished, sum(p.numel() for p in model.parameters()), reasons)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of the same modules and the same parameter shapes."""
    return tuple(
        (name, type(inner).__name__, tuple((n, tuple(p.shape)) for n, p in inner.named_parameters(recurse=False)))
        for name, inner in module.named_modules()
    )


def _stack_name(path: str, paths: list[str]) -> str:
    roles = {p: next((step for step in p.split(".") if step.endswith(("encoder", "decoder"))), "") for p in paths}
    role = roles[path][-len("encoder") :]
    if role and sum(other.endswith(role) for other in roles.values()) == 1:
        return role
    return "" if len(paths) == 1 else path.replace(".", "_")


def _within(layers: Iterable[SeenLayer]) -> dict[str, nn.Module]:
    """All modules of these layers by path, the layers too."""
    return {path: module for layer in layers for path, module in layer.module.named_modules(prefix=layer.path)}


def _stack(model: nn.Module, name: str, path: str, layers: list[SeenLayer], use: CacheUse) -> Stack:
    known: dict[tuple[Any, ...], Dissection] = {}
    for layer in layers:
        if (structure := _structure(layer.module)) not in known:
            with at_hand(layer.module):
                known[structure] = dissect(layer, use)
    dissections = [known[_structure(layer.module)] for layer in layers]
    made = []
    for index, (layer, dissection) in enumerate(zip(layers, dissections, strict=True)):
        with at_hand(layer.module):
            identity = prove_layer(layer, dissection)
        slots: dict[str, int] = {}
        parts = []
        for branch in dissection.branches:
            slot = slots[branch.kind] = slots.get(branch.kind, -1) + 1
            modules, idle = (_below(layer.path, specs, use) for specs in (branch.modules, branch.idle))
            outlets = tuple(f"{layer.path}.{outlet}" for outlet in branch.outlets)
            size = _count(model, [*modules, *idle])
            block = Block(branch.kind, index, name, slot)
            parts.append(Part(block, modules, outlets, idle, size, None, 0, branch.evidence))
        through = use.completed(layer.path, {"input": layer.hidden, "output": template(layer.call, "input")})
        idle = _below(layer.path, dissection.idle, use)
        rest = _count(model, [layer.path]) - sum(part.parameters for part in parts) if parts else 0
        filled, alone = bool(fillings(layer.module)), _count(model, idle)
        shell, rest = filled or (identity and alone == rest), alone if filled else rest
        made.append(Layer(layer.path, layer.hidden, through, identity, shell, tuple(parts), idle, rest, filled))
    same = len({_structure(layer.module) for layer in layers}) == 1
    return Stack(name, path, tuple(made), same and all(d.serial for d in dissections))


def _below(path: str, specs: Mapping[str, Spec], use: CacheUse) -> dict[str, Spec]:
    """Stand-ins by their paths below the model, completed by what they do with a cache."""
    return {f"{path}.{inner}": use.completed(f"{path}.{inner}", spec) for inner, spec in specs.items()}


def _count(model: nn.Module, paths: Iterable[str]) -> int:
    """Number of parameters at these paths and nowhere else: a tied one stays while another module has it."""
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    here = [p for path in paths for _, p in model.get_submodule(path).named_parameters(remove_duplicate=False)]
    found = Counter(map(id, here))
    return sum({id(p): p.numel() for p in here if found[id(p)] == everywhere[id(p)]}.values())


def _compute(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
    """Share of the multiply-adds of one short forward pass, by module path; empty where torch cannot count them."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    try:
        with counter:
            model(**inputs)
    except (AssertionError, *MISFIT):  # the counter's own hooks do not bear every module's arguments
        return {}
    total = counter.get_total_flops() or 1
    prefix = f"{type(model).__name__}."
    return {path.removeprefix(prefix): sum(ops.values()) / total for path, ops in counter.get_flop_counts().items()}


def grouped_flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of routed experts, [tokens, in] x [experts, in, out]: each token meets one expert per row it has here."""
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _finished(layer: Layer, use: CacheUse, flops: Mapping[str, float]) -> Layer:
    """The layer with what the whole model's passes showed: bytes in the cache, shares of compute."""

    def sized(part: Part) -> Part:
        paths = [*part.modules, *part.idle]
        held = sum(w.size for path in paths for w in use.writes.get(path, ()) if w.kind != "state")
        if part.kept:
            return replace(part, parameters=0, compute=0.0 if flops else None, cache_bytes=held)
        return replace(part, compute=sum(flops.get(p, 0.0) for p in paths) if flops else None, cache_bytes=held)

    stays = layer.through.get("keep") and not layer.shell
    return replace(layer, shared=0 if stays else layer.shared, parts=tuple(map(sized, layer.parts)))
