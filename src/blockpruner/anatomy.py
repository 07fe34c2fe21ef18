"""Model -> Anatomy: where the blocks sit, how they join the residual stream, and the proof.

An anatomy is data: paths, stand-ins as JSON, sizes. It is read from behaviour alone (`branches`), once per distinct
layer structure, and proved on every layer with the model's own weights, twice: with all its blocks silent the layer
returns its input bit for bit, and silencing one block equals setting all weights of that block to zero. The latter is
proved once more in the whole model, where a block may hand on more than the stream.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from blockpruner.blocks import Block, Mask, Outline
from blockpruner.branches import MISFIT, Dissection, Spec, dissect, runs_to_stream, template
from blockpruner.errors import UnsupportedModelError, is_out_of_memory
from blockpruner.probing import (
    Key,
    SeenLayer,
    accepts,
    cache_writes,
    evaluating,
    example_inputs,
    find_stacks,
    stood_in,
    with_parameters,
    zeroed,
)


@dataclass(frozen=True)
class Part:
    """One block of the model: where it sits and what goes with it.

    modules: path -> stand-in of the module whose output is the branch; idle: the same for what only it needed;
    parameters: number that leave with it; compute: its share of the multiply-adds of one short forward pass, 0 to 1
    (None where they could not be counted); cache_bytes: key/value bytes per token and sequence; evidence: what
    decided its kind.
    """

    block: Block
    modules: Mapping[str, Spec]
    idle: Mapping[str, Spec]
    parameters: int
    compute: float | None
    cache_bytes: int
    evidence: str

    @property
    def path(self) -> str:
        return next(iter(self.modules))


@dataclass(frozen=True)
class Layer:
    """One layer: its path, the argument that carries the stream, its parts in the order they run.

    through: the stand-in that hands the stream through in the structure the layer returns;
    idle: what does nothing once all parts are gone (a norm that they share), of `shared` parameters.
    """

    path: str
    hidden: Key
    through: Spec
    parts: tuple[Part, ...]
    idle: Mapping[str, Spec]
    shared: int


@dataclass(frozen=True)
class Stack:
    """One stack of layers; `name` is empty when it is the only one. serial: see `Outline`."""

    name: str
    path: str
    layers: tuple[Layer, ...]
    serial: bool


@dataclass(frozen=True)
class Anatomy:
    """All stacks of a model, proved."""

    stacks: tuple[Stack, ...]
    total_parameters: int

    @cached_property
    def parts(self) -> dict[Block, Part]:
        """Every part by its block, in the order they run."""
        return {part.block: part for stack in self.stacks for layer in stack.layers for part in layer.parts}

    @cached_property
    def outline(self) -> Outline:
        return Outline(
            tuple(self.parts),
            {block: part.parameters for block, part in self.parts.items()},
            self.total_parameters,
            frozenset(stack.name for stack in self.stacks if stack.serial),
            {(s.name, i): layer.shared for s in self.stacks for i, layer in enumerate(s.layers) if layer.shared},
        )

    def stand_ins(self, removed: Iterable[Block]) -> dict[str, Spec]:
        """path -> stand-in for everything that these blocks and only they need; InputError for an unknown block."""
        mask = frozenset(removed)
        self.outline.check(mask, "the set of blocks to remove")
        specs: dict[str, Spec] = {}
        for stack in self.stacks:
            for layer in stack.layers:
                specs |= layer_stand_ins(layer, mask)
        return specs


def layer_stand_ins(layer: Layer, mask: Mask) -> dict[str, Spec]:
    """path (below the model) -> stand-in for what `mask` takes out of one layer."""
    specs: dict[str, Spec] = {}
    for part in layer.parts:
        if part.block in mask:
            specs |= {**part.modules, **part.idle}
    if all(part.block in mask for part in layer.parts):
        specs |= layer.idle
    return specs


def read_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find and prove the blocks of `model`, in eval mode; it is left as it was.

    Cost: seven forward passes of 2 x 16 tokens, and per layer about three more of that layer per block.
    UnsupportedModelError names the layer, what was seen, and why it is no proof.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder, whose cross-attention is not proved yet",
            fix="give a model of one stack: a decoder, or an encoder",
        )
    with evaluating(model):
        return _read(model)


def _read(model: PreTrainedModel) -> Anatomy:
    inputs = example_inputs(model)
    seen = find_stacks(model, inputs)
    known: dict[tuple[Any, ...], Dissection] = {}
    stacks = []
    for path, layers in seen.items():
        for layer in layers:
            if (structure := _structure(layer.module)) not in known:
                known[structure] = dissect(layer)
        dissections = [known[_structure(layer.module)] for layer in layers]
        name = _stack_name(path, list(seen))
        stacks.append(_stack(model, name, path, layers, dissections))
    for first in (0, 1):
        _prove_apart(model, [layer for stack in stacks for layer in stack.layers[first::2]], inputs)
    writes, cache_bytes = _cache_use(model, stacks, inputs)
    flops = _compute(model, inputs)
    finished = tuple(_finished(stack, writes, cache_bytes, flops) for stack in stacks)
    return Anatomy(finished, sum(p.numel() for p in model.parameters()))


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of the same modules and the same parameter shapes."""
    return tuple(
        (name, type(inner).__name__, tuple((n, tuple(p.shape)) for n, p in inner.named_parameters(recurse=False)))
        for name, inner in module.named_modules()
    )


def _stack_name(path: str, paths: list[str]) -> str:
    if len(paths) == 1:
        return ""
    for word in ("encoder", "decoder"):
        if word in path and sum(word in other for other in paths) == 1:
            return word
    return path.replace(".", "_")


def _stack(model: nn.Module, name: str, path: str, layers: list[SeenLayer], dissections: list[Dissection]) -> Stack:
    made = []
    for index, (layer, dissection) in enumerate(zip(layers, dissections, strict=True)):
        with torch.no_grad():
            _prove(layer, dissection)
        slots: dict[str, int] = {}
        parts = []
        for branch in dissection.branches:
            slot = slots[branch.kind] = slots.get(branch.kind, -1) + 1
            modules, idle = _below(layer.path, branch.modules), _below(layer.path, branch.idle)
            size = _count(model, [*modules, *idle])
            parts.append(Part(Block(branch.kind, index, name, slot), modules, idle, size, None, 0, branch.evidence))
        through = {"input": layer.hidden, "output": template(layer.call.output, "input")}
        idle = _below(layer.path, dissection.idle)
        made.append(Layer(layer.path, layer.hidden, through, tuple(parts), idle, _count(model, idle)))
    same = len({_structure(layer.module) for layer in layers}) == 1
    return Stack(name, path, tuple(made), same and all(d.serial for d in dissections))


def _below(path: str, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    return {f"{path}.{inner}": spec for inner, spec in specs.items()}


def _count(model: nn.Module, paths: Iterable[str]) -> int:
    unique = {id(p): p.numel() for path in paths for p in model.get_submodule(path).parameters()}
    return sum(unique.values())


def _prove(layer: SeenLayer, dissection: Dissection) -> None:
    """Both proofs of the module's head, on the layer's own weights, and that idle modules may go too."""
    everything: dict[str, Spec] = dict(dissection.idle)
    for branch in dissection.branches:
        everything |= {**branch.modules, **branch.idle}
        alone = runs_to_stream(layer, branch.modules)
        if not torch.equal(runs_to_stream(layer, {**branch.modules, **branch.idle}), alone):
            raise _unproved(layer, f"leaving out {', '.join(branch.idle)} changes the layer without its {branch.kind}")
        (path,) = branch.modules
        with with_parameters(layer.module.get_submodule(path), zeroed):
            reference = runs_to_stream(layer, {})
        if not torch.equal(alone, reference):
            gap = float((alone - reference).abs().max())
            raise _unproved(
                layer, f"without {path} it differs by {gap:.3g} from the same with all weights of {path} zero"
            )
    if not torch.equal(runs_to_stream(layer, everything), layer.stream):
        raise _unproved(layer, "with all blocks silent it is not the identity")


def _prove_apart(model: PreTrainedModel, layers: list[Layer], inputs: Mapping[str, torch.Tensor]) -> None:
    """In the whole model too, silencing all that mixes tokens in these layers equals setting its weights to zero.

    What such a block hands on beside the stream (keys and values, a table of positions) shows in the layers between.
    """
    parts = [part for layer in layers for part in layer.parts if part.block.kind != "mlp"]
    specs = {path: spec for part in parts for path, spec in part.modules.items()}
    with torch.no_grad(), contextlib.ExitStack() as zeros:
        for path in specs:
            zeros.enter_context(with_parameters(model.get_submodule(path), zeroed))
        reference = model(**inputs)[0]
    try:
        with torch.no_grad(), stood_in(model, specs):
            same = torch.equal(model(**inputs)[0], reference)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        same = False
    if not same:
        raise UnsupportedModelError(
            f"{type(model).__name__}: other layers use more of {', '.join(specs)} than what they add to the stream",
            fix="nothing is removed that is not proved; report the model's type and this message",
        )


def _unproved(layer: SeenLayer, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{layer.path} ({type(layer.module).__name__}): {reason}",
        fix="nothing is removed that is not proved; report the model's type and this message",
    )


def _cache_use(
    model: PreTrainedModel, stacks: list[Stack], inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Which module writes which cache slots, and the key/value bytes per token of each slot; empty without a cache."""
    if not accepts(model, "past_key_values"):
        return {}, {}
    parts = [part for stack in stacks for layer in stack.layers for part in layer.parts]
    watched = {path: model.get_submodule(path) for part in parts for path in (*part.modules, *part.idle)}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad(), cache_writes(watched) as writes:
        model(**inputs, past_key_values=cache, use_cache=True)
    held = {i: [getattr(slot, name, None) for name in ("keys", "values")] for i, slot in enumerate(cache.layers)}
    sizes = {
        i: sum(t.shape[1] * t.shape[3] * t.element_size() for t in pair if isinstance(t, torch.Tensor) and t.ndim == 4)
        for i, pair in held.items()
    }
    return writes, sizes


def _compute(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
    """Share of the multiply-adds of one short forward pass, by module path; empty where torch cannot count them."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})
    try:
        with torch.no_grad(), counter:
            model(**inputs)
    except (AssertionError, *MISFIT):  # the counter's own hooks do not bear every module's arguments
        return {}
    total = counter.get_total_flops() or 1
    prefix = f"{type(model).__name__}."
    return {path.removeprefix(prefix): sum(ops.values()) / total for path, ops in counter.get_flop_counts().items()}


def _grouped_flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of routed experts, [tokens, in] x [experts, in, out]: each token meets one expert per row it has here."""
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _finished(
    stack: Stack, writes: Mapping[str, list[int]], cache_bytes: Mapping[int, int], flops: Mapping[str, float]
) -> Stack:
    """The stack with what the whole model's passes showed: cache slots in the stand-ins, shares, bytes."""

    def with_slots(specs: Mapping[str, Spec]) -> dict[str, Spec]:
        return {path: {**spec, "cache": writes[path]} if path in writes else spec for path, spec in specs.items()}

    def part_of(part: Part) -> Part:
        paths = [*part.modules, *part.idle]
        slots = {slot for path in paths for slot in writes.get(path, ())}
        share = sum(flops.get(path, 0.0) for path in paths) if flops else None
        return replace(
            part,
            modules=with_slots(part.modules),
            idle=with_slots(part.idle),
            compute=share,
            cache_bytes=sum(cache_bytes.get(slot, 0) for slot in slots),
        )

    layers = tuple(replace(layer, parts=tuple(map(part_of, layer.parts))) for layer in stack.layers)
    return replace(stack, layers=layers)
