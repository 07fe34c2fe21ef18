"""Whole layers out of what is left: scattered removals that pair up again make an ordinary, smaller model.

In a serial stack (attention, then mlp, each for itself) the blocks that are kept form one sequence. Where an attention
block is directly followed by an mlp block, the two make one ordinary layer, also when they come from two layers.
If everything pairs up, the model is a stock model with fewer layers; nothing else about it is special.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from blockpruner.blocks import Mask
from blockpruner.parts import Anatomy, Layer, Stack
from blockpruner.probing import replaced


@dataclass(frozen=True)
class NewLayer:
    """An ordinary layer made of the mixing half of layer `mixing` and the mlp half of layer `mlp` (indices)."""

    mixing: int
    mlp: int


def repack(stack: Stack, mask: Mask) -> tuple[NewLayer, ...] | None:
    """The layers that remain of `stack` without `mask`, or None where they are not whole layers."""
    made: list[NewLayer] = []
    waiting: int | None = None  # a mixing half that has not met its mlp
    for index, layer in enumerate(stack.layers):
        kept = [part.block for part in layer.parts if part.block not in mask]
        if len(kept) == len(layer.parts):
            if waiting is not None:
                return None
            made.append(NewLayer(index, index))
        elif kept:
            if not stack.serial or (kept[0].kind == "mlp") != (waiting is not None):
                return None
            if waiting is None:
                waiting = index
            else:
                made.append(NewLayer(waiting, index))
                waiting = None
    return tuple(made) if waiting is None and made else None


@contextlib.contextmanager
def repacked(model: PreTrainedModel, anatomy: Anatomy, mask: Mask) -> Iterator[bool]:
    """While the block runs, `model` has the module tree and configuration of the smaller stock model, fit to be saved.

    Yields False, and changes nothing, where what is left is not whole layers or no configuration describes it.
    The model cannot be called meanwhile: layer indices inside its modules are those of the whole model.
    """
    with contextlib.ExitStack() as undo:
        config = model.config
        for stack in anatomy.stacks:
            layers = repack(stack, mask)
            if layers is None:
                yield False
                return
            if len(layers) == len(stack.layers):
                continue
            shrunk = _smaller_config(model, config, stack, layers)
            if shrunk is None:
                yield False
                return
            config = shrunk
            undo.enter_context(_joined(model, stack, layers))
            chosen = nn.ModuleList(model.get_submodule(stack.layers[new.mixing].path) for new in layers)
            undo.enter_context(replaced(model, {stack.path: chosen}))
        undo.callback(setattr, model, "config", model.config)
        model.config = config
        yield True


@contextlib.contextmanager
def _joined(model: nn.Module, stack: Stack, layers: tuple[NewLayer, ...]) -> Iterator[None]:
    """While the block runs, each new layer's mixing half has its mlp half's modules in place of its own."""
    borrowed = {}
    for new in layers:
        if new.mixing != new.mlp:
            home, source = stack.layers[new.mixing], stack.layers[new.mlp]
            for path in _mlp_paths(source):
                borrowed[f"{home.path}{path.removeprefix(source.path)}"] = model.get_submodule(path)
    with replaced(model, borrowed):
        yield


def _mlp_paths(layer: Layer) -> list[str]:
    return [path for part in layer.parts if part.block.kind == "mlp" for path in (*part.modules, *part.idle)]


def _smaller_config(
    model: PreTrainedModel, config: PreTrainedConfig, stack: Stack, layers: tuple[NewLayer, ...]
) -> PreTrainedConfig | None:
    """A configuration that makes exactly these layers; the field that counts layers is found by trial."""
    before = len(stack.layers)
    for path, fields in _dictionaries(config.to_dict()):
        for name, value in fields.items():
            if type(value) is not int or value != before or not any(word in name for word in ("layer", "depth")):
                continue
            tried = config.to_dict()
            target = tried
            for key in path:
                target = target[key]
            target |= _cut_lists(fields, before, layers)
            target[name] = len(layers)
            made = _shapes(model, type(config), tried, stack.path)
            if made is not None and made == _expected(model, stack, layers):
                return type(config).from_dict(tried)
    return None


def _dictionaries(
    config: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The configuration and the configurations nested in it (text towers)."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            yield from _dictionaries(value, (*path, key))


def _cut_lists(fields: Mapping[str, Any], before: int, layers: tuple[NewLayer, ...]) -> dict[str, Any]:
    """Per-layer lists cut: settings of the mlp from the mlp half's layer, all others from the mixing half's."""
    cut = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)):
            continue
        mlp = any(word in name for word in ("mlp", "moe", "dense", "sparse"))
        sources = [new.mlp if mlp else new.mixing for new in layers]
        if len(value) == before:
            cut[name] = [value[source] for source in sources]
        elif ("layer" in name or name.endswith("_idxs")) and all(type(entry) is int for entry in value):
            cut[name] = [index for index, source in enumerate(sources) if source in value]
    return cut


def _shapes(
    model: PreTrainedModel, config: type[PreTrainedConfig], fields: dict[str, Any], path: str
) -> list[dict[str, tuple[int, ...]]] | None:
    """Parameter shapes of each layer that a model of these fields would have; None where they make no model."""
    try:
        with torch.device("meta"):
            trial = type(model)(config.from_dict(fields))
        layers = trial.get_submodule(path)
    except Exception:  # any failure of a trial means that this is not the field
        return None
    return [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in layers.children()]


def _expected(model: nn.Module, stack: Stack, layers: tuple[NewLayer, ...]) -> list[dict[str, tuple[int, ...]]]:
    with _joined(model, stack, layers):
        made = [model.get_submodule(stack.layers[new.mixing].path) for new in layers]
        return [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in made]
