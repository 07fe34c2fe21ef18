import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import zoo
from labs import SIGNS, fresh, lab_of, made, moves_of, scored
from torch import nn

from blockpruner.blocks import Block, Move
from blockpruner.criteria.fisher import Fisher
from blockpruner.criteria.taylor import Taylor
from blockpruner.errors import InputError
from blockpruner.importance import gradients as engine
from blockpruner.importance.block_weights import MeanProducts, holdings, leaving, staying
from blockpruner.importance.criterion import Lab
from blockpruner.journal import Journal
from blockpruner.searching.evaluations import Notes
from blockpruner.surgery.removal import prune_, skipped
from blockpruner.texts.examples import IGNORED, Examples, examples_of

FAMILIES = ["causal/llama", "causal/gpt2", "causal/qwen2_moe", "masked/bert", "seq2seq/t5"]
WALKED = ["causal/llama", "causal/gpt2", "causal/qwen2_moe", "masked/bert", "causal/mamba", "causal/gemma3_text"]


def gone_with(name: str, lab: Lab, move: Move) -> set[str]:
    """The weights that a model really loses: those of two models that were cut for good, compared."""
    left = []
    for mask in (lab.mask, lab.mask | move.blocks):
        model = copy.deepcopy(made(name)[0])
        prune_(model, mask, anatomy=lab.anatomy)
        left.append({name for name, _ in model.named_parameters(remove_duplicate=False)})
    return {name for name in left[0] - left[1] if not name.endswith("bias")}


def plain_gradients(lab: Lab) -> dict[str, torch.Tensor]:
    """One backward pass over all examples at once, on a copy of the model."""
    model = copy.deepcopy(lab.model).requires_grad_(True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with skipped(model, lab.mask, anatomy=lab.anatomy):
        logits = model(**lab.examples.inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), lab.examples.targets.flatten(), ignore_index=IGNORED)
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}


def weights_of(lab: Lab) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in lab.model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("kind", ["block", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_is_a_plain_backward_pass_over_all_examples(name, kind):
    lab = lab_of(name)
    moves = moves_of(lab, kind)
    slopes, weights = plain_gradients(lab), weights_of(lab)
    found = scored(Taylor(), lab, moves)
    assert list(found) == list(moves)
    for move in (moves[0], moves[-1]):
        expected = sum(float((weights[n] * slopes[n]).abs().sum()) for n in gone_with(name, lab, move))
        assert found[move].value == pytest.approx(expected, rel=1e-4)
        assert found[move].stderr is None
        assert found[move].reason
        assert (found[move].unit, found[move].n) == ("nats", 3)


@pytest.mark.parametrize("name", ["causal/llama", "masked/bert", "seq2seq/t5"])
def test_scores_on_top_of_a_mask_are_those_of_the_model_without_it(name):
    blocks = made(name)[1].outline.blocks
    lab = lab_of(name, f"{blocks[0]}+{blocks[3]}")
    moves = moves_of(lab, "block")
    slopes, weights = plain_gradients(lab), weights_of(lab)
    found = scored(Taylor(), lab, moves)
    partner = next(m for m in moves if next(iter(m.blocks)).layer == blocks[0].layer)
    for move in (partner, moves[-1]):
        expected = sum(float((weights[n] * slopes[n]).abs().sum()) for n in gone_with(name, lab, move))
        assert found[move].value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_fisher_is_half_the_mean_square_of_each_windows_gradient(name):
    lab = lab_of(name)
    move = moves_of(lab, "block")[1]
    names, weights = gone_with(name, lab, move), weights_of(lab)
    values = []
    for window in lab.examples.rows():
        slopes = plain_gradients(dataclasses.replace(lab, examples=window))
        values.append(sum(float((weights[n] * slopes[n]).double().square().sum()) for n in names) / 2)
    found = scored(Fisher(), lab, [move])[move]
    assert found.value == pytest.approx(sum(values) / 3, rel=1e-4)
    assert found.stderr == pytest.approx(torch.tensor(values).std().item() / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("name", WALKED)
def test_models_of_one_stack_are_walked_layer_by_layer_without_a_warning(name, caplog):
    lab = lab_of(name)
    scored(Taylor(), lab, moves_of(lab, "block"))
    assert not caplog.records


def test_a_model_of_two_stacks_takes_whole_backward_passes_and_says_so(caplog):
    lab = lab_of("seq2seq/t5")
    scored(Taylor(), lab, moves_of(lab, "block"))
    assert "whole backward passes" in caplog.text
    assert "2 stacks" in caplog.text


@pytest.mark.parametrize("name", ["causal/gemma4_text", "causal/gemma3n_text"])
def test_layers_that_hand_on_more_than_the_stream_are_noticed(name, caplog):
    lab = lab_of(name)
    moves = moves_of(lab, "block")
    slopes, weights = plain_gradients(lab), weights_of(lab)
    found = scored(Taylor(), lab, moves)
    assert "whole backward passes" in caplog.text
    names = gone_with(name, lab, moves[0])
    expected = sum(float((weights[n] * slopes[n]).abs().sum()) for n in names)
    assert found[moves[0]].value == pytest.approx(expected, rel=1e-4)


def test_a_layer_that_goes_wrong_on_one_window_only_sends_the_walk_back_to_the_start(monkeypatch, caplog):
    lab = lab_of("causal/llama")
    moves = moves_of(lab, "block")
    expected = scored(Taylor(), lab, moves)
    walk = engine.BackwardWalk
    again = walk._back

    def wrong(self, place, row, after, before, slope):
        last = place == 1 and torch.equal(row.inputs["input_ids"], lab.examples.inputs["input_ids"][1:2])
        return again(self, place, row, after + last, before, slope)

    monkeypatch.setattr(walk, "_back", wrong)
    found = fresh(Taylor(), lab, moves)
    assert "called by itself, model.layers.1 differs" in caplog.text
    for move in moves:
        assert found[move].value == pytest.approx(expected[move].value, rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = zoo.build("causal/llama").train()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    parameters[4].grad = kept = torch.ones_like(parameters[4])
    lab = dataclasses.replace(lab_of("causal/llama"), model=model)
    before = [p.detach().clone() for p in parameters]
    with torch.inference_mode():
        scored(Taylor(), lab, moves_of(lab, "block"))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert [p.requires_grad for p in parameters] == [i != 3 for i in range(len(parameters))]
    assert parameters[4].grad is kept
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 4)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    assert model.training


def test_products_of_a_bfloat16_model_are_summed_in_float32(caplog):
    lab = lab_of("causal/llama")
    half: Any = copy.deepcopy(lab.model)
    half.to(torch.bfloat16)
    moves = moves_of(lab, "block")
    exact, found = scored(Taylor(), lab, moves), fresh(Taylor(), dataclasses.replace(lab, model=half), moves)
    for move in moves:
        assert found[move].value == pytest.approx(exact[move].value, rel=0.1)
    assert not caplog.records
    sink = MeanProducts({"w": torch.full((2**12,), 1 / 3).bfloat16()}, 1)
    sink.take(0, "w", torch.full((2**12,), 1 / 3).bfloat16())
    sink.done("")
    assert sink.values["w"][0] == pytest.approx(2**12 * float(torch.tensor(1 / 3).bfloat16()) ** 2, rel=1e-6)


def test_gradients_are_gone_before_those_of_the_next_layer_are_made():
    """Counts the bytes of gradients that are alive whenever one more is made: one layer's, and the newest one."""
    lab = lab_of("causal/llama")
    held = holdings(lab.model, lab.anatomy)
    parameters = {n: p for n, p in lab.model.named_parameters() if n in staying(held, lab.mask)}
    layer = sum(p.numel() for n, p in parameters.items() if n.startswith("model.layers.0."))
    most = 0

    class Counting(MeanProducts):
        def take(self, window, name, gradient):
            nonlocal most
            super().take(window, name, gradient)
            assert all(p.grad is None for p in lab.model.parameters())
            most = max(most, sum(g.numel() for g in self.held.values()))

    rows = engine.windows_of(lab.model, lab.examples)
    sink = engine.gradients(
        lab.model, lab.anatomy, rows, parameters, lambda: Counting(parameters, 3), report=lambda *_: None
    )
    assert most == layer
    assert not sink.held


def test_the_head_is_run_on_a_few_positions_at_a_time(monkeypatch):
    lab = lab_of("masked/bert")
    moves = moves_of(lab, "block")
    whole = scored(Taylor(), lab, moves)
    seen = []
    walk = engine.BackwardWalk
    logits = walk._logits
    monkeypatch.setattr(
        walk, "_logits", lambda self, state, inputs: seen.append(state.shape) or logits(self, state, inputs)
    )
    monkeypatch.setattr(walk.__init__, "__defaults__", (2 * zoo.VOCABULARY,))
    parts = fresh(Taylor(), lab, moves)
    assert (1, 2, zoo.HIDDEN) in seen
    assert [parts[m].value for m in moves] == pytest.approx([whole[m].value for m in moves], rel=1e-4)


def test_a_model_without_a_head_is_refused_by_name():
    base = made("masked/bert")[0].bert
    with pytest.raises(InputError, match="BertModel has no head"):
        engine.windows_of(base, examples_of(base, torch.full((2, 8), 20), SIGNS))


@pytest.mark.parametrize("criterion", [Taylor(), Fisher()])
def test_a_zeroed_block_scores_nothing_and_the_lowest(criterion):
    lab = lab_of("causal/llama")
    model = copy.deepcopy(lab.model)
    planted = Move.of(Block("mlp", 2))
    with torch.no_grad():
        for name in leaving(holdings(model, lab.anatomy), planted, lab.mask):
            model.get_parameter(name).zero_()
    found = fresh(criterion, dataclasses.replace(lab, model=model), moves_of(lab, "block"))
    assert found[planted].value == 0
    assert min(found, key=lambda move: found[move].value) == planted


def test_progress_counts_up_to_its_total_and_a_killed_run_has_its_sums_again(tmp_path):
    told = []
    journal = Journal.open(tmp_path / "journal.jsonl", {"model": "x"})
    lab = lab_of("causal/llama", notes=Notes(journal), progress=lambda *seen: told.append(seen))
    moves = moves_of(lab, "block")
    first = scored(Fisher(), lab, moves)
    assert [done for done, _, _ in told] == list(range(1, told[0][1] + 1))
    again = Notes(Journal.open(tmp_path / "journal.jsonl", {"model": "x"}))
    told.clear()
    assert scored(Fisher(), dataclasses.replace(lab, notes=again), moves) == first
    assert not told


def test_a_loss_that_is_not_finite_gives_no_score_and_strict_json(tmp_path):
    lab = lab_of("causal/llama", notes=Notes(Journal.open(tmp_path / "journal.jsonl", {"model": "x"})))
    model = copy.deepcopy(lab.model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    lab = dataclasses.replace(lab, model=model)
    moves = moves_of(lab, "layer")
    for criterion in (Taylor(), Fisher()):
        assert all(score is None for score in scored(criterion, lab, moves).values())
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_of_items_with_answers_the_right_answer_alone_is_a_window():
    model, _ = made("causal/llama")
    ids = torch.arange(16, 64).view(6, 8)
    items = Examples("choices", {"input_ids": ids}, ids.clone(), (2, 3, 1), (1, 2, 0))
    assert [int(row.inputs["input_ids"][0, 0]) for row in engine.windows_of(model, items)] == [24, 48, 56]
