"""Removed for a while, removed for good, and zeroed by hand: three routes to the same logits."""

import gc
import weakref
from collections.abc import Iterable

import pytest
import torch
from tiny import FAMILIES, LanguageModel, anatomy_of, shared, token_ids
from torch import nn

from blockpruner.anatomy.reading import Anatomy
from blockpruner.blocks import Block, Move
from blockpruner.errors import InputError
from blockpruner.plan import Plan
from blockpruner.surgery.removal import prune_, skipped

# Per family, below the layer, what must be zero for a branch to add nothing: read in transformers' modelling files.
SWIGLU = {"attention": ("self_attn.o_proj",), "mlp": ("mlp.down_proj",)}
FUSED = {"attention": ("self_attention.dense",), "mlp": ("mlp.dense_4h_to_h",)}
NEOX = {"attention": ("attention.dense",), "mlp": ("mlp.dense_4h_to_h",)}
OUTPUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2"), SWIGLU),
    "phi": {"attention": ("self_attn.dense",), "mlp": ("mlp.fc2",)},
    **dict.fromkeys(("falcon", "falcon-new", "falcon-serial", "bloom"), FUSED),
    "gpt2": {"attention": ("attn.c_proj",), "mlp": ("mlp.c_proj",)},
    **dict.fromkeys(("neox", "neox-serial"), NEOX),
    "opt": {"attention": ("self_attn.out_proj",), "mlp": ("fc2",)},
    "mixtral": {"attention": ("self_attn.o_proj",), "mlp": ("mlp.experts.down_proj",)},
    "qwen2-moe": {
        "attention": ("self_attn.o_proj",),
        "mlp": ("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    },
}
IDS = token_ids(batch=2, length=12)

on_each_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def without(family: str, blocks: Iterable[Block | str]) -> torch.Tensor:
    with skipped(shared(family), blocks, anatomy=anatomy_of(family)) as model:
        return logits(model)


def zeroed_by_hand(family: str, blocks: Iterable[Block]) -> nn.Module:
    """A fresh model in which the output projections of `blocks` are zero, by the names of OUTPUTS."""
    model = FAMILIES[family]()
    layers = anatomy_of(family).stacks[0].path
    with torch.no_grad():
        for block in blocks:
            layer = model.get_submodule(f"{layers}.{block.layer}")
            wanted = OUTPUTS[family][block.kind]
            found = [p for name, p in layer.named_parameters() if name.startswith(wanted)]
            assert found, f"no parameter of {layers}.{block.layer} begins with {wanted}"
            for parameter in found:
                parameter.zero_()
    return model


def masks(family: str) -> list[list[Block]]:
    """A layer's two blocks alone, the first, second and last of each kind, and all of each kind."""
    blocks = anatomy_of(family).outline.blocks
    kinds = [[block for block in blocks if block.kind == kind] for kind in ("attention", "mlp")]
    return [[kinds[0][1]], [kinds[1][1]], *([kind[0], kind[1], kind[-1]] for kind in kinds), *kinds]


@on_each_family
def test_without_a_block_is_with_its_output_projection_zero(family):
    dense = logits(shared(family))
    for mask in masks(family):
        found = without(family, mask)
        assert torch.equal(found, logits(zeroed_by_hand(family, mask)))
        assert float((found - dense).abs().max()) > 0.01, "a model in which these blocks do nothing proves nothing"


@on_each_family
def test_pruned_is_skipped_and_frees_what_the_outline_says(family):
    anatomy = anatomy_of(family)
    mask = [Block("attention", 0), Block("mlp", 1), Block("attention", len(anatomy.stacks[0].layers) - 1)]
    model = FAMILIES[family]()
    gone = [path for block in mask for path in (*anatomy.parts[block].modules, *anatomy.parts[block].idle)]
    modules = [weakref.ref(model.get_submodule(path)) for path in gone]
    weights = [weakref.ref(p) for path in gone for p in model.get_submodule(path).parameters()]
    before = sum(p.numel() for p in model.parameters())
    assert prune_(model, mask, anatomy=anatomy) is model
    gc.collect()
    assert before - sum(p.numel() for p in model.parameters()) == anatomy.outline.removed_parameters(frozenset(mask))
    assert not [name for name in model.state_dict() if name.startswith(tuple(f"{path}." for path in gone))]
    assert not any(reference() is not None for reference in (*modules, *weights))
    assert torch.equal(logits(model), without(family, mask))


@pytest.mark.parametrize(("family", "norm"), [("phi", "input_layernorm"), ("falcon", "input_layernorm")])
def test_the_norm_that_all_blocks_of_a_layer_share_leaves_with_the_last_of_them(family, norm):
    layers = anatomy_of(family).stacks[0].path
    model = prune_(FAMILIES[family](), ["attention.1", "attention.2", "mlp.2"], anatomy=anatomy_of(family))
    left = {name.split(".")[-3] for name, _ in model.named_parameters() if f".{norm}." in name}
    assert left == {"0", "1", "3"}
    assert not list(model.get_submodule(f"{layers}.2").parameters())


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_the_anatomy_is_read_where_none_is_given(family):
    mask = ["attention.1", "mlp.2"]
    with skipped(shared(family), mask) as model:
        found = logits(model)
    assert torch.equal(found, without(family, mask))
    assert torch.equal(logits(prune_(FAMILIES[family](), mask)), found)


def modules_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


@on_each_family
def test_skipped_puts_the_same_modules_back(family):
    model = shared(family)
    modules, dense = modules_of(model), logits(model)
    for mask in masks(family):
        with skipped(model, mask, anatomy=anatomy_of(family)):
            assert modules_of(model) != modules
        assert modules_of(model) == modules
    assert torch.equal(logits(model), dense)


def test_skipped_puts_everything_back_after_an_exception():
    model = shared("llama")
    modules = modules_of(model)
    with pytest.raises(KeyboardInterrupt), skipped(model, ["attention.0", "mlp.3"], anatomy=anatomy_of("llama")):
        raise KeyboardInterrupt
    assert modules_of(model) == modules


def test_text_that_is_no_list_of_blocks_is_not_read_letter_by_letter():
    with pytest.raises(InputError, match=r"'pruned/plan\.json' is text"), skipped(shared("llama"), "pruned/plan.json"):
        pass


def test_skipped_within_skipped_removes_both_and_restores_in_steps():
    model, anatomy = shared("llama"), anatomy_of("llama")
    dense = logits(model)
    outer, both = without("llama", ["attention.1"]), without("llama", ["attention.1", "mlp.2"])
    with skipped(model, ["attention.1"], anatomy=anatomy):
        with skipped(model, ["mlp.2"], anatomy=anatomy):
            assert torch.equal(logits(model), both)
        with skipped(model, ["attention.1", "mlp.2"], anatomy=anatomy):
            assert torch.equal(logits(model), both)
        assert torch.equal(logits(model), outer)
        with skipped(model, ["mlp.2"]):  # reads the anatomy of what is left
            assert torch.equal(logits(model), both)
    assert torch.equal(logits(model), dense)


def test_nothing_skipped_or_pruned_is_the_dense_model():
    model = FAMILIES["llama"]()
    dense, kind = logits(model), type(model)
    with skipped(model, []):
        assert torch.equal(logits(model), dense)
    assert type(prune_(model, [])) is kind
    assert torch.equal(logits(model), dense)


def skip_once(model: LanguageModel, blocks: Iterable[Block | str], *, anatomy: Anatomy) -> None:
    with skipped(model, blocks, anatomy=anatomy):
        pytest.fail("the blocks were accepted")


@pytest.mark.parametrize("remove", [skip_once, prune_])
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["attention.9"], r"does not have: attention\.9"),
        (["mixer.0"], r"does not have: mixer\.0"),
        (["encoder.mlp.0"], r"does not have: encoder\.mlp\.0"),
        (["mlp.0.1"], r"does not have: mlp\.0\.1"),
        (["attention.1", "mlp.0", "attention.1"], "named twice"),
        (["attention.1", Block("attention", 1)], "named twice"),
        (["attention"], "does not name a block"),
    ],
)
def test_blocks_that_cannot_be_removed_are_refused_before_anything_changes(remove, blocks, message):
    model = shared("llama")
    modules, kind = modules_of(model), type(model)
    with pytest.raises(InputError, match=message):
        remove(model, blocks, anatomy=anatomy_of("llama"))
    assert modules_of(model) == modules
    assert type(model) is kind


def test_a_block_cannot_be_pruned_twice():
    model = prune_(FAMILIES["llama"](), ["attention.1"], anatomy=anatomy_of("llama"))
    with pytest.raises(InputError, match=r"does not have: attention\.1"):
        prune_(model, ["attention.1"])


@pytest.mark.parametrize("family", ["llama", "falcon", "bloom", "mixtral"])
def test_gradients_reach_every_block_that_is_left(family):
    model = FAMILIES[family]()
    anatomy = anatomy_of(family)
    mask = [Block("attention", 0), Block("mlp", 2)]
    with skipped(model, mask, anatomy=anatomy):
        model(IDS, labels=IDS).loss.backward()
    for block, part in anatomy.parts.items():
        reached = [p.grad is not None and bool(p.grad.any()) for p in model.get_submodule(part.path).parameters()]
        assert not any(reached) if block in mask else any(reached)


def test_stand_ins_follow_the_mode_of_what_they_replace():
    model = FAMILIES["llama"]().train()
    prune_(model, ["attention.1"])
    assert model.training
    assert model.get_submodule("model.layers.1.self_attn").training


def test_a_plan_says_which_blocks_to_remove():
    plan = Plan.of(Move.of(Block("attention", 1)), Move.of(Block("mlp", 0)))
    model, pruned = FAMILIES["llama"](), FAMILIES["llama"]()
    prune_(pruned, plan)
    ids = token_ids()
    with torch.no_grad(), skipped(model, plan):
        assert torch.equal(model(ids).logits, pruned(ids).logits)
