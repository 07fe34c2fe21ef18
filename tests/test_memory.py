"""Bytes that are counted are the bytes that a real cache and a really pruned model hold."""

from typing import Any

import pytest
import tiny
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.evaluation.memory import (
    Footprint,
    filled_cache,
    held_bytes,
    random_inputs,
    read_ledger,
    weights_bytes,
)
from blockpruner.evaluation.peaks import peak_memory
from blockpruner.surgery.removal import prune_, skipped

MODELS = (
    *("llama", "gemma3", "qwen2-moe", "gpt2"),
    *("causal/mamba", "causal/jamba", "causal/qwen3_next", "seq2seq/t5", "masked/bert"),
)
LENGTHS = (5, 24)  # below and beyond the sliding windows, of 8 tokens


def build(name):
    return zoo.build(name) if "/" in name else tiny.FAMILIES[name]()


def some_masks(anatomy):
    """Nothing, a block, blocks of several layers, two whole layers."""
    blocks = [block for block in anatomy.parts if block not in anatomy.outline.kept]
    (first, *_, last) = anatomy.outline.layers().values()
    return [frozenset(), frozenset(blocks[2:3]), frozenset(blocks[1:6:2]), frozenset((*first, *last))]


@pytest.fixture(scope="module", params=MODELS)
def opened(request):
    model = build(request.param)
    anatomy = read_anatomy(model)
    return request.param, model, anatomy, read_ledger(model, anatomy)


def test_the_cache_holds_what_was_counted_before_and_after_removal(opened):
    _, model, anatomy, ledger = opened
    for mask in some_masks(anatomy):
        for tokens in LENGTHS:
            with skipped(model, mask, anatomy=anatomy):
                cache = filled_cache(model, random_inputs(model, 3, tokens))
            assert ledger.footprint(mask).cache(tokens, 3) == (0 if cache is None else held_bytes(cache))


def test_a_pruned_model_holds_the_weights_and_the_cache_that_were_foreseen(opened):
    name, _, anatomy, ledger = opened
    mask = some_masks(anatomy)[2]
    pruned = prune_(build(name), mask)
    again = read_ledger(pruned, read_anatomy(pruned)).footprint()
    assert weights_bytes(pruned) == again.weights == ledger.footprint(mask).weights
    assert again.cache(24, 3) == ledger.footprint(mask).cache(24, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-moe", "causal/jamba", "seq2seq/t5", "masked/bert"])
def test_in_another_dtype_it_is_what_the_model_holds_when_its_files_are_of_that(name, dtype, tmp_path):
    model = build(name)
    ledger = read_ledger(model, anatomy := read_anatomy(model), dtype)
    mask = some_masks(anatomy)[2]
    build(name).to(dtype).save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path, dtype="auto", local_files_only=True)
    half = read_ledger(again, anatomy)
    for removed in (frozenset(), mask):
        assert ledger.footprint(removed).weights == pytest.approx(half.footprint(removed).weights, abs=2)  # a buffer
        assert ledger.footprint(removed).cache(24, 3) == half.footprint(removed).cache(24, 3)
    back = read_ledger(again, anatomy, torch.float32).footprint(mask)
    assert back.weights == pytest.approx(read_ledger(model, anatomy).footprint(mask).weights, abs=2)
    assert back.cache(24, 3) == read_ledger(model, anatomy).footprint(mask).cache(24, 3)


def test_costs_of_blocks_add_up_to_the_footprint(opened):
    _, _, anatomy, ledger = opened
    costs = ledger.costs(24, 3)
    for mask in some_masks(anatomy):
        assert costs.left(anatomy.outline, mask) == ledger.footprint(mask).total(24, 3)


def test_a_sliding_window_stops_to_grow_and_a_full_one_does_not():
    model = tiny.FAMILIES["gemma3"]()
    ledger = read_ledger(model, read_anatomy(model))
    footprint = ledger.footprint()
    assert 0 < footprint.cache(1001) - footprint.cache(1000) < footprint.cache(1)


def test_a_stand_in_keeps_two_numbers_per_token():
    model = tiny.FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    attention = next(block for block in anatomy.parts if block.kind == "attention")
    footprint = read_ledger(model, anatomy).footprint(frozenset([attention]))
    assert footprint.cache(10) == anatomy.cache_bytes(frozenset([attention])) * 10 + 2 * 4 * 10


@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(1, 40)), max_size=3),
    st.integers(0, 20),
    st.integers(0, 900),
    st.integers(1, 4),
)
def test_the_largest_batch_and_context_fit_and_one_more_does_not(weights, grows, fixed, limit, batch):
    footprint = Footprint(weights, tuple(grows), fixed)
    sequences = footprint.largest_batch(limit, 7)
    if sequences is not None and sequences > 0:
        assert footprint.total(7, sequences) <= limit
    if sequences is not None and limit >= weights:
        assert footprint.total(7, sequences + 1) > limit
    tokens = footprint.largest_context(limit, batch)
    if tokens:
        assert footprint.total(tokens, batch) <= limit
    if tokens is not None:
        assert footprint.total(tokens + 1, batch) > limit


@given(st.integers(0, 900), st.none() | st.integers(1, 20), st.integers(1, 30))
def test_no_context_is_named_that_the_model_cannot_read(limit, window, longest):
    footprint = Footprint(50, ((4, window), (2, None)) if limit % 2 else ((4, window),), 3)
    fitting = [tokens for tokens in range(longest + 1) if footprint.total(tokens, 2) <= limit]
    assert footprint.largest_context(limit, 2, longest) == max(fitting, default=0)


def test_a_model_that_fits_with_any_context_has_no_largest():
    assert Footprint(10, ((4, 8),), 2).largest_context(50) is None
    assert Footprint(10, (), 0).largest_batch(50, 99) is None


def test_tensors_in_a_cache_count_once_and_as_what_they_show():
    keys = torch.zeros(2, 3, 4, 5)
    assert held_bytes([keys, {"again": keys}, keys[:, :1]]) == (2 * 3 * 4 * 5 + 2 * 4 * 5) * 4
    assert held_bytes(torch.zeros(3, dtype=torch.long)) == 0


def test_the_peak_of_a_block_is_seen():
    with peak_memory(torch.device("cpu")) as taken:
        held = torch.ones(2**23)  # 32 MiB
        held.mul_(2)
    if taken.reason is None:
        assert taken.peak is not None
        assert 2**24 < taken.peak < 2**27


def test_where_memory_is_not_watched_the_reason_is_said():
    with peak_memory(torch.device("mps")) as taken:
        pass
    assert (taken.peak, "not watched" in (taken.reason or "")) == (None, True)
