"""The anatomy of every family that must work, against the table that was written by hand."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import towers
import transformers
import zoo
from golden import GOLDEN, VARIANTS, Golden, Layer, Stack
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_rows import ROWS

from blockpruner.anatomy import parts
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block, Kind

FLOAT = 4  # bytes

KNOWN = {str(entry) for entry in zoo.entries()}
FAMILIES = [family for family in GOLDEN if family.startswith("tower/") or family.partition(" ")[0] in KNOWN]
YOUNGER = {"causal/gemma4_text", "causal/gemma4_text (26b-a4b)", "causal/minicpm3"}  # than the oldest transformers

on_each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.lru_cache(maxsize=1)
def model_of(family: str) -> zoo.LanguageModel:
    source, _, name = family.partition("/")
    if source == "tower":
        return towers.build(name)
    return variant(family) if family in VARIANTS else zoo.build(family)


def variant(family: str) -> zoo.LanguageModel:
    """The tiny model of the zoo, with other fields in its configuration."""
    entry = zoo.Entry.parse(family.partition(" ")[0])
    fields = ROWS.get(entry.model_type, {}) | VARIANTS[family]
    config = zoo.shrunk(CONFIG_MAPPING[entry.model_type], fields, decoder=entry.head == "causal")
    model = zoo.model_class(entry)._from_config(config, dtype=torch.float32)
    zoo.perturb(model, seed=0)
    return model.eval()


def size(model: nn.Module, base: str, modules: Iterable[str]) -> int:
    """Number of parameters that are in these modules below `base` and nowhere else: tied ones stay with the others."""
    inside = tuple(f"{base}.{name}." for name in modules)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return sum(p.numel() for p, found in names.items() if all(name.startswith(inside) for name in found))


def blocks_of(stack: Stack, index: int) -> list[Block]:
    """The names of the blocks of one layer: those of one kind are counted in the order they run."""
    kinds: list[Kind] = [row.kind for row in stack.layers[index].rows]
    return [Block(kind, index, stack.name, kinds[:place].count(kind)) for place, kind in enumerate(kinds)]


def differences(golden: Golden, anatomy: parts.Anatomy, model: nn.Module) -> list[str]:
    """What the anatomy says otherwise than the table, a line each."""
    shape = [(stack.name, stack.path, len(stack.layers)) for stack in golden]
    seen = [(stack.name, stack.path, len(stack.layers)) for stack in anatomy.stacks]
    if shape != seen:
        return [f"stacks: {shape} in the table, {seen} in the anatomy"]
    found = []
    for expected, stack in zip(golden, anatomy.stacks, strict=True):
        for index, (wanted, layer) in enumerate(zip(expected.layers, stack.layers, strict=True)):
            base = f"{expected.path}.{index}"
            for name, ours, theirs in compared(wanted, blocks_of(expected, index), layer, base, model):
                if ours != theirs:
                    found.append(f"{base}: {name}: {ours} in the table, {theirs} in the anatomy")
    return found


def compared(
    wanted: Layer, blocks: list[Block], layer: parts.Layer, base: str, model: nn.Module
) -> Iterator[tuple[str, object, object]]:
    """Each thing to compare in one layer: its name, what the table says, what the anatomy says."""
    yield "path", base, layer.path
    named = [(str(block), f"{base}.{row.path}") for block, row in zip(blocks, wanted.rows, strict=True)]
    seen = [(str(part.block), part.path) for part in layer.parts]
    yield "blocks", named, seen
    if named != seen:
        return
    for block, row, part in zip(blocks, wanted.rows, layer.parts, strict=True):
        yield f"idle without {block}", sorted(f"{base}.{name}" for name in row.idle), sorted(part.idle)
        yield f"{block} kept", row.kept, part.kept
        owned = 0 if row.kept else size(model, base, (row.path, *row.idle))
        yield f"parameters of {block}", owned, part.parameters
        yield f"cache bytes of {block}", row.cached * FLOAT, part.cache_bytes
    kept = any(row.kept for row in wanted.rows)
    rest = 0 if kept else size(model, base, (*wanted.shared, *wanted.outside))
    yield "parameters that leave with the last block", rest, layer.shared


def test_every_family_of_the_table_is_tested():
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert set(GOLDEN) - set(FAMILIES) <= (set() if version >= (5, 23) else YOUNGER)


def misplaced(golden: Layer, layer: nn.Module) -> list[str]:
    """Parameters of the layer that the table puts nowhere or in two places, and its places without a parameter."""
    rows = [name for row in golden.rows for name in (row.path, *row.idle)]
    places = [*rows, *golden.shared, *golden.outside]
    names = [name for name, _ in layer.named_parameters()]
    owners = {name: sum(name.startswith(f"{place}.") for place in places) for name in names}
    empty = [place for place in places if not any(name.startswith(f"{place}.") for name in names)]
    return [name for name, count in owners.items() if count != 1] + empty


@on_each_family
def test_every_parameter_of_a_layer_has_one_place_in_the_table(family):
    for stack in GOLDEN[family]:
        layers = model_of(family).get_submodule(stack.path)
        assert [misplaced(golden, layer) for golden, layer in zip(stack.layers, layers, strict=True)] == [
            [] for _ in stack.layers
        ]


@on_each_family
def test_the_anatomy_says_what_the_table_says(family):
    model = model_of(family)
    found = differences(GOLDEN[family], read_anatomy(model), model)
    assert not found, "\n".join(found)


# The comparison itself: every lie about one block is caught.

Lie = Callable[[parts.Part], parts.Part]


def half(part: parts.Part) -> parts.Part:
    ((path, spec),) = part.modules.items()
    return replace(part, modules={f"{path}.down_proj": spec})


LIES: dict[str, Lie] = {
    "another kind": lambda part: replace(part, block=replace(part.block, kind="mixer")),
    "another layer": lambda part: replace(part, block=replace(part.block, layer=part.block.layer + 1)),
    "half a branch": half,
    "a norm forgotten": lambda part: replace(part, idle={}),
    "a norm too many": lambda part: replace(part, idle={**part.idle, "model.norm": {}}),
    "a parameter too many": lambda part: replace(part, parameters=part.parameters + 1),
    "another cache": lambda part: replace(part, cache_bytes=part.cache_bytes + 1),
}


def lying(anatomy: parts.Anatomy, change: Callable[[parts.Layer], parts.Layer]) -> parts.Anatomy:
    """The anatomy with its layer 2 changed."""
    (stack,) = anatomy.stacks
    layers = [change(layer) if index == 2 else layer for index, layer in enumerate(stack.layers)]
    return replace(anatomy, stacks=(replace(stack, layers=tuple(layers)),))


@pytest.fixture(scope="module")
def llama() -> tuple[Golden, parts.Anatomy, Any]:
    model = zoo.build("causal/llama")
    return GOLDEN["causal/llama"], read_anatomy(model), model


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_one_block_is_caught(llama, lie, place):
    golden, anatomy, model = llama

    def change(layer: parts.Layer) -> parts.Layer:
        found = list(layer.parts)
        found[place] = LIES[lie](found[place])
        return replace(layer, parts=tuple(found))

    assert differences(golden, anatomy, model) == []
    assert differences(golden, lying(anatomy, change), model) != []


def test_attention_and_mlp_swapped_are_caught(llama):
    golden, anatomy, model = llama

    def kinds(layer: parts.Layer) -> parts.Layer:
        first, second = layer.parts
        return replace(layer, parts=(replace(first, block=second.block), replace(second, block=first.block)))

    def order(layer: parts.Layer) -> parts.Layer:
        return replace(layer, parts=layer.parts[::-1])

    def paths(layer: parts.Layer) -> parts.Layer:
        first, second = layer.parts
        return replace(layer, parts=(replace(second, block=first.block), replace(first, block=second.block)))

    for change in (kinds, order, paths):
        assert differences(golden, lying(anatomy, change), model) != []


def test_a_block_or_a_layer_or_a_stack_too_few_is_caught(llama):
    golden, anatomy, model = llama
    (stack,) = anatomy.stacks
    for fewer in (
        lying(anatomy, lambda layer: replace(layer, parts=layer.parts[:1])),
        lying(anatomy, lambda layer: replace(layer, shared=1)),
        replace(anatomy, stacks=(replace(stack, layers=stack.layers[:-1]),)),
        replace(anatomy, stacks=(replace(stack, name="decoder"),)),
        replace(anatomy, stacks=()),
    ):
        assert differences(golden, fewer, model) != []


def test_a_table_with_half_a_branch_or_a_module_twice_or_one_that_is_not_there_is_caught(llama):
    golden, _, model = llama
    right, layer = golden[0].layers[0], model.model.layers[0]
    first, second = right.rows
    assert misplaced(right, layer) == []
    for wrong, named in (
        (replace(right, rows=(first, replace(second, path="mlp.down_proj"))), "mlp.up_proj.weight"),
        (replace(right, rows=(first, replace(second, idle=()))), "post_attention_layernorm.weight"),
        (replace(right, shared=("input_layernorm",)), "input_layernorm.weight"),
        (replace(right, outside=("altup",)), "altup"),
    ):
        assert named in misplaced(wrong, layer)
