import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labs import lab_of, made

from blockpruner.blocks import Move
from blockpruner.criteria.magnitude import Magnitude
from blockpruner.errors import InputError
from blockpruner.importance.block_weights import NUMBERS_AT_ONCE, holdings, in_float, leaving, staying, sums
from blockpruner.importance.criterion import Lab
from blockpruner.searching.moves import GRANULARITIES
from blockpruner.surgery.removal import prune_

MODELS = [
    "causal/llama",
    "causal/gpt2",
    "causal/gpt_neox",
    "causal/falcon",
    "causal/qwen2_moe",
    "causal/mixtral",
    "causal/mamba",
    "causal/jamba",
    "causal/gemma3n_text",
    "causal/gemma4_text",
    "masked/bert",
    "masked/modernbert",
    "seq2seq/t5",
    "seq2seq/bart",
]


def magnitudes(lab: Lab, kind: str, p: Any = 1) -> Any:
    return Magnitude(p).scores(lab, GRANULARITIES[kind](lab.anatomy.outline, lab.mask))


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_of_what_blocks_hold_are_those_that_the_anatomy_counts(name):
    model, anatomy = made(name)
    held = {h.blocks: sum(model.get_parameter(n).numel() for n in h.names) for h in holdings(model, anatomy)}
    expected: dict[Any, int] = {}
    for stack in anatomy.stacks:
        for layer in stack.layers:
            for part in layer.parts:
                expected[frozenset([part.block])] = part.parameters
            together = frozenset(part.block for part in layer.parts)
            expected[together] = expected.get(together, 0) + layer.shared
    assert held == {blocks: size for blocks, size in expected.items() if size}


@pytest.mark.parametrize("name", ["causal/llama", "causal/qwen2_moe", "causal/mamba", "masked/bert", "seq2seq/t5"])
def test_what_leaves_is_what_a_model_that_is_cut_for_good_has_lost(name):
    model, anatomy = made(name)
    held = holdings(model, anatomy)
    moves = {kind: GRANULARITIES[kind](anatomy.outline, frozenset()) for kind in ("block", "layer")}
    for move in (moves["block"][1], moves["layer"][0]):
        cut = copy.deepcopy(model)
        prune_(cut, move.blocks, anatomy=anatomy)
        left = {n for n, _ in cut.named_parameters(remove_duplicate=False)}
        gone = {n for n, _ in model.named_parameters(remove_duplicate=False)} - left
        assert set(leaving(held, move, frozenset())) == {n for n in gone if not n.endswith("bias")}


@pytest.mark.parametrize("name", ["causal/llama", "causal/falcon", "masked/bert", "seq2seq/t5"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_moves_one_after_the_other_take_what_they_take_at_once(name, data):
    model, anatomy = made(name)
    blocks = anatomy.outline.blocks
    order = data.draw(st.permutations(blocks))[: data.draw(st.integers(1, len(blocks)))]
    held = holdings(model, anatomy)
    one_by_one: list[str] = []
    for place, block in enumerate(order):
        one_by_one += leaving(held, Move.of(block), frozenset(order[:place]))
    assert sorted(one_by_one) == sorted(leaving(held, Move.of(*order), frozenset()))
    left = set(staying(held, frozenset(order)))
    assert left.isdisjoint(one_by_one)
    assert left | set(one_by_one) == {name for h in held for name in h.weights}


@pytest.mark.parametrize("p", [1, 2])
def test_the_score_is_the_sum_over_matrices_and_norms_of_the_blocks(p):
    lab = lab_of("causal/llama")
    found = magnitudes(lab, "layer", p)
    for layer, score in enumerate(found.values()):
        inside = [w.detach() for n, w in lab.model.named_parameters() if n.startswith(f"model.layers.{layer}.")]
        assert score.value == pytest.approx(sum(float(w.double().abs().pow(p).sum()) for w in inside), rel=1e-5)
        assert (score.stderr, score.unit) == (None, "sum of |weights|" if p == 1 else "sum of squared weights")
        assert score.reason


def test_biases_do_not_count_and_norms_do():
    lab = lab_of("causal/gpt2")
    (score, *_) = magnitudes(lab, "layer").values()
    names = [n for n, _ in lab.model.named_parameters() if n.startswith("transformer.h.0.")]
    counted = [n for n in names if not n.endswith(".bias")]
    assert {n.removeprefix("transformer.h.0.") for n in counted} >= {"ln_1.weight", "attn.c_attn.weight"}
    assert score.value == pytest.approx(sum(float(lab.model.get_parameter(n).detach().abs().sum()) for n in counted))
    assert len(counted) < len(names)


def test_the_last_block_of_a_layer_takes_what_its_blocks_share_with_it():
    whole, partner = lab_of("causal/gpt_neox"), lab_of("masked/bert", "attention.1")
    (move,) = [m for m in magnitudes(partner, "block") if str(m) == "mlp.1"]
    alone = magnitudes(lab_of("masked/bert"), "block")[move]
    norms = [n for n, _ in partner.model.named_parameters() if "layer.1." in n and n.endswith("LayerNorm.weight")]
    more = sum(float(partner.model.get_parameter(n).detach().abs().sum()) for n in norms)
    assert more > 0
    assert magnitudes(partner, "block")[move].value == pytest.approx(alone.value + more)
    assert magnitudes(whole, "layer")


def test_experts_count_whole():
    lab = lab_of("causal/mixtral")
    score = magnitudes(lab, "mlp")[Move.parse("mlp.0")]
    experts = [w.detach() for n, w in lab.model.named_parameters() if "layers.0." in n and "experts" in n]
    assert experts
    assert score.value > sum(float(w.abs().sum()) for w in experts)


def test_a_block_whose_weights_are_zero_scores_zero_and_the_lowest():
    model = copy.deepcopy(made("causal/llama")[0])
    lab = lab_of("causal/llama")
    planted = Move.parse("attention.2")
    with torch.no_grad():
        for name in leaving(holdings(model, lab.anatomy), planted, frozenset()):
            model.get_parameter(name).zero_()
    found: Any = Magnitude().scores(dataclasses.replace(lab, model=model), list(magnitudes(lab, "block")))
    assert found[planted].value == 0
    assert min(found, key=lambda move: found[move].value) == planted


def test_a_weight_that_is_not_finite_gives_no_score():
    model = copy.deepcopy(made("causal/llama")[0])
    lab = lab_of("causal/llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("nan")
    found = Magnitude().scores(dataclasses.replace(lab, model=model), list(magnitudes(lab, "mlp")))
    assert [score is None for score in found.values()] == [False, True, False, False]


def test_packed_weights_are_refused_by_name():
    model = copy.deepcopy(made("causal/llama")[0])
    lab = lab_of("causal/llama")
    packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model.get_submodule("model.layers.1.mlp.up_proj").weight = packed
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight holds torch.uint8"):
        Magnitude().scores(dataclasses.replace(lab, model=model), list(magnitudes(lab, "mlp")))


def test_pieces_are_of_one_size_and_all_that_there_is(monkeypatch):
    monkeypatch.setattr("blockpruner.importance.block_weights.NUMBERS_AT_ONCE", 5)
    first, other = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(4, 3).t()
    pieces = list(in_float(first, other))
    assert [len(piece) for piece, _ in pieces] == [5, 5, 2]
    assert torch.equal(torch.cat([a * b for a, b in pieces]).view(3, 4), first * other)
    assert NUMBERS_AT_ONCE > 5


def test_sums_go_entry_by_entry_and_are_zero_where_nothing_leaves():
    model, anatomy = made("causal/llama")
    held = holdings(model, anatomy)
    move = Move.parse("mlp.0")
    values = dict.fromkeys(staying(held, frozenset()), (1.0, 10.0))
    count = len(leaving(held, move, frozenset()))
    assert sums(held, [move], frozenset(), values)[move] == (count, 10.0 * count)
    assert sums((), [move], frozenset(), values)[move] == (0.0, 0.0)
