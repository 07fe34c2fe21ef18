import copy
import dataclasses
from typing import Any

import pytest
import torch
from labs import SIGNS, lab_of, moves_of, scored
from torch import Tensor

from blockpruner.blocks import Block, Move
from blockpruner.criteria.gates import Gates
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.importance import gating
from blockpruner.importance.block_weights import holdings, leaving
from blockpruner.importance.criterion import Lab
from blockpruner.importance.gating import GATES, Gated
from blockpruner.importance.gradients import mean_loss, windows_of
from blockpruner.journal import Journal
from blockpruner.searching.evaluations import Notes
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import Examples, examples_of

MODELS = [
    "causal/llama",
    "causal/gpt2",
    "causal/gpt_neox",
    "causal/falcon",
    "causal/bloom",
    "causal/gemma3_text",
    "causal/qwen2_moe",
    "causal/mamba",
    "masked/bert",
    "seq2seq/t5",
    "seq2seq/bart",
]


def plain(lab: Lab, mask: Any) -> float:
    with torch.no_grad(), skipped(lab.model, mask, anatomy=lab.anatomy):
        return float(mean_loss(lab.model, windows_of(lab.model, lab.examples)[0]))


def gated_loss(lab: Lab, moves: list[Move], gates: Tensor) -> tuple[float, Tensor]:
    with skipped(lab.model, lab.mask, anatomy=lab.anatomy):
        gated = Gated(lab.model, lab.anatomy, moves, lab.mask)
        return gated.loss(windows_of(lab.model, lab.examples)[0], gates)


@pytest.mark.parametrize("name", MODELS)
def test_open_gates_change_nothing_and_a_shut_one_skips_its_block(name):
    lab = lab_of(name)
    moves = moves_of(lab)
    ones = torch.ones(len(moves))
    assert gated_loss(lab, moves, ones)[0] == pytest.approx(plain(lab, []), rel=1e-6)
    for place in (0, len(moves) // 2, len(moves) - 1):
        gates = ones.clone()
        gates[place] = 0
        assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, moves[place].blocks), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_shut_gate_of_a_layer_skips_it_norms_on_the_stream_too(name):
    lab = lab_of(name)
    moves = moves_of(lab, "layer")
    gates = torch.ones(len(moves))
    assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, []), rel=1e-6)
    gates[1] = 0
    assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, moves[1].blocks), rel=1e-5)


@pytest.mark.parametrize("name", ["causal/llama", "masked/bert", "seq2seq/bart"])
def test_the_slope_of_a_gate_is_a_finite_difference(name):
    lab = lab_of(name)
    lab = dataclasses.replace(lab, model=copy.deepcopy(lab.model).double())
    moves = moves_of(lab)
    gates = torch.linspace(0.3, 0.9, len(moves))
    _, slope = gated_loss(lab, moves, gates)
    for place in (0, 3, len(moves) - 1):
        more, less = gates.clone(), gates.clone()
        more[place] += 0.002
        less[place] -= 0.002
        step = float(more[place] - less[place])
        expected = (gated_loss(lab, moves, more)[0] - gated_loss(lab, moves, less)[0]) / step
        assert float(slope[place]) == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_gates_work_on_top_of_a_mask():
    lab = lab_of("masked/bert", "attention.1+mlp.2")
    moves = moves_of(lab)
    gates = torch.ones(len(moves))
    assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, lab.mask), rel=1e-6)
    gates[moves.index(Move.of(Block("mlp", 1)))] = 0  # the last of its layer, whose norms leave as well
    assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, lab.mask | {Block("mlp", 1)}), rel=1e-5)


def test_a_block_in_two_moves_is_open_as_far_as_both_gates_are():
    lab = lab_of("causal/llama")
    a, b = Block("attention", 1), Block("mlp", 1)
    twice, _ = gated_loss(lab, [Move.of(a), Move.of(a, b)], torch.tensor([0.5, 0.5]))
    apart, _ = gated_loss(lab, [Move.of(a), Move.of(b)], torch.tensor([0.25, 0.5]))
    assert twice == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("name", ["causal/gemma4_text", "causal/gemma3n_text"])
def test_of_a_kept_module_what_it_makes_for_others_is_left_alone(name):
    lab = lab_of(name)
    kept = sorted(lab.anatomy.outline.kept, key=lambda block: block.order)
    moves = [Move.of(block) for block in kept] or moves_of(lab)
    gates = torch.zeros(len(moves))
    gates[1:] = 1
    assert gated_loss(lab, moves, gates)[0] == pytest.approx(plain(lab, moves[0].blocks), rel=1e-5)


@pytest.mark.parametrize("kind", ["hard-concrete", "straight-through"])
def test_a_planted_block_without_output_has_the_lowest_score(kind):
    """The model is asked for its own most likely tokens, so that what its other blocks do is worth something."""
    lab = lab_of("causal/llama")
    model: Any = copy.deepcopy(lab.model)
    planted = Move.of(Block("mlp", 2))
    with torch.no_grad():
        for name in leaving(holdings(model, lab.anatomy), planted, lab.mask):
            model.get_parameter(name).zero_()
        model.lm_head.weight.mul_(8)
        ids = lab.examples.inputs["input_ids"]
        own = model(input_ids=ids).logits.argmax(-1)
    lab = dataclasses.replace(lab, model=model, examples=Examples("next token", {"input_ids": ids}, own, (1, 1, 1)))
    found = scored(Gates(steps=60, kind=kind), lab, moves_of(lab))
    assert min(found, key=lambda move: found[move].value) == planted
    assert len({score.value for score in found.values()}) == len(found)
    for score in found.values():
        assert 0 < score.value < 1
        assert score.stderr is None
        assert score.reason


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    criterion, identity = Gates(steps=25), {"model": "x"}
    told: list[tuple[int, int, str]] = []
    whole = lab_of("causal/llama", progress=lambda *seen: told.append(seen))
    moves = moves_of(whole)
    expected = scored(criterion, whole, moves)
    assert [done for done, _, _ in told] == list(range(1, 26))
    assert {total for _, total, _ in told} == {25}

    def die(done: int, *_: object) -> None:
        if done == 17:
            raise KeyboardInterrupt

    path = tmp_path / "journal.jsonl"
    killed = lab_of("causal/llama", progress=die, notes=Notes(Journal.open(path, identity)))
    with pytest.raises(KeyboardInterrupt):
        scored(criterion, killed, moves)
    told.clear()
    resumed = dataclasses.replace(killed, progress=whole.progress, notes=Notes(Journal.open(path, identity)))
    assert scored(criterion, resumed, moves) == expected
    assert [done for done, _, _ in told] == list(range(11, 26))


def test_the_mask_that_was_learned_is_noted(tmp_path):
    lab = lab_of("causal/llama", notes=Notes(Journal.open(tmp_path / "journal.jsonl", {"model": "x"})))
    moves = moves_of(lab)
    criterion = Gates(steps=60, sparsity=1000.0, rate=0.2)
    scored(criterion, lab, moves)
    noted = Journal.open(tmp_path / "journal.jsonl", {"model": "x"}).records[-1]
    assert noted["note"].startswith("gates shut ")
    logits = gating.learned(lab, moves, criterion)
    assert noted["value"] == [str(move) for move in gating.shut(lab, moves, criterion, logits)]
    assert noted["value"] == [str(move) for move in moves]  # at this price, all of them


def test_scores_depend_on_the_seed_and_on_nothing_global():
    lab = lab_of("causal/llama")
    moves = moves_of(lab)
    torch.manual_seed(1)
    one = scored(Gates(steps=12), lab, moves)
    torch.manual_seed(2)
    again = scored(Gates(steps=12), dataclasses.replace(lab, notes=Notes()), moves)
    other = scored(Gates(steps=12, seed=1), lab, moves)
    assert one == again
    assert one != other


def test_the_model_is_left_as_it_was():
    lab = lab_of("causal/llama")
    model = copy.deepcopy(lab.model).train()
    hooks = [dict(module._forward_hooks) for module in model.modules()]  # transformers leaves some of its own
    scored(Gates(steps=3), dataclasses.replace(lab, model=model), moves_of(lab))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


def test_a_model_without_a_head_is_refused_by_name():
    lab = lab_of("masked/bert")
    base: Any = lab.model.bert
    lab = dataclasses.replace(lab, model=base, examples=examples_of(base, torch.full((2, 8), 20), SIGNS))
    with pytest.raises(InputError, match="BertModel has no head"):
        scored(Gates(), lab, moves_of(lab))


def test_a_loss_that_is_not_finite_stops_with_the_step():
    lab = lab_of("causal/llama")
    model: Any = copy.deepcopy(lab.model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(CheckFailedError, match="not finite at step 0"):
        scored(Gates(), dataclasses.replace(lab, model=model), moves_of(lab))


@pytest.mark.parametrize("kind", GATES)
def test_openness_is_the_share_of_gates_that_are_drawn_open(kind):
    gate = GATES[kind]
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for logit in (-3.0, -1.0, 0.0, 2.0):
        logits = torch.full_like(uniform, logit)
        share = float((gate.sampled(logits, uniform) > 0).double().mean())
        assert share == pytest.approx(float(gate.openness(logits[:1])), abs=0.005)
    ends = gate.settled(torch.tensor([-5.0, 5.0], dtype=torch.float64))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 0.0}, {"sparsity": -1.0}])
def test_options_that_learn_nothing_are_refused(options):
    with pytest.raises(InputError, match="gates cannot be learned with steps="):
        Gates(**options)
