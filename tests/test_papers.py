"""What the papers published, as far as it can be checked without their weights: sizes, shares, orders, lists."""

import json
from fractions import Fraction

import pytest
import torch
from test_foreign import UNITS
from tiny import tiny
from transformers import AutoModelForCausalLM, LlamaConfig

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Estimate
from blockpruner.blocks import Block, Move, Outline
from blockpruner.importance.block_weights import holdings
from blockpruner.plan import Plan
from blockpruner.scores import least_first
from blockpruner.searching.moves import layer, offered, parse_protected

# BlockPruner's other list for Llama-2-7B, of 64 calibration samples.
ORDER_64 = (
    "mha25 mha27 mha24 mha23 mha28 mha29 mha8 mlp7 mha19 mha30 "
    "mlp22 mha21 mlp27 mha18 mlp21 mlp11 mha12 mha14 mlp14 mlp24"
)
RATIOS = {4: 3.98, 8: 8.98, 12: 13.97, 14: 16.98, 16: 19.98, 17: 21.99, 18: 24.00, 20: 27.00}
# Shortened LLaMA, Llama-2-7B by Taylor, the least important layer first.
TAYLOR = "0,28,27,25,29,26,24,23,21,22,30,20,19,18,17,14,16,13,12,15,31,11,10,1,9,8,7,6,5,2,4,3"
# ShortGPT's lists. The share of the second is BlockPruner's figure for it; ShortGPT itself says 24.6.
SHORTGPT = {
    "llama-2-7b": ([27, 26, 25, 28, 24, 29, 23, 21, 22], 27.1),
    "llama-2-13b": ([33, 31, 32, 30, 29, 34, 28, 35, 27, 26], 24.37),
}


def outline_of(config):
    """The outline of a Llama of the published size: blocks as found in a small one, sizes as counted on no memory."""
    small = tiny(
        "llama",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    anatomy = read_anatomy(small)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = {
        next(iter(h.blocks)): sum(model.get_parameter(name).numel() for name in h.names)
        for h in holdings(small, anatomy)
    }
    assert len(held) == 2 * config.num_hidden_layers
    total = sum(parameter.numel() for parameter in model.parameters())
    return Outline(anatomy.outline.blocks, held, total, anatomy.outline.serial), anatomy


@pytest.fixture(scope="module")
def llama():
    return outline_of(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))


def blocks(units):
    return [Block("attention" if kind == "mha" else "mlp", int(number)) for kind, number in units]


def share(outline, mask):
    return round(float(Fraction(100 * outline.removed_parameters(mask), outline.total_parameters)), 2)


def test_llama_2_7b_has_the_sizes_of_which_all_ratios_are_made(llama):
    outline, _ = llama
    assert outline.total_parameters == 6_738_415_616
    assert outline.parameters[Block("attention", 5)] == 67_112_960
    assert outline.parameters[Block("mlp", 5)] == 135_270_400


def test_blockpruners_official_orders_remove_the_shares_it_reports(llama):
    outline, anatomy = llama
    order = blocks(UNITS)
    assert {k: share(outline, frozenset(order[:k])) for k in RATIOS} == RATIOS
    assert anatomy.cache_bytes(frozenset(order[:17])) / anatomy.cache_bytes() == 1 - 0.375
    other = blocks((unit[:3], unit[3:]) for unit in ORDER_64.split())
    assert share(outline, frozenset(other[:17])) == 21.99
    assert share(outline, frozenset(other[:16])) == 20.99
    assert share(outline, frozenset(other[:18])) == 22.98


def test_taylor_plus_is_taylor_on_the_layers_that_are_not_protected(llama):
    outline, _ = llama
    order = [int(number) for number in TAYLOR.split(",")]
    places = {number: float(place) for place, number in enumerate(order)}

    def scored(moves):
        return {m: Estimate(value=places[next(iter(m.blocks)).layer], stderr=None, n=10, unit="") for m in moves}

    def layers(moves):
        return [next(iter(move.blocks)).layer for move in least_first(scored(moves))]

    assert layers(layer(outline, frozenset())) == order
    plus = offered("layer", outline, frozenset(), parse_protected("plus", outline))
    assert layers(plus)[:6] == [28, 27, 25, 29, 26, 24]
    assert not {0, 1, 2, 3, 30, 31} & set(layers(plus))
    six = frozenset(block for move in least_first(scored(plus))[:6] for block in move.blocks)
    assert share(outline, six) == pytest.approx(18.02, abs=0.01)


@pytest.mark.parametrize("name", SHORTGPT)
def test_shortgpts_lists_remove_the_shares_it_reports(name):
    removed, reported = SHORTGPT[name]
    wide = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, vocab_size=32000)
    narrow = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    outline, _ = outline_of(wide if "13b" in name else narrow)
    mask = frozenset(block for block in outline.blocks if block.layer in removed)
    assert len(mask) == 2 * len(removed)
    assert share(outline, mask) == pytest.approx(reported, abs=0.1)


# LLM-Drop's published lists for Mistral-7B and Llama-2-13B, in the order of similarity.
LLM_DROP = [
    ({"drop_attn_list": [25, 26, 24, 22], "drop_mlp_list": []}, 4, "attention"),
    ({"drop_attn_list": [], "drop_mlp_list": [26, 27, 25, 24, 23, 22, 29, 28]}, 8, "mlp"),
    ({"drop_attn_list": [33, 32, 31, 34, 30, 35, 29, 28], "drop_mlp_list": [33, 32, 31, 34, 30, 35, 29, 28]}, 16, ""),
]


@pytest.mark.parametrize(("config", "count", "kind"), LLM_DROP)
def test_llm_drops_lists_parse_and_count_right(config, count, kind, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    plan = Plan.read(path)
    assert len(plan.mask()) == count
    assert not kind or {block.kind for block in plan.mask()} == {kind}
    listed = config["drop_attn_list"] or config["drop_mlp_list"]
    assert [step.blocks[0].layer for step in plan.steps] == listed


def test_a_layer_is_its_two_blocks(llama):
    outline, _ = llama
    assert outline.removed_parameters(Move.parse("attention.7+mlp.7").blocks) == 202_383_360
