"""The mask tree against plain forward passes of the model without the blocks, and against the work it says it does."""

import functools
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, anatomy_of, shared, token_ids
from torch.nn.functional import cross_entropy

from blockpruner.blocks import parse_mask
from blockpruner.engine import masktree
from blockpruner.engine.masktree import MaskTree, sweep_work
from blockpruner.surgery.removal import skipped

DENSE = frozenset()


@functools.cache
def tree_of(family):
    return MaskTree(shared(family), anatomy_of(family))


def losses(tree, masks, windows, at_once=5):
    """Each mask with its token losses [windows, tokens - 1], from what the tree puts out, some positions at a time."""
    inputs = {"input_ids": windows}
    for mask, state in tree.final_states(masks, inputs).items():
        parts = torch.arange(windows.shape[1] - 1).split(at_once)
        logits = torch.cat([tree.outputs(state, inputs, positions) for positions in parts], dim=1)
        yield mask, cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def sweep(family, masks, windows, at_once=5):
    return dict(losses(tree_of(family), masks, windows, at_once))


@torch.no_grad()
def plain(model, anatomy, mask, windows):
    """Token losses of the model without `mask`, from one ordinary forward pass."""
    with skipped(model, mask, anatomy=anatomy):
        logits = model(input_ids=windows, use_cache=False).logits.float()
    return cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")


def assert_exact(family, masks, windows):
    found = sweep(family, masks, windows)
    assert set(found) == set(masks)
    for mask, losses in found.items():
        expected = plain(shared(family), anatomy_of(family), mask, windows)
        assert losses.shape == (len(windows), windows.shape[1] - 1)
        assert losses.dtype == torch.float32
        assert float((losses - expected).abs().max()) < 1e-4, mask


def blocks_of(family):
    return anatomy_of(family).outline.blocks


def random_masks(family, count, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(family)
    chance = torch.rand(count, 1, generator=generator)
    picks = torch.rand(count, len(blocks), generator=generator) < chance
    return [frozenset(b for b, gone in zip(blocks, row, strict=True) if gone) for row in picks]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_a_plain_forward_pass_of_the_model_without_the_blocks(family):
    singles = [frozenset([block]) for block in blocks_of(family)]
    everything = frozenset(blocks_of(family))
    assert_exact(family, [DENSE, everything, *singles, *random_masks(family, 6, seed=1)], token_ids(2, 13))


masks_of_gemma = st.frozensets(st.sampled_from(blocks_of("gemma3")))


@given(masks=st.lists(masks_of_gemma, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_losses_equal_a_plain_forward_pass_for_any_set_of_masks(masks):
    assert_exact("gemma3", list(dict.fromkeys(masks)), token_ids(2, 11, seed=3))


@given(masks=st.lists(masks_of_gemma, min_size=2, max_size=6), turn=st.randoms())
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_what_else_is_in_the_sweep_nor_on_its_order(masks, turn):
    windows = token_ids(2, 11, seed=4)
    together = sweep("gemma3", masks, windows)
    turned = turn.sample(masks, len(masks))
    again = sweep("gemma3", [*turned, *turned], windows)
    alone = sweep("gemma3", masks[:1], windows)
    assert torch.equal(alone[masks[0]], together[masks[0]])
    assert set(again) == set(together)
    assert all(torch.equal(again[mask], losses) for mask, losses in together.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "phi", "bloom"])
def test_bits_do_not_depend_on_the_sweep_in_other_kinds_of_layers(family):
    windows = token_ids(3, 9)
    masks = [DENSE, *random_masks(family, 7, seed=2)]
    together = sweep(family, masks, windows)
    for mask in masks:
        assert torch.equal(sweep(family, [mask], windows)[mask], together[mask])


def test_a_mask_given_twice_is_evaluated_and_counted_once():
    mask = parse_mask("attention.1")
    assert list(sweep("llama", [mask, mask], token_ids())) == [mask]
    layers = tree_of("llama").layers
    assert sweep_work(layers, [mask, mask], 32) == sweep_work(layers, [mask], 32)


@pytest.mark.parametrize("length", [2, 3])
def test_the_shortest_windows_work(length):
    assert_exact("llama", [DENSE, parse_mask("mlp.0+attention.3")], token_ids(3, length))


def test_one_window_alone_works():
    assert_exact("gpt2", [DENSE, parse_mask("attention.0")], token_ids(1, 10))


@pytest.mark.parametrize("positions", [1, 2, 7, 10**6])
@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_how_many_positions_the_head_sees_at_once_does_not_matter(family, positions):
    mask, windows = parse_mask("attention.2"), token_ids(3, 12)
    expected = sweep(family, [mask], windows)[mask]
    torch.testing.assert_close(sweep(family, [mask], windows, positions)[mask], expected, atol=1e-5, rtol=0)


def watch_work(family, masks, windows):
    """What a sweep has the model's own modules do: tokens through attention and mlp."""
    model, anatomy = shared(family), anatomy_of(family)
    counts = Counter()
    width = model.config.hidden_size

    def count(kind, per_token):
        return lambda _module, _given, output: counts.update(
            {kind: (output if isinstance(output, torch.Tensor) else output[0]).numel() // per_token}
        )

    handles = [
        model.get_submodule(part.path).register_forward_hook(count(block.kind, width))
        for block, part in anatomy.parts.items()
    ]
    try:
        sweep(family, masks, windows)
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt", "qwen2-moe"])
def test_the_counted_work_is_the_work_that_is_done(family):
    windows = token_ids(2, 8)
    for masks in (
        [DENSE],
        [frozenset([block]) for block in blocks_of(family)],
        random_masks(family, 9, seed=5),
        [frozenset(blocks_of(family))],
    ):
        counted = sweep_work(tree_of(family).layers, masks, windows.numel())
        seen = watch_work(family, masks, windows)
        assert (counted.attention_tokens, counted.mlp_tokens) == (seen["attention"], seen["mlp"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("gone", [0, 3])
def test_an_exhaustive_greedy_step_costs_a_half_and_one_nth_of_a_pass_per_candidate(family, gone):
    blocks = blocks_of(family)
    before, candidates = frozenset(blocks[:gone]), blocks[gone:]
    masks = [before | {block} for block in candidates]
    work = sweep_work(tree_of(family).layers, masks, 1)
    n = len(candidates)
    assert work.attention_tokens + work.mlp_tokens <= (1 / 2 + 1 / n) * n * n
    assert work.head_tokens == 0


def test_states_are_freed_as_the_sweep_walks_on(monkeypatch):
    masks = random_masks("gemma3", 12, seed=6)
    born, alive = [], []
    step = MaskTree._step

    def watched(self, *args):
        result = step(self, *args)
        born.append(weakref.ref(result))
        alive.append(len({id(state) for ref in born if (state := ref()) is not None}))
        return result

    monkeypatch.setattr(MaskTree, "_step", watched)
    states = tree_of("gemma3").final_states(masks, {"input_ids": token_ids(2, 8)})
    assert max(alive) <= len(masks) + 1
    assert len(born) > 2 * len(masks)
    del states
    assert all(ref() is None for ref in born)


def held_by(tree):
    return [value for part in (*tree._recorders.values(), *tree._injectors.values()) for value in vars(part).values()]


class Trouble(Exception):
    pass


@pytest.mark.parametrize("place", ["a layer", "a block", "the head", "the reader of the results"])
def test_the_model_is_left_as_it_was_also_after_an_exception(place):
    model, tree, windows = FAMILIES["llama"](), None, token_ids()
    tree = MaskTree(model, anatomy_of("llama"))
    before = list(model.named_modules())
    expected = model(windows).logits

    def fail(*_):
        raise Trouble

    def read():
        for _ in losses(tree, [parse_mask("mlp.1"), parse_mask("attention.2"), DENSE], windows):
            if place == "the reader of the results":
                raise Trouble

    paths = {"a layer": "model.layers.3", "a block": "model.layers.1.self_attn", "the head": "lm_head"}
    handle = model.get_submodule(paths[place]).register_forward_hook(fail) if place in paths else None
    with pytest.raises(Trouble):
        read()
    if handle:
        handle.remove()
    assert [(path, id(module)) for path, module in model.named_modules()] == [(p, id(m)) for p, m in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(isinstance(value, (torch.Tensor, masktree.Call)) for value in held_by(tree))
    assert torch.equal(model(windows).logits, expected)
    assert set(dict(losses(tree, [DENSE], windows))) == {DENSE}
