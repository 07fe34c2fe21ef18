"""What decides the kind of a block, and what a row of teaching changes."""

import pytest
import torch
import zoo

from blockpruner.anatomy import kinds
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.errors import UnsupportedModelError


def kinds_of(model):
    return [(part.block.kind, part.evidence) for part in read_anatomy(model).stacks[0].layers[0].parts]


def test_a_row_settles_what_behaviour_misjudges(monkeypatch):
    model = zoo.build("masked/funnel")
    assert kinds_of(model) == [
        ("attention", "taught for FunnelRelMultiheadAttention"),
        ("mlp", "each token for itself"),
    ]
    monkeypatch.delitem(kinds.TAUGHT, "FunnelRelMultiheadAttention")
    assert kinds_of(model)[0] == ("cross_attention", "mixes tokens of another sequence")


def test_a_row_says_what_is_no_block_in_spite_of_its_name(monkeypatch):
    model = zoo.build("causal/inkling2_text")
    assert [kind for kind, _ in kinds_of(model)] == ["attention", "mlp"]
    monkeypatch.delitem(kinds.TAUGHT, "Inkling2ShortConvolution")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 \(Inkling2\w+\): no stand-ins leave what it does"):
        read_anatomy(model)


def test_a_wrong_row_gives_a_wrong_name_and_the_same_numbers(monkeypatch):
    model = zoo.build("causal/llama")
    honest = read_anatomy(model).stacks[0].layers[0].parts
    monkeypatch.setitem(kinds.TAUGHT, "LlamaMLP", "mixer")
    taught = read_anatomy(model).stacks[0].layers[0].parts
    assert [part.block.kind for part in taught] == ["attention", "mixer"]
    assert [(part.modules, part.idle, part.parameters) for part in taught] == [
        (part.modules, part.idle, part.parameters) for part in honest
    ]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("causal/llama", ["mixes tokens; keeps keys of every token", "each token for itself"]),
        ("causal/kimi_linear", ["mixes tokens; keeps a state", "each token for itself"]),
        ("masked/bert", ["mixes tokens; named attention", "each token for itself"]),
        ("masked/convbert", ["mixes tokens; named attention", "each token for itself"]),
        ("causal/rwkv", ["taught for RwkvSelfAttention", "mixes tokens, yet named feed-forward"]),
        ("causal/mamba", ["mixes tokens; keeps a state"]),
    ],
)
def test_it_is_said_what_decided(architecture, expected):
    assert [evidence for _, evidence in kinds_of(zoo.build(architecture))] == expected


def test_a_model_without_keys_of_its_own_in_a_layer_still_has_attention_there():
    parts = read_anatomy(zoo.build("causal/gemma3n_text")).parts
    last = [part for part in parts.values() if part.block.kind == "attention"][-1]
    assert last.evidence == "named attention; its keys and values come from elsewhere"


def test_half_precision_sees_the_same_kinds():
    for architecture in ("masked/bert", "causal/qwen3_moe"):
        model = zoo.build(architecture)
        assert kinds_of(model.to(torch.bfloat16)) == kinds_of(zoo.build(architecture))
