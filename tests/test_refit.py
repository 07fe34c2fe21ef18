"""Kept blocks fitted anew: nearest to the dense model's stream, and as plain least squares over all tokens finds it."""

import re
from dataclasses import replace

import pytest
import torch
import zoo
from labs import SIGNS, made
from transformers import AutoModelForCausalLM

from blockpruner.anatomy.probing import recorded
from blockpruner.blocks import Block, parse_mask
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.recoveries import parse_recovery
from blockpruner.recovering import recover
from blockpruner.repairs import side_by_side
from blockpruner.repairs.pupil import Ends
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.refitting import FOLDED, RIDGES, between, scale_of
from blockpruner.repairs.updates import stream_after
from blockpruner.surgery import checkpoint
from blockpruner.surgery.checkpoint import save_pruned
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import examples_of

FAMILIES = [
    *("causal/llama", "causal/gpt2", "causal/opt", "causal/granite", "causal/gemma2", "causal/gemma3_text"),
    *("causal/olmo2", "causal/gpt_neox", "causal/falcon", "causal/phi", "causal/mamba", "causal/mixtral", "seq2seq/t5"),
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


@pytest.mark.parametrize("name", ["causal/llama", "causal/gemma3_text", "causal/olmo2"])
def test_the_recorded_error_is_what_is_missing_behind_the_block_as_it_then_computes(name):
    bench = bench_of(name, "mlp.1")
    repair, records = refit(bench, "refit:sinks=1")
    (block,) = parse_mask("attention.2")
    place = next(name for name in bench.anatomy.parts[block].outlets if name.endswith("o_proj.weight"))
    record = next(record for record in records if record.place == place)
    assert record.applied
    only = Repair(weights={place: repair.weights[place]})
    wanted = stream_after(bench.model, bench.anatomy, block, frozenset(), bench.held_out)
    before, after = (
        float(((wanted - found).square().sum(-1) / wanted.square().sum(-1)).sum())
        for found in (
            stream_after(bench.model, bench.anatomy, block, bench.mask, bench.held_out, made)
            for made in (UNREPAIRED, only)
        )
    )
    assert record.error == pytest.approx(after / before, rel=1e-3)


def test_the_ridge_is_the_one_that_leaves_least_missing():
    bench = bench_of("causal/gemma3_text", "mlp.1", force=True)
    _, (record, *_) = refit(bench)
    alone = {ridge: refit(bench, f"refit:ridge={ridge}")[1][0].error or 1.0 for ridge in RIDGES}
    assert record.error == min(alone.values())
    assert record.settings["ridge"] == min(alone, key=lambda ridge: alone[ridge])


def test_it_goes_on_from_what_stands_in_the_gaps():
    bench = bench_of("causal/gemma3_text", "attention.1+mlp.1", force=True)
    start, _ = refit(bench, "linear:target=dense")
    repair, _ = refit(replace(bench, start=start))
    assert repair.replacements == start.replacements
    assert missing(bench, repair, bench.examples) < missing(bench, start, bench.examples)


@pytest.mark.parametrize("name", ["causal/llama", "causal/gemma3_text", "seq2seq/t5"])
@pytest.mark.parametrize("rank", [0, 4])
def test_maps_behind_a_block_that_was_fitted_anew_are_those_that_its_stream_asks_for(name, rank):
    _, anatomy = made(name)
    early, late = first(anatomy), first(anatomy, 3)
    bench = bench_of(name, f"{early}+{late}")
    mapped, _ = parse_recovery(f"linear:target=dense,rank={rank},ridge=0.001").repair(bench)
    repair, records = refit(replace(bench, start=mapped), "refit:ridge=0.001")
    place, other = (anatomy.parts[Block.parse(each)].path for each in (late, early))
    (record,) = [each for each in records if each.place == place]
    assert (record.removed, record.added_parameters) == (late, 0)
    assert record.applied, record
    assert (record.error or 1) < 1
    assert repair.replacements[other] is mapped.replacements[other]  # nothing changed before it
    assert repair.replacements[place].spec == mapped.replacements[place].spec
    left = {path: each for path, each in repair.replacements.items() if path != place}
    form = "stream" if mapped.replacements[place].norm == "none" else "input"
    again, _ = parse_recovery(f"linear:target=dense,rank={rank},ridge=0.001,regressor={form}").repair(
        replace(bench, start=replace(repair, replacements=left))
    )
    for one, two in zip(again.replacements[place].parameters(), repair.replacements[place].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


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


def test_where_norms_stand_on_the_stream_it_is_an_error_that_says_so_and_what_to_use():
    with pytest.raises(InputError, match="norms or scales stand on the stream") as caught:
        refit(bench_of("masked/bert", "mlp.1"))
    assert "linear" in caught.value.fix


def test_where_nothing_is_left_behind_the_gap_it_is_an_error_that_says_so():
    with pytest.raises(InputError, match=r"no block is left behind mlp\.3"):
        refit(bench_of("causal/llama", "mlp.3"))


def test_in_a_chain_what_cannot_be_fitted_ends_nothing():
    bench = bench_of("causal/llama", "mlp.3", force=True)
    start, _ = refit(bench, "linear")
    repair, (record,) = refit(replace(bench, start=start))
    assert repair == start
    assert "no block is left" in record.reason


def test_what_an_earlier_method_folded_into_a_block_before_a_gap_stays():
    bench = bench_of("causal/llama", "mlp.0+attention.2+mlp.2", force=True)
    start, _ = refit(bench, "replaceme")
    repair, records = refit(replace(bench, start=start))
    assert start.weights
    for name, value in start.weights.items():
        assert torch.equal(repair.weights[name], value)
    assert {record.reason for record in records if record.place in start.weights} <= {FOLDED}
    assert len(repair.weights) > len(start.weights)


@pytest.mark.parametrize(("ridge", "sinks"), [(-1, 0), (0.1, -1), (0.1, 5)])
def test_numbers_that_mean_nothing_are_refused(ridge, sinks):
    with pytest.raises(InputError, match="nothing can be fitted with"):
        parse_recovery(f"refit:ridge={ridge},sinks={sinks}")


def test_gain_and_scale_are_found_from_what_a_block_adds():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(50, 8, generator=generator)
    gain, scale = torch.rand(8, generator=generator) + 0.1, torch.rand(50, generator=generator) + 0.1
    rounding = torch.full_like(given, 1e-6)
    assert between(given, given, rounding) == (pytest.approx(torch.ones(8)), False)
    assert between(3 * given, given, rounding) == (pytest.approx(torch.full((8,), 3.0)), False)
    update = given * gain * scale[:, None]
    found, scaled = between(update, given, rounding)
    assert scaled
    torch.testing.assert_close(found * scale_of(update, given, found)[:, None], gain * scale[:, None])
    with pytest.raises(UnsupportedModelError, match="more than a gain and a scale"):
        between(update + given.roll(1, dims=1), given, rounding)


def test_a_token_a_thousand_times_the_others_does_not_hide_what_stands_between():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(50, 8, generator=generator)
    gain, scale = torch.rand(8, generator=generator) + 0.5, torch.rand(50, generator=generator) + 0.1
    scale[0] = 1e5
    update = given * gain * scale[:, None]
    found, scaled = between(update, given, 1e-7 * update.abs())
    assert scaled
    torch.testing.assert_close(found * scale_of(update, given, found)[:, None], gain * scale[:, None])


def test_channels_whose_rounding_hides_the_gain_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(50, 8, generator=generator)
    scale = torch.rand(50, 1, generator=generator) + 0.1
    noise = torch.zeros(50, 8)
    noise[:, 3] = 5.0
    update = given * scale + noise * torch.randn(50, 8, generator=generator)
    found, scaled = between(update, given, noise + 1e-6)
    assert scaled
    assert found[3] == 0
    assert bool((found[[0, 1, 2, 4, 5, 6, 7]] > 0).all())


def test_channels_that_a_norm_all_but_shuts_are_left_alone_and_the_rest_is_fitted():
    model = zoo.build("causal/gemma3_text")
    shut = [3, 17, 30]
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[shut] = -1 + 1e-4  # the gain is one more than the weight
    bench = replace(bench_of("causal/gemma3_text", "mlp.1"), model=model)
    bench = replace(bench, held_out=bench.examples)
    repair, records = refit(bench)
    place = "model.layers.2.self_attn.o_proj.weight"
    assert next(record for record in records if record.place == place).applied
    change = (repair.weights[place] - model.get_parameter(place)).abs().amax(dim=1)
    assert [row for row, size in enumerate(change) if not size] == shut


@pytest.mark.parametrize("name", ["causal/llama", "causal/gemma3_text"])
def test_in_bfloat16_with_large_channels_nothing_gets_worse(name):
    model = zoo.build(name).to(torch.bfloat16)
    model.get_input_embeddings().weight.data[:, :3] += 32
    bench = replace(bench_of(name, "mlp.1"), model=model)
    repair, records = refit(bench)
    assert all(record.error is None or record.error < 1 for record in records if record.applied)
    for record in records:
        if record.applied:
            before = model.get_parameter(record.place).data.float()
            assert float((repair.weights[record.place].float() - before).norm()) < 2 * float(before.norm())
    assert missing(bench, repair, bench.held_out) <= 1.02 * missing(bench, UNREPAIRED, bench.held_out)


def test_a_refitted_model_keeps_its_stock_form(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "reload_difference", lambda *_args, **_options: 0.0)  # it is loaded here, below
    model, anatomy = made("causal/llama")
    bench = bench_of("causal/llama", "attention.1+mlp.1", force=True)
    repair, _ = refit(bench)
    save_pruned(model, None, anatomy, bench.mask, tmp_path / "out", repair=repair)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    with torch.no_grad(), repaired(model, anatomy, bench.mask, repair):
        wanted = model(**bench.held_out.inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**bench.held_out.inputs).logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_whole_model_is_judged_on_held_out_text_as_after_any_recovery():
    model, anatomy = made("causal/gemma3_text")
    text = examples(model)
    repair, record = recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("refit"), text, force=True)
    assert record.steps[0].applied
    assert repair.weights
    assert record.recovered != record.pruned
