"""Cached generation equals uncached, whatever is gone: positions and masks come from a cache that is kept honest.

Uncached passes are the truth. The dense model is among what is tested: where transformers itself is not consistent,
nothing could be shown, so what it cannot do with a family is listed by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import FAMILIES, HEADS, HIDDEN, LanguageModel, anatomy_of, shared, token_ids
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from blockpruner.anatomy.probing import stood_in
from blockpruner.blocks import Block
from blockpruner.surgery.removal import prune_, skipped

TOLERANCE = 1e-4
PROMPT, NEW = 12, 8  # 20 tokens: past the sliding window of 8
SLIDING = ("mistral", "gemma2", "gemma3")
# What transformers cannot do with the dense model either.
NO_STATIC_CACHE = {"falcon-serial": "its position bias is made for the tokens given, not for the whole static cache"}
NO_EARLY_CACHE = {**NO_STATIC_CACHE, "falcon": "transformers reserves key/value heads that multi-query does not have"}

Removal = Callable[[str], list[Block]]


def attention_of(family: str, *layers: int) -> list[Block]:
    blocks = [block for block in anatomy_of(family).outline.blocks if block.kind == "attention"]
    return [blocks[layer] for layer in layers] if layers else blocks


REMOVALS: dict[str, Removal] = {
    "nothing": lambda _: [],
    "attention of layers 0, 1 and last": lambda family: attention_of(family, 0, 1, -1),
    "attention of layer 0": lambda family: attention_of(family, 0),
    "all attention": attention_of,
    "an mlp": lambda _: [Block("mlp", 1)],
}

on_each_family = pytest.mark.parametrize("family", FAMILIES)
on_each_removal = pytest.mark.parametrize("removal", REMOVALS)
on_the_hard_ones = pytest.mark.parametrize("removal", ["attention of layers 0, 1 and last", "all attention"])


@contextlib.contextmanager
def pruned(family: str, removal: str) -> Iterator[LanguageModel]:
    with skipped(shared(family), REMOVALS[removal](family), anatomy=anatomy_of(family)) as model, torch.no_grad():
        yield model


# The model fed with known tokens, a few at a time, and never told at which position it is.

STEPS = (6, *[1] * 14)
CHUNKS = (5, 4, 7, 1, 1, 2)
FED = token_ids(batch=2, length=sum(STEPS), seed=1)


def plain_cache(_: LanguageModel) -> Cache:
    """Slots are made as they are written."""
    return DynamicCache()


def dynamic_cache(model: LanguageModel) -> Cache:
    """Slots of the model's own kinds (sliding windows)."""
    return DynamicCache(config=model.config)


def static_cache(model: LanguageModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=24)


def early_static_cache(model: LanguageModel) -> Cache:
    """Memory is reserved before the first token, with the heads of the dense model in every slot."""
    cache = static_cache(model)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or HEADS
    if config.model_type == "falcon" and not config.new_decoder_architecture and config.multi_query:
        heads = 1
    width = getattr(config, "head_dim", None) or HIDDEN // HEADS
    cache.early_initialization(len(FED), heads, width, dtype=model.dtype, device=model.device)
    return cache


def fed(model: LanguageModel, ids: torch.Tensor, cache: Cache, counts: tuple[int, ...]) -> torch.Tensor:
    """Logits of all of `ids`, given to the model `counts` tokens at a time."""
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(list(counts), dim=1)]
    return torch.cat(pieces, dim=1)


def assert_fed_equals_whole(model: LanguageModel, cache: Cache, counts: tuple[int, ...]) -> None:
    whole = model(FED, use_cache=False).logits
    assert float((fed(model, FED, cache, counts) - whole).abs().max()) < TOLERANCE
    assert int(cache.get_seq_length()) == sum(counts)


@on_each_removal
@on_each_family
def test_tokens_fed_one_by_one_give_the_logits_of_the_whole(family, removal):
    with pruned(family, removal) as model:
        assert_fed_equals_whole(model, dynamic_cache(model), STEPS)


@on_the_hard_ones
@on_each_family
def test_a_prefill_in_pieces_gives_the_logits_of_the_whole(family, removal):
    with pruned(family, removal) as model:
        assert_fed_equals_whole(model, dynamic_cache(model), CHUNKS)
        assert_fed_equals_whole(model, plain_cache(model), CHUNKS)


@pytest.mark.parametrize("make", [static_cache, early_static_cache])
@on_the_hard_ones
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_STATIC_CACHE])
def test_a_static_cache_gives_the_logits_of_the_whole(family, removal, make):
    with pruned(family, removal) as model:
        assert_fed_equals_whole(model, make(model), CHUNKS)


@pytest.mark.parametrize("make", [dynamic_cache, static_cache, early_static_cache])
def test_half_precision_keeps_its_type_in_the_cache(make):
    family = "llama"
    model = FAMILIES[family]().to(torch.bfloat16)
    with torch.no_grad(), skipped(model, attention_of(family, 0, 2), anatomy=anatomy_of(family)):
        cache = make(model)
        found = fed(model, FED, cache, STEPS)
        whole = model(FED, use_cache=False).logits
    slots: list[Any] = cache.layers
    assert {slot.keys.dtype for slot in slots} == {torch.bfloat16}
    assert float((found - whole).abs().max()) < 0.1  # rounding to 8 bits; positions that restart are off by 1 and more


def test_a_stand_in_keeps_two_numbers_a_token():
    with pruned("llama", "attention of layers 0, 1 and last") as model:
        cache = dynamic_cache(model)
        fed(model, FED, cache, STEPS)
    slots: list[Any] = cache.layers
    whole, removed = 2 * 2 * 8, 2
    assert [(slot.keys[0].numel() + slot.values[0].numel()) / len(FED[0]) for slot in slots] == [
        *(removed, removed, whole, removed)
    ]


def test_a_cache_that_was_cut_back_or_reordered_goes_on_as_if_nothing_had_been():
    with pruned("llama", "attention of layers 0, 1 and last") as model:
        cache = dynamic_cache(model)
        fed(model, FED[:, :15], cache, (10, 5))
        cache.crop(-5)
        assert float((fed(model, FED[:, 10:], cache, (3, 7)) - model(FED).logits[:, 10:]).abs().max()) < TOLERANCE
        cache = dynamic_cache(model)
        fed(model, FED[:, :10], cache, (10,))
        cache.reorder_cache(torch.LongTensor([1, 0]))
        swapped = torch.cat([FED[:, :10].flip(0), FED[:, 10:]], dim=1)
        found = fed(model, FED[:, 10:], cache, (3, 7))
        assert float((found - model(swapped).logits[:, 10:]).abs().max()) < TOLERANCE


# The model's own generate().

PADDED = token_ids(batch=3, length=PROMPT, seed=2)
MASK = torch.ones_like(PADDED)
for row, padding in enumerate((5, 0, 2)):
    PADDED[row, :padding], MASK[row, :padding] = 0, 0
WHOLE = token_ids(batch=2, length=PROMPT, seed=3)


def generated(
    model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor | None = None, /, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily chosen tokens, and the logits they were chosen by."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=mask, **settings | options)
    return found.sequences, torch.stack(found.logits, dim=1)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert float((found[1] - expected[1]).abs().max()) < TOLERANCE


@on_each_removal
@on_each_family
def test_generation_with_a_cache_is_generation_without(family, removal):
    with pruned(family, removal) as model:
        for ids, mask in ((PADDED, MASK), (WHOLE, None)):
            expected = generated(model, ids, mask, use_cache=False)
            assert expected[0].shape[1] == PROMPT + NEW
            assert_same(generated(model, ids, mask, use_cache=True), expected)


@on_the_hard_ones
@on_each_family
def test_every_way_to_prefill_and_to_store_generates_the_same(family, removal):
    ways: list[dict[str, Any]] = [{"prefill_chunk_size": 5}]
    if family not in NO_STATIC_CACHE:
        ways.append({"cache_implementation": "static"})
    if family not in NO_EARLY_CACHE:
        ways.append({"cache_implementation": "static", "prefill_chunk_size": 5})
    with pruned(family, removal) as model:
        expected = generated(model, PADDED, MASK, use_cache=False)
        for way in ways:
            assert_same(generated(model, PADDED, MASK, **way), expected)


@on_each_family
def test_beams_find_the_same_with_a_cache(family):
    with pruned(family, "attention of layers 0, 1 and last") as model:
        options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
        expected = model.generate(PADDED, attention_mask=MASK, use_cache=False, **options)
        assert torch.equal(model.generate(PADDED, attention_mask=MASK, use_cache=True, **options), expected)


@on_the_hard_ones
@pytest.mark.parametrize("family", ["llama", *SLIDING, "gpt2", "bloom"])
def test_tokens_looked_up_in_the_prompt_and_rejected_leave_no_trace(family, removal):
    prompt = WHOLE[:1].repeat(1, 2)  # so that there is something to look up
    with pruned(family, removal) as model:
        options = {"eos_token_id": 2}  # older transformers look for one in what was looked up
        expected = generated(model, prompt, use_cache=False, **options)
        assert_same(generated(model, prompt, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pruned_model_drafts_for_its_dense_self_and_the_reverse(family):
    dense = shared(family)
    small = prune_(FAMILIES[family](), attention_of(family, 0, 1, -1), anatomy=anatomy_of(family))
    for model, assistant in ((dense, small), (small, dense)):
        with torch.no_grad():
            expected = generated(model, WHOLE[:1], use_cache=False)
            assert_same(generated(model, WHOLE[:1], assistant_model=assistant), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_dense_model_generates_as_before_after_it_was_skipped_with_a_static_cache(family):
    model, static = shared(family), {"cache_implementation": "static"}
    with torch.no_grad():
        dense = generated(model, WHOLE, **static)
        with pruned(family, "attention of layers 0, 1 and last"):
            generated(model, WHOLE, **static)
        assert_same(generated(model, WHOLE, **static), dense)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_a_model_pruned_for_good_generates_as_the_skipped_one(family):
    blocks = attention_of(family, 0, 1, -1)
    model = prune_(FAMILIES[family](), blocks, anatomy=anatomy_of(family))
    with pruned(family, "attention of layers 0, 1 and last") as reference:
        expected = generated(reference, PADDED, MASK, use_cache=False)
        assert_same(generated(model, PADDED, MASK), expected)


def test_stand_ins_that_write_nothing_fail_these_tests():
    """The same with the cache slots struck out of the stand-ins: the tests of this file can fail."""
    family, blocks = "llama", attention_of("llama", 0, 1, -1)
    specs = anatomy_of(family).stand_ins(blocks)
    silent = {path: {name: value for name, value in spec.items() if name != "cache"} for path, spec in specs.items()}
    with stood_in(shared(family), silent), torch.no_grad():
        whole = shared(family)(FED, use_cache=False).logits
        for make in (dynamic_cache, static_cache):
            gap = (fed(shared(family), FED, make(shared(family)), STEPS) - whole).abs().max()
            assert float(gap) > 1000 * TOLERANCE
        padded = [generated(shared(family), PADDED, MASK, use_cache=use)[1] for use in (True, False)]
        assert float((padded[0] - padded[1]).abs().max()) > 1000 * TOLERANCE


class Stream:
    """A CUDA stream that does everything at once, so that offloading can be run where there is no GPU."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_stream(self, _):
        return None


@on_the_hard_ones
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_works(family, removal, implementation, monkeypatch):
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    with pruned(family, removal) as model:
        expected = generated(model, PADDED, MASK, use_cache=False)
        assert_same(generated(model, PADDED, MASK, cache_implementation=implementation), expected)


class RoundedQuantizedLayer(QuantizedLayer):
    """The simplest quantized cache slot, which needs no other package."""

    def _quantize(self, tensor, axis):
        return tensor.mul(64).round()

    def _dequantize(self, q_tensor):
        return q_tensor.div(64)


def test_a_quantized_cache_is_refused_by_name():
    def cache() -> Cache:
        return Cache(layers=[RoundedQuantizedLayer() for _ in range(4)])

    refused = r"cannot use a quantized cache \(RoundedQuantizedLayer\).*static"
    with pruned("llama", "attention of layer 0") as model, pytest.raises(NotImplementedError, match=refused):
        model.generate(WHOLE, past_key_values=cache(), max_new_tokens=2)
    with pruned("llama", "an mlp") as model:
        assert model.generate(WHOLE, past_key_values=cache(), max_new_tokens=2).shape == (2, PROMPT + 2)
