"""The search objective: its numbers, their bits, their price, and the models for which the mask tree is not used."""

import copy
import logging
from typing import Any

import pytest
import torch
from tiny import FAMILIES, HIDDEN, anatomy_of, shared, token_ids
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from blockpruner.anatomy import read_anatomy
from blockpruner.artifacts import Work
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.masktree import MaskTree
from blockpruner.objective import LossObjective
from blockpruner.surgery import skipped

DENSE = frozenset()
MASKS = [
    DENSE,
    *map(parse_mask, ["attention.0", "mlp.0", "attention.0+mlp.0", "mlp.1+attention.3", "attention.2", "mlp.3"]),
]


@torch.no_grad()
def plain(model, anatomy, mask, windows):
    """The loss of each window from one ordinary forward pass of the model without `mask`."""
    with skipped(model, mask, anatomy=anatomy):
        logits = model(input_ids=windows, use_cache=False).logits.float()
    return cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1).tolist()


def all_losses(objective, masks):
    """mask -> the loss of every window, over all micro-batches."""
    batches = [list(objective.losses(masks, batch)) for batch in range(objective.batches)]
    return {mask: [loss for rows in batches for loss in rows[i]] for i, mask in enumerate(masks)}


def assert_right(objective, masks):
    for mask, losses in all_losses(objective, masks).items():
        expected = plain(objective.model, objective.anatomy, mask, objective.windows)
        assert losses == pytest.approx(expected, abs=2e-5), mask


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "qwen2-moe"])
def test_the_loss_of_a_window_is_the_mean_over_its_tokens(family):
    objective = LossObjective(shared(family), anatomy_of(family), token_ids(5, 12), batch_tokens=24)
    assert objective.fallback == ""
    assert objective.batches == 3
    assert_right(objective, MASKS)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_loss_of_a_mask_has_the_same_bits_alone_and_among_others(family):
    objective = LossObjective(shared(family), anatomy_of(family), token_ids(5, 12), batch_tokens=24)
    among = all_losses(objective, MASKS)
    assert all(all_losses(objective, [mask]) == {mask: losses} for mask, losses in among.items())
    assert all_losses(objective, MASKS[::-1]) == among


def test_windows_longer_than_a_micro_batch_are_evaluated_one_by_one():
    objective = LossObjective(shared("llama"), anatomy_of("llama"), token_ids(3, 12), batch_tokens=5)
    assert objective.batches == 3
    assert_right(objective, MASKS[:2])


def test_bfloat16_models_use_the_tree_too():
    model = FAMILIES["gemma3"]().to(torch.bfloat16)
    objective = LossObjective(model, read_anatomy(model), token_ids(2, 20))
    assert objective.fallback == ""
    mask = parse_mask("attention.1")
    expected = plain(model, objective.anatomy, mask, token_ids(2, 20))
    assert all_losses(objective, [mask])[mask] == pytest.approx(expected, abs=0.05)


class Talker(LlamaDecoderLayer):
    """Pins what it makes to a board that it shares with later layers."""

    board: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any):
        self.board["made"] = super().forward(*args, **kwargs)
        return self.board["made"]


class Listener(LlamaMLP):
    """Weighs its result by what hangs on the board, token by token."""

    board: dict[str, Any]

    def forward(self, x):
        return super().forward(x) * (1 + self.board["made"].mean(dim=-1, keepdim=True))


def planted(talker=0, listeners=(2, 3)):
    """A Llama in which one layer tells later ones something that does not go through the residual stream."""
    model = FAMILIES["llama"]()
    layers, board = model.model.layers, {}
    layers[talker].__class__, layers[talker].board = Talker, board
    for index in listeners:
        layers[index].mlp.__class__, layers[index].mlp.board = Listener, board
    return model


@pytest.mark.parametrize("talker", [0, 1, 2])
def test_a_side_channel_between_layers_is_found_and_plain_passes_are_used(caplog, talker):
    model = planted(talker, listeners=range(talker + 1, 4))
    with caplog.at_level(logging.WARNING, "blockpruner"):
        objective = LossObjective(model, read_anatomy(model), token_ids(3, 12))
    assert "differs by" in objective.fallback
    assert [record.getMessage() for record in caplog.records] == [
        f"plain forward passes instead of the mask tree: {objective.fallback}"
    ]
    assert_right(objective, MASKS)


class Strict(LlamaDecoderLayer):
    """Will not be called twice in one forward pass of the model, once it is armed."""

    armed: bool
    seen: Any

    def forward(self, *args: Any, **kwargs: Any):
        if self.armed and kwargs["position_embeddings"][0] is self.seen:
            raise ValueError("called twice")
        self.seen = kwargs["position_embeddings"][0]
        return super().forward(*args, **kwargs)


def test_a_layer_that_the_tree_cannot_call_is_no_obstacle():
    model = FAMILIES["llama"]()
    layer = model.model.layers[1]
    layer.__class__, layer.armed, layer.seen = Strict, False, None
    anatomy = read_anatomy(model)
    layer.armed = True
    objective = LossObjective(model, anatomy, token_ids(3, 12))
    assert objective.fallback == "it stops with ValueError: called twice"
    assert_right(objective, MASKS)


class InPlace(LlamaDecoderLayer):
    """An ordinary layer that adds to its input in place."""

    def forward(self, *args: Any, **kwargs: Any):
        (stream,) = args
        stream += self.self_attn(hidden_states=self.input_layernorm(stream), **kwargs)[0]
        stream += self.mlp(self.post_attention_layernorm(stream))
        return stream


@pytest.mark.parametrize("changed", [(0, 1, 2, 3), (2,)])
def test_layers_that_change_their_input_in_place_are_evaluated_right(changed):
    model = FAMILIES["llama"]()
    for index in changed:
        model.model.layers[index].__class__ = InPlace
    anatomy = read_anatomy(model)
    assert set(anatomy.parts) == set(anatomy_of("llama").parts)
    objective = LossObjective(model, anatomy, token_ids(3, 12))
    assert objective.fallback == ""
    assert_right(objective, MASKS)


def test_the_tree_costs_about_half_and_plain_passes_are_counted_as_such():
    windows = token_ids(3, 12)
    blocks = anatomy_of("llama").outline.blocks
    masks = [frozenset([block]) for block in blocks]
    tree = LossObjective(shared("llama"), anatomy_of("llama"), windows).work(masks)
    model = planted()
    passes = LossObjective(model, read_anatomy(model), windows).work(masks)
    each = len(blocks) // 2 * len(blocks) - len(blocks) // 2
    assert passes == Work(attention_tokens=each * 36, mlp_tokens=each * 36, head_tokens=len(blocks) * 33)
    assert tree.head_tokens == passes.head_tokens
    assert tree.attention_tokens + tree.mlp_tokens < 0.7 * (passes.attention_tokens + passes.mlp_tokens)


BERT = BertConfig(vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BART = BartConfig(
    vocab_size=64,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertForMaskedLM(BERT),
        lambda: BartForConditionalGeneration(BART),
        lambda: LlamaModel(copy.deepcopy(shared("llama").config)),
    ],
)
def test_models_that_do_not_predict_the_next_token_are_refused_by_name(build):
    model = build().eval()
    with pytest.raises(InputError, match=f"{type(model).__name__} does not predict next tokens"):
        LossObjective(model, anatomy_of("llama"), token_ids())


def test_memory_that_runs_out_is_no_reason_for_the_engine_that_needs_more(monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(MaskTree, "final_states", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        LossObjective(shared("llama"), anatomy_of("llama"), token_ids())
