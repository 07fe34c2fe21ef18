"""Models that see: the blocks of their text towers, taken out while an image is in the input."""

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator

import pytest
import torch
import towers
from torch import Tensor
from towers import IMAGE, TOKENS, TOWERS, VIDEO, shared
from zoo import LanguageModel

from blockpruner.anatomy.reading import Anatomy, read_anatomy
from blockpruner.blocks import Block, Kind
from blockpruner.surgery.removal import prune_, skipped

TOLERANCE = 1e-4
PROMPT, NEW = 16, 8
LAYERS = 4
# The module that a block is, read in transformers' modelling files.
MODULES: dict[Kind, str] = {"attention": "self_attn", "mlp": "mlp"}
REMOVALS: dict[str, list[Block]] = {
    "nothing": [],
    "attention of layers 0, 1 and last": [Block("attention", layer) for layer in (0, 1, LAYERS - 1)],
    "mlp of layers 0 and 2": [Block("mlp", 0), Block("mlp", 2)],
    "all of layer 1": [Block("attention", 1), Block("mlp", 1)],
    "all attention": [Block("attention", layer) for layer in range(LAYERS)],
}

on_each_tower = pytest.mark.parametrize("name", TOWERS)
on_each_removal = pytest.mark.parametrize("removal", [removal for removal in REMOVALS if removal != "nothing"])
with_and_without_attention = pytest.mark.parametrize(
    "removal", ["nothing", "attention of layers 0, 1 and last", "all attention"]
)


@functools.cache
def anatomy_of(name: str) -> Anatomy:
    return read_anatomy(shared(name))


@contextlib.contextmanager
def without(name: str, removal: str) -> Iterator[LanguageModel]:
    with skipped(shared(name), REMOVALS[removal], anatomy=anatomy_of(name)) as model, torch.no_grad():
        yield model


def logits(model: LanguageModel, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def zeroed_by_hand(name: str, blocks: Iterable[Block]) -> LanguageModel:
    """A copy of the model in which every parameter of these blocks' modules is zero."""
    model = copy.deepcopy(shared(name))
    with torch.no_grad():
        for block in blocks:
            path = f"{TOWERS[name].text}.layers.{block.layer}.{MODULES[block.kind]}"
            for parameter in model.get_submodule(path).parameters():
                parameter.zero_()
    return model


def altered(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The same with another image in this sequence."""
    pixels = given["pixel_values"].clone()
    pixels.chunk(len(given["input_ids"]))[row].mul_(-1)
    return {**given, "pixel_values": pixels}


@on_each_tower
def test_each_sequence_sees_its_own_image(name):
    given = towers.inputs(name)
    assert (given["input_ids"] == IMAGE).sum(dim=1).tolist() == [TOKENS, TOKENS]
    moved = (logits(shared(name), given) - logits(shared(name), altered(given, 1))).abs().amax(dim=(1, 2))
    assert moved[0] == 0
    assert moved[1] > 0.1


@on_each_tower
def test_the_blocks_of_the_text_tower_are_found_and_no_others(name):
    (stack,) = anatomy_of(name).stacks
    path = f"{TOWERS[name].text}.layers"
    assert (stack.name, stack.path) == ("", path)
    assert [(part.block, part.path) for layer in stack.layers for part in layer.parts] == [
        (Block(kind, layer), f"{path}.{layer}.{module}") for layer in range(LAYERS) for kind, module in MODULES.items()
    ]


@on_each_removal
@on_each_tower
def test_removal_with_an_image_in_the_input_is_zeroed_weights(name, removal):
    reference = zeroed_by_hand(name, REMOVALS[removal])
    for given in (towers.inputs(name), towers.inputs(name, padded=True)):
        with without(name, removal) as model:
            found = logits(model, given)
        seen = given["attention_mask"].bool()
        assert torch.equal(found[seen], logits(reference, given)[seen])
        assert float((found - logits(shared(name), given))[seen].abs().max()) > 0.01


@on_each_tower
def test_pruned_for_good_is_skipped(name):
    removal, given = "attention of layers 0, 1 and last", towers.inputs(name)
    with without(name, removal) as model:
        expected = logits(model, given)
    pruned = prune_(towers.build(name), REMOVALS[removal], anatomy=anatomy_of(name))
    assert torch.equal(logits(pruned, given), expected)


@with_and_without_attention
@on_each_tower
def test_generation_about_an_image_with_a_cache_is_generation_without(name, removal):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    settings["suppress_tokens"] = [IMAGE, VIDEO]  # no image comes with those
    with without(name, removal) as model:
        for padded in (False, True):
            given = towers.inputs(name, PROMPT, padded=padded)
            expected = model.generate(**given, **settings, use_cache=False)
            found = model.generate(**given, **settings, use_cache=True)
            assert expected.sequences.shape[1] == PROMPT + NEW
            assert torch.equal(found.sequences, expected.sequences)
            gap = torch.stack(found.logits) - torch.stack(expected.logits)
            assert float(gap.abs().max()) < TOLERANCE


@with_and_without_attention
@on_each_tower
def test_tokens_fed_one_by_one_after_the_image_give_the_logits_of_the_whole(name, removal):
    given = towers.inputs(name, PROMPT + NEW)
    first = {key: value[:, :PROMPT] if value.shape[:2] == (2, PROMPT + NEW) else value for key, value in given.items()}
    with without(name, removal) as model:
        whole = model(**given, use_cache=False).logits
        out = model(**first, use_cache=True)
        pieces = [out.logits]
        for token in given["input_ids"][:, PROMPT:].split(1, dim=1):
            pieces.append(model(input_ids=token, past_key_values=out.past_key_values, use_cache=True).logits)
    assert float((torch.cat(pieces, dim=1) - whole).abs().max()) < TOLERANCE
