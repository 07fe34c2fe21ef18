"""The search objective: its numbers, their bits, their price, and the models for which the mask tree is not used."""

import copy
import logging
import math
from typing import Any

import pytest
import torch
import zoo
from tiny import FAMILIES, HIDDEN, VOCABULARY, anatomy_of, randomise, shared, tiny, token_ids
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import BertConfig, BertModel, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Work
from blockpruner.blocks import parse_mask
from blockpruner.engine import objective
from blockpruner.engine.limits import usual_window
from blockpruner.engine.masktree import MaskTree
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.objectives.embedding import Embedding
from blockpruner.objectives.jensen_shannon import JensenShannon
from blockpruner.objectives.kl import KL
from blockpruner.objectives.logit_distance import LogitDistance
from blockpruner.objectives.loss import Loss
from blockpruner.objectives.sampled_loss import SampledLoss
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import IGNORED, Signs, examples_of

DENSE = frozenset()
MASKS = [
    DENSE,
    *map(parse_mask, ["attention.0", "mlp.0", "attention.0+mlp.0", "mlp.1+attention.3", "attention.2", "mlp.3"]),
]


def loss_of(model, anatomy, windows, **options):
    return ModelObjective(model, anatomy, examples_of(model, windows), **options)


@torch.no_grad()
def plain(model, anatomy, mask, windows):
    """The loss of each window from one ordinary forward pass of the model without `mask`."""
    with skipped(model, mask, anatomy=anatomy):
        logits = model(input_ids=windows, use_cache=False).logits.float()
    return cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1).tolist()


def all_losses(found, masks):
    """mask -> the loss of every window, over all micro-batches."""
    batches = [list(found.batch_losses(masks, batch)) for batch in range(found.batches)]
    return {mask: [loss for rows in batches for loss in rows[i]] for i, mask in enumerate(masks)}


def assert_right(found, masks):
    for mask, losses in all_losses(found, masks).items():
        expected = plain(found.model, found.anatomy, mask, found.examples.inputs["input_ids"])
        assert losses == pytest.approx(expected, abs=2e-5), mask


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "qwen2-moe"])
def test_the_loss_of_a_window_is_the_mean_over_its_tokens(family):
    found = loss_of(shared(family), anatomy_of(family), token_ids(5, 12), batch_tokens=24)
    assert found.fallback == ""
    assert found.batches == 3
    assert_right(found, MASKS)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_loss_of_a_mask_has_the_same_bits_alone_and_among_others(family):
    found = loss_of(shared(family), anatomy_of(family), token_ids(5, 12), batch_tokens=24)
    among = all_losses(found, MASKS)
    assert all(all_losses(found, [mask]) == {mask: losses} for mask, losses in among.items())
    assert all_losses(found, MASKS[::-1]) == among


def test_a_model_that_is_being_trained_is_measured_without_dropout():
    model = tiny("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    anatomy, windows = read_anatomy(model), token_ids(3, 12)
    expected = all_losses(loss_of(model, anatomy, windows), [DENSE])
    model.train()
    found = loss_of(model, anatomy, windows)
    assert all_losses(found, [DENSE]) == expected
    assert found.fallback == ""
    assert model.training


def test_a_table_of_positions_with_a_row_for_padding_is_shorter_than_it_says():
    model = zoo.build("masked/roberta")
    positions = model.config.max_position_embeddings - model.config.pad_token_id - 1
    assert usual_window(model) == positions
    examples = examples_of(model, token_ids(2, positions), SIGNS)
    assert all_losses(ModelObjective(model, read_anatomy(model), examples), [DENSE])
    with pytest.raises(InputError, match=f"longer than the model's context of {positions}"):
        ModelObjective(model, read_anatomy(model), examples_of(model, token_ids(2, positions + 1), SIGNS))


def test_windows_longer_than_a_micro_batch_are_evaluated_one_by_one():
    found = loss_of(shared("llama"), anatomy_of("llama"), token_ids(3, 12), batch_tokens=5)
    assert found.batches == 3
    assert_right(found, MASKS[:2])


def test_bfloat16_models_use_the_tree_too():
    model = FAMILIES["gemma3"]().to(torch.bfloat16)
    found = loss_of(model, read_anatomy(model), token_ids(2, 20))
    assert found.fallback == ""
    mask = parse_mask("attention.1")
    expected = plain(model, found.anatomy, mask, token_ids(2, 20))
    assert all_losses(found, [mask])[mask] == pytest.approx(expected, abs=0.05)


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
        found = loss_of(model, read_anatomy(model), token_ids(3, 12))
    assert "differs by" in found.fallback
    assert [record.getMessage() for record in caplog.records] == [
        f"plain forward passes instead of the mask tree: {found.fallback}"
    ]
    assert_right(found, MASKS)


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
    found = loss_of(model, anatomy, token_ids(3, 12))
    assert found.fallback == "it stops with ValueError: called twice"
    assert_right(found, MASKS)


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
    found = loss_of(model, anatomy, token_ids(3, 12))
    assert found.fallback == ""
    assert_right(found, MASKS)


def test_the_tree_costs_about_half_and_plain_passes_are_counted_as_such():
    windows = token_ids(3, 12)
    blocks = anatomy_of("llama").outline.blocks
    masks = [frozenset([block]) for block in blocks]
    tree = loss_of(shared("llama"), anatomy_of("llama"), windows).work(masks, 0)
    model = planted()
    passes = loss_of(model, read_anatomy(model), windows).work(masks, 0)
    each = len(blocks) // 2 * len(blocks) - len(blocks) // 2
    assert passes == Work(attention_tokens=each * 36, mlp_tokens=each * 36, head_tokens=len(blocks) * 33)
    assert tree.head_tokens == passes.head_tokens
    assert tree.attention_tokens + tree.mlp_tokens < 0.7 * (passes.attention_tokens + passes.mlp_tokens)


BERT = BertConfig(vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def test_no_more_logits_exist_at_once_than_asked_for(monkeypatch):
    model = shared("llama")
    monkeypatch.setattr(objective, "HEAD_POSITIONS", 12)
    sizes = []
    found = loss_of(model, anatomy_of("llama"), token_ids(3, 40))
    found._head = None  # as for a model with something behind its head
    handle = model.lm_head.register_forward_hook(lambda _module, _given, output: sizes.append(output.numel()))
    try:
        list(found.batch_losses([DENSE], 0))
    finally:
        handle.remove()
    assert max(sizes) <= 12 * VOCABULARY
    assert sum(sizes) == found.work([DENSE], 0).head_tokens * VOCABULARY == 3 * 39 * VOCABULARY


MEASURES = {
    "kl": (KL(), lambda p, q: kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)),
    "js": (JensenShannon(), lambda p, q: slow_js(p.double().softmax(-1), q.double().softmax(-1))),
    "logits": (LogitDistance(), lambda p, q: (p - q).pow(2).sum(-1).sqrt()),
}


def slow_js(p, q):
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "planted"])
@pytest.mark.parametrize("name", MEASURES)
@torch.no_grad()
def test_a_distance_to_the_whole_model_is_its_mean_over_predicted_tokens(family, name):
    model = planted() if family == "planted" else shared(family)  # the planted one takes plain passes
    anatomy, windows = read_anatomy(model), token_ids(5, 12)
    measure, slow = MEASURES[name]
    found = ModelObjective(model, anatomy, examples_of(model, windows), measure, batch_tokens=24)
    masks = [parse_mask("mlp.3"), *MASKS, *(frozenset([block]) for block in anatomy.outline.blocks)]
    masks = list(dict.fromkeys(masks))
    whole = model(windows).logits[:, :-1]
    losses = all_losses(found, masks)
    for mask in masks:
        with skipped(model, mask, anatomy=anatomy):
            expected = slow(whole, model(windows).logits[:, :-1]).mean(dim=1)
        assert losses[mask] == pytest.approx(expected.tolist(), abs=2e-4 if name == "logits" else 2e-5), mask
    assert losses[DENSE] == pytest.approx([0.0] * 5, abs=1e-6)
    alone = all_losses(found, masks[3:4])
    assert alone[masks[3]] == losses[masks[3]], "the same bits alone and among others"


ENCODERS = ["masked/bert", "masked/distilbert", "masked/modernbert", "masked/deberta-v2"]
PAIRS = ["seq2seq/t5", "seq2seq/bart", "seq2seq/marian"]
SIGNS = Signs(first=5, last=6, mask=7)


@torch.no_grad()
def slow_losses(model, examples):
    logits = model(**examples.inputs).logits
    losses = cross_entropy(logits.transpose(1, 2), examples.targets, ignore_index=IGNORED, reduction="none")
    return (losses.sum(dim=1) / (examples.targets != IGNORED).sum(dim=1)).tolist()


@pytest.mark.parametrize("name", [*ENCODERS, *PAIRS])
def test_encoders_and_encoder_decoders_are_asked_what_they_were_trained_for(name):
    model = zoo.build(name)
    anatomy = read_anatomy(model)
    signs = Signs(last=6, sentinels=(120, 121, 122)) if name.endswith("t5") else Signs() if "marian" in name else SIGNS
    examples = examples_of(model, token_ids(5, 20), signs)
    found = ModelObjective(model, anatomy, examples, batch_tokens=50)
    assert bool(found.fallback) == (name in PAIRS)
    assert found.batches > 1
    masks = [
        DENSE,
        *(frozenset([block]) for block in anatomy.outline.blocks[:6]),
        frozenset(anatomy.outline.blocks[2:5]),
    ]
    for mask, losses in all_losses(found, masks).items():
        with skipped(model, mask, anatomy=anatomy):
            assert losses == pytest.approx(slow_losses(model, examples), abs=2e-5), mask


@torch.no_grad()
def test_an_encoder_without_a_head_is_compared_with_its_own_embeddings():
    model = BertModel(BERT).eval()
    randomise(model, 1)
    anatomy, windows = read_anatomy(model), token_ids(5, 12) % 64
    examples = examples_of(model, windows)
    found = ModelObjective(model, anatomy, examples, Embedding(), batch_tokens=24)
    assert found.fallback == ""
    masks = [DENSE, *(frozenset([block]) for block in anatomy.outline.blocks)]
    whole = model(windows)[0].mean(dim=1)
    for mask, losses in all_losses(found, masks).items():
        with skipped(model, mask, anatomy=anatomy):
            expected = 1 - cosine_similarity(model(windows)[0].mean(dim=1), whole)
        assert losses == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("build", "measure"),
    [(lambda: shared("llama"), Embedding()), (lambda: LlamaModel(copy.deepcopy(shared("llama").config)), Loss())],
)
def test_a_measure_that_looks_at_what_a_model_has_not_is_refused_by_name(build, measure):
    model = build().eval()
    with pytest.raises(InputError, match=f"{type(model).__name__} has (no|a) head that predicts tokens"):
        ModelObjective(model, anatomy_of("llama"), examples_of(model, token_ids()), measure)


def test_memory_that_runs_out_is_no_reason_for_the_engine_that_needs_more(monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(MaskTree, "final_states", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        loss_of(shared("llama"), anatomy_of("llama"), token_ids())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_loss_over_all_tokens_as_a_part_of_the_vocabulary_is_the_loss(family):
    windows = token_ids(5, 12)
    whole = loss_of(shared(family), anatomy_of(family), windows, batch_tokens=24)
    found = loss_of(shared(family), anatomy_of(family), windows, batch_tokens=24, measure=SampledLoss(10**6))
    expected = all_losses(whole, MASKS)
    for mask, losses in all_losses(found, MASKS).items():
        assert losses == pytest.approx(expected[mask], abs=2e-5)
    assert found.work(MASKS, 0) == whole.work(MASKS, 0)


def test_a_loss_over_a_part_of_the_vocabulary_goes_by_what_the_whole_model_thinks_of_all_the_text():
    windows = token_ids(5, 12)
    model = shared("llama")
    found = loss_of(model, anatomy_of("llama"), windows, batch_tokens=24, measure=SampledLoss(40))
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
    tokens, chances = SampledLoss(40).draw(logits.softmax(-1).double().sum((0, 1)))
    assert len(tokens) == 40 < logits.shape[-1]
    for mask, losses in all_losses(found, MASKS).items():
        with skipped(model, mask, anatomy=found.anatomy), torch.no_grad():
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
        right = logits.gather(2, windows[:, 1:, None])[..., 0]
        others = (logits[..., tokens] - chances.log()).masked_fill(tokens == windows[:, 1:, None], -torch.inf)
        sums = torch.logaddexp(others.logsumexp(-1).float(), right)
        assert losses == pytest.approx((sums - right).mean(1).tolist(), abs=2e-5)


def test_a_part_of_the_vocabulary_costs_its_share_of_the_head_and_a_pass_to_draw_it():
    windows = token_ids(5, 12)
    found = loss_of(shared("llama"), anatomy_of("llama"), windows, batch_tokens=24, measure=SampledLoss(40))
    whole = loss_of(shared("llama"), anatomy_of("llama"), windows, batch_tokens=24)
    share = 40 / shared("llama").get_output_embeddings().weight.shape[0]
    for batch in range(found.batches):
        ours, plain = found.work(MASKS, batch), whole.work(MASKS, batch)
        assert (ours.attention_tokens, ours.mlp_tokens) == (plain.attention_tokens, plain.mlp_tokens)
        heads = plain.head_tokens / len(set(MASKS))
        assert ours.head_tokens == math.ceil(heads * share) * len(set(MASKS))
    once = sum((whole.work([DENSE], batch) for batch in range(whole.batches)), Work())
    draw, _ = found.drawing()
    assert draw == once.model_copy(update={"head_tokens": 2 * once.head_tokens})
    assert whole.drawing()[0] == Work()
    assert found.whole_pass() == whole.whole_pass() == once


def test_what_was_drawn_is_known_by_a_digest_that_other_draws_do_not_have():
    windows = token_ids(5, 12)
    model, anatomy = shared("llama"), anatomy_of("llama")
    one, same, other = (loss_of(model, anatomy, windows, measure=SampledLoss(40, seed)) for seed in (0, 0, 1))
    assert one.drawn == same.drawn != other.drawn
    assert one.drawn.startswith("40 tokens, ")


@pytest.mark.parametrize("entry", ["causal/gemma2", "seq2seq/t5"])
def test_a_model_whose_head_cannot_be_taken_in_parts_is_refused(entry):
    model = zoo.build(entry)
    with pytest.raises(InputError, match="cannot be judged by a part of its vocabulary"):
        ModelObjective(model, read_anatomy(model), examples_of(model, token_ids(2, 12), SIGNS), SampledLoss())
