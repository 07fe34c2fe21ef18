"""Kept blocks fitted anew: nearest to the dense model's stream, and as plain least squares over all tokens finds it."""

import re
from dataclasses import replace

import pytest
import torch
import zoo
from labs import SIGNS, made

from blockpruner.anatomy.probing import recorded
from blockpruner.blocks import parse_mask
from blockpruner.errors import UnsupportedModelError
from blockpruner.recoveries import parse_recovery
from blockpruner.recovering import recover
from blockpruner.repairs import side_by_side
from blockpruner.repairs.closed_form import RIDGES
from blockpruner.repairs.pupil import Ends
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.refitting import gain_of, scale_of
from blockpruner.repairs.updates import stream_after
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import examples_of

FAMILIES = [
    *("causal/llama", "causal/gpt2", "causal/opt", "causal/granite", "causal/gemma2", "causal/gemma3_text"),
    *("causal/olmo2", "causal/gpt_neox", "causal/falcon", "causal/phi", "causal/mamba", "causal/mixtral", "seq2seq/t5"),
    "seq2seq/t5",
]


def examples(model, windows=40, tokens=24, seed=1):
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=seed)["input_ids"], SIGNS)


def bench_of(name, removed, **more):
    model, anatomy = made(name)
    return Bench(model, anatomy, parse_mask(removed), examples(model), examples(model, 8, seed=2), **more)


def first(anatomy, layer=1):
    return next(str(block) for block in anatomy.parts if block.layer == layer)


def refit(bench, method="refit"):
    return parse_recovery(method).repair(bench)


@torch.no_grad()
def missing(bench, repair, part):
    """How far the pruned model's last state is from the dense one's: mean over tokens of |r|^2 / |z|^2."""
    ends = Ends(bench.model, bench.anatomy)
    wanted, _ = ends.body(part)
    with repaired(bench.model, bench.anatomy, bench.mask, repair):
        found, _ = ends.body(part)
    return float(((wanted - found).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_state_comes_nearer_to_the_dense_models_and_nothing_is_added(name):
    model, anatomy = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bench = bench_of(name, first(anatomy), force=True)
    repair, records = refit(bench, "refit:sinks=1")
    assert any(record.applied for record in records), records
    assert missing(bench, repair, bench.examples) < 0.98 * missing(bench, UNREPAIRED, bench.examples)
    assert repair.added_parameters == 0
    assert not repair.replacements
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_first_projection_is_that_of_plain_least_squares_over_all_tokens():
    bench = bench_of("causal/llama", "mlp.1", force=True)
    bench = replace(bench, held_out=bench.examples)  # by which no output is left as it was
    model, anatomy, owner = bench.model, bench.anatomy, "model.layers.2.self_attn.o_proj"
    repair, records = refit(bench, "refit:ridge=0.001,sinks=1")
    (block,) = parse_mask("attention.2")
    with torch.no_grad():
        wanted = stream_after(model, anatomy, block, frozenset(), bench.examples)
        with recorded({owner: model.get_submodule(owner)}) as calls:
            found = stream_after(model, anatomy, block, bench.mask, bench.examples)
        (h,) = calls[owner][-1].args
    h, wanted, found = (each.reshape(-1, each.shape[-1]).double() for each in (h, wanted, found))
    beside = 1 / wanted.square().mean(-1)
    beside = (beside / beside.sum())[:, None]
    power = (h.T @ (beside * h)).diagonal().mean()
    rows = torch.cat([h * beside.sqrt(), (0.001 * power).sqrt() * torch.eye(h.shape[1]).double()])
    answers = torch.cat([(wanted - found) * beside.sqrt(), torch.zeros(h.shape[1], found.shape[1]).double()])
    expected = model.get_parameter(f"{owner}.weight").double() + torch.linalg.lstsq(rows, answers).solution.T
    torch.testing.assert_close(repair.weights[f"{owner}.weight"].double(), expected, atol=1e-5, rtol=1e-4)
    assert records[0].place == f"{owner}.weight"


@pytest.mark.parametrize("name", ["causal/llama", "causal/gpt2", "causal/granite"])
def test_a_projection_that_was_damaged_is_restored(name):
    model = zoo.build(name)
    bench = bench_of(name, "mlp.1", force=True)
    (removed,), (block,) = bench.mask, parse_mask("mlp.2")
    anatomy = bench.anatomy
    for outlet in anatomy.parts[removed].outlets:
        model.get_parameter(outlet).data.zero_()  # so that nothing is missing without it
    place = anatomy.parts[block].outlets[0]
    whole = model.get_parameter(place).data
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)) * whole.std()
    start = Repair(weights={place: whole + noise})
    repair, _ = refit(replace(bench, model=model, start=start), "refit:ridge=0,sinks=1")
    assert float(noise.abs().max()) > 0.05
    torch.testing.assert_close(repair.weights[place], whole, atol=1e-4, rtol=1e-3)


def test_blocks_before_the_first_gap_are_left_as_they_are():
    _, records = refit(bench_of("causal/llama", "mlp.1", force=True))
    layers = [int(re.findall(r"layers\.(\d+)", record.place)[0]) for record in records]
    assert layers == [2, 2, 3, 3]


def test_states_on_disk_give_the_same_bits(monkeypatch):
    bench = bench_of("causal/llama", "attention.1", force=True)
    held, _ = refit(bench)
    monkeypatch.setattr(side_by_side, "IN_MEMORY", 0)
    spilled, _ = refit(bench)
    assert held.weights.keys() == spilled.weights.keys()
    assert all(torch.equal(held.weights[name], spilled.weights[name]) for name in held.weights)


def test_each_output_has_the_ridge_that_suits_it():
    bench = bench_of("causal/llama", "mlp.1", force=True)
    _, (record, *_) = refit(bench)
    alone = [refit(bench, f"refit:ridge={ridge}")[1][0].error or 1.0 for ridge in RIDGES]
    assert record.error is not None
    assert record.error <= min(alone)
    assert "outputs" in str(record.settings["ridge"])


def test_it_goes_on_from_what_stands_in_the_gaps():
    bench = bench_of("causal/gemma3_text", "attention.1+mlp.1", force=True)
    start, _ = refit(bench, "linear:target=dense")
    repair, _ = refit(replace(bench, start=start))
    assert repair.replacements == start.replacements
    assert missing(bench, repair, bench.examples) < missing(bench, start, bench.examples)


def test_what_is_fitted_anew_is_not_added_once_more_by_what_follows():
    bench = bench_of("causal/llama", "mlp.1", force=True)
    start, _ = refit(bench)
    repair, _ = refit(replace(bench, start=start), "linear")
    assert repair == start


def test_blocks_that_do_not_end_in_one_projection_are_named_and_left():
    _, records = refit(bench_of("causal/mixtral", "attention.1", force=True))
    left = {record.place: record.reason for record in records if record.error is None}
    assert left
    assert all("one linear projection" in reason for reason in left.values())


def test_where_norms_stand_on_the_stream_it_is_an_error_that_says_so():
    with pytest.raises(UnsupportedModelError, match="norms or scales stand on the stream"):
        refit(bench_of("masked/bert", "mlp.1"))


def test_gain_and_scale_are_found_from_what_a_block_adds():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(50, 8, generator=generator)
    gain, scale = torch.rand(8, generator=generator) + 0.1, torch.rand(50, generator=generator) + 0.1
    update = given * gain * scale[:, None]
    found = gain_of(update, given)
    torch.testing.assert_close(found * scale_of(update, given, found)[:, None], gain * scale[:, None])


def test_the_whole_model_is_judged_on_held_out_text_as_after_any_recovery():
    model, anatomy = made("causal/gemma3_text")
    text = examples(model)
    repair, record = recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("refit"), text, force=True)
    assert record.steps[0].applied
    assert repair.weights
    assert record.recovered != record.pruned
