"""Maps folded into the projection before them: as good as beside it, and refused where something lies between."""

import re
from dataclasses import replace

import pytest
import torch
import zoo
from labs import SIGNS, made
from transformers import AutoModelForCausalLM

from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.recoveries import parse_chain, parse_recovery
from blockpruner.recovering import recover
from blockpruner.repairs.closed_form import MADE_UP
from blockpruner.repairs.folded_runs import runs
from blockpruner.repairs.folding import Projection, foldable, projection
from blockpruner.repairs.normal_equations import NormalEquations, ridge_map
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.updates import contribution, stream_after
from blockpruner.surgery import checkpoint
from blockpruner.surgery.checkpoint import save_pruned
from blockpruner.surgery.gaps import UNREPAIRED, repaired, reweighted
from blockpruner.tables import foldings
from blockpruner.texts.examples import examples_of

LLAMA_LIKE = ["causal/llama", "causal/mistral", "causal/qwen2", "causal/qwen3", "causal/gpt2", "causal/granite"]


def examples(model, windows=12, tokens=24, seed=1):
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=seed)["input_ids"], SIGNS)


def bench_of(name, removed, **more):
    model, anatomy = made(name)
    return Bench(model, anatomy, parse_mask(removed), examples(model), examples(model, 4, seed=2), **more)


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs).logits


def map_beside(inner, added):
    """A hook that gives m (I + inner) + added for what a module returns."""

    def hook(_, __, output):
        return (output.double() + output.double() @ inner + added).to(output)

    return hook


@pytest.mark.parametrize("block", ["mlp.1", "attention.1"])
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_folded_it_computes_what_the_map_beside_the_projection_computes(name, block):
    model, anatomy = made(name)
    (found,) = parse_mask(block)
    part = anatomy.parts[found]
    place = projection(model, part)
    assert isinstance(place, Projection)
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(32, 32, generator=generator, dtype=torch.float64) / 6
    added = torch.randn(32, generator=generator, dtype=torch.float64)
    added = added if place.bias else torch.zeros_like(added)
    batch = examples(model)
    handle = model.get_submodule(place.weight.rpartition(".")[0]).register_forward_hook(map_beside(inner, added))
    beside = logits(model, batch)
    handle.remove()
    plain = logits(model, batch)
    weights = place.folded(model, inner, added)
    assert weights is not None
    with reweighted(model, weights):
        folded = logits(model, batch)
    torch.testing.assert_close(folded, beside, atol=1e-4, rtol=1e-4)
    assert float((folded - plain).abs().max()) > 0.1
    assert torch.equal(logits(model, batch), plain)


def test_a_constant_has_no_place_in_a_projection_without_a_bias():
    model, anatomy = made("causal/llama")
    place = projection(model, anatomy.parts[next(iter(parse_mask("mlp.1")))])
    zeros = torch.zeros(32, 32, dtype=torch.float64)
    assert isinstance(place, Projection)
    assert place.folded(model, zeros, torch.ones(32, dtype=torch.float64)) is None


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("causal/llama", "mlp", ""),
        ("causal/gpt2", "attention", ""),
        ("causal/opt", "mlp", ""),
        ("causal/granite", "mlp", ""),
        ("causal/gpt_neox", "mlp", ""),
        ("seq2seq/t5", "decoder.mlp", ""),
        ("causal/gemma3_text", "mlp", "more than a sum .*post_feedforward_layernorm"),
        ("causal/olmo2", "attention", "more than a sum .*post_attention_layernorm"),
        ("causal/mixtral", "mlp", "does not end in one linear projection, but in experts"),
        ("masked/bert", "mlp", "norms or scales stand on the stream"),
    ],
)
def test_it_is_said_of_every_block_whether_a_map_can_be_folded_into_it(name, kind, reason):
    found = {block: why for block, why in foldable(*made(name)).items() if block.startswith(f"{kind}.")}
    assert found
    for block, why in found.items():
        assert (why == "") == (reason == ""), (block, why)
        assert re.search(reason, why), (block, why)


def test_no_map_can_be_folded_into_a_share_of_what_a_block_adds():
    found = foldable(*made("causal/qwen2_moe"))  # experts in every other layer, with one beside that all tokens share
    assert found["mlp.0"] == ""
    assert "more than a sum" in found["mlp.1"]


def test_foldable_leaves_the_model_as_it_was():
    model, anatomy = made("causal/llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    foldable(model, anatomy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_runs_are_the_removed_blocks_that_follow_each_other_and_the_block_before_them():
    _, anatomy = made("causal/llama")
    found = runs(anatomy, parse_mask("attention.0+mlp.1+attention.2+mlp.3"))
    assert [(str(run), str(run.before)) for run in found] == [
        ("attention.0", "None"),
        ("attention.2+mlp.1", "attention.1"),
        ("mlp.3", "attention.3"),
    ]


def test_the_folded_map_is_that_of_least_squares_over_all_tokens():
    bench = bench_of("causal/llama", "attention.2+mlp.2", force=True)
    model, anatomy, batch = bench.model, bench.anatomy, bench.examples
    repair, (record,) = parse_recovery("replaceme:ridge=0.01,sinks=1").repair(bench)
    before, last = next(iter(parse_mask("mlp.1"))), next(iter(parse_mask("mlp.2")))
    behind, added = contribution(model, anatomy, before, bench.mask, batch, repair.__class__())
    missing = stream_after(model, anatomy, last, frozenset(), batch) - behind
    sums = NormalEquations(32, 32)
    sums.add(added.reshape(-1, 32), missing.reshape(-1, 32))
    inner = ridge_map(sums, "it", ridge=0.01, constant=False).weight
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    expected = (torch.eye(32, dtype=torch.float64) + inner).T @ weight.double()
    torch.testing.assert_close(repair.weights["model.layers.1.mlp.down_proj.weight"], expected.float())
    assert record.settings["folded into"] == "mlp.1"
    assert repair.added_parameters == record.added_parameters == 0


def test_with_a_bias_the_mean_of_what_is_missing_is_folded_too():
    bench = bench_of("causal/gpt2", "attention.2+mlp.2", force=True)
    repair, _ = parse_recovery("replaceme").repair(bench)
    assert set(repair.weights) == {"transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"}


def test_where_nothing_can_be_folded_it_is_an_error_that_says_why():
    with pytest.raises(InputError, match=r"mlp.1 cannot take a map: more than a sum stands between"):
        parse_recovery("replaceme").repair(bench_of("causal/gemma3_text", "attention.2+mlp.2"))
    with pytest.raises(InputError, match="no block is left before it"):
        parse_recovery("replaceme").repair(bench_of("causal/llama", "attention.0+mlp.0"))


def test_a_run_that_cannot_be_folded_is_left_beside_one_that_can():
    repair, records = parse_recovery("replaceme").repair(bench_of("causal/llama", "attention.0+mlp.2", force=True))
    assert [record.applied for record in records] == [False, True]
    assert records[0].reason == "no block is left before it"
    assert len(repair.weights) == 1


def mended(method, bench):
    (recovery,) = parse_chain(method)
    return recovery.repair(bench)


@pytest.mark.parametrize(
    "method", ["linear", "bias", "adapter:loss=block,epochs=1,batch=4,accumulate=1", "replaceme", "replaceme:sinks=1"]
)
def test_what_is_folded_is_not_added_once_more_by_what_follows(method):
    bench = bench_of("causal/llama", "attention.2+mlp.2", force=True)
    start, _ = mended("replaceme", bench)
    repair, records = mended(method, replace(bench, start=start))
    assert repair == start
    assert {record.reason for record in records} <= {MADE_UP}


def test_what_could_not_be_folded_is_filled_by_what_follows():
    bench = bench_of("causal/llama", "attention.0+mlp.2", force=True)
    start, _ = mended("replaceme", bench)
    repair, records = mended("linear", replace(bench, start=start))
    assert list(repair.replacements) == [bench.anatomy.parts[next(iter(parse_mask("attention.0")))].path]
    assert repair.weights == start.weights
    assert [(record.removed, record.reason) for record in records] == [("attention.0", ""), ("mlp.2", MADE_UP)]


@pytest.mark.parametrize("method", ["linear:ridge=0.0001,target=dense", "span:ridge=0.0001", "replaceme:target=dense"])
def test_what_is_still_missing_to_the_dense_model_is_fitted_on_top_of_what_is_folded(method):
    bench = bench_of("causal/llama", "attention.2+mlp.2", force=True)
    last = next(iter(parse_mask("mlp.2")))
    wanted = stream_after(bench.model, bench.anatomy, last, frozenset(), bench.examples)

    def missing(repair):
        found = stream_after(bench.model, bench.anatomy, last, bench.mask, bench.examples, repair)
        return float((wanted - found)[:, 1:].square().sum())  # no weight is on the first token of a row

    start, _ = mended("replaceme:ridge=0.0001", bench)
    repair, _ = mended(method, replace(bench, start=start))
    twice, _ = mended("linear:ridge=0.0001", replace(bench, start=replace(start, made_up=frozenset())))
    assert missing(repair) <= missing(start) * (1 + 1e-6) < missing(UNREPAIRED)
    assert missing(twice) > missing(start)  # as it was when nothing told what is folded


def test_a_chain_says_why_nothing_was_added_to_what_is_folded():
    model, anatomy = made("causal/llama")
    chain = parse_chain("replaceme,linear:rank=4")
    repair, record = recover(model, anatomy, parse_mask("attention.2+mlp.2"), chain, examples(model), force=True)
    assert [step.applied for step in record.steps] == [True, False]
    assert record.steps[1].reason == f"nothing was recovered: attention.2: {MADE_UP}"
    assert not repair.replacements


def test_a_folded_model_whose_layers_are_whole_is_saved_in_the_stock_form(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "reload_difference", lambda *_args, **_options: 0.0)  # it is loaded here, below
    model = zoo.build("causal/llama")
    bench = bench_of("causal/llama", "attention.2+mlp.2", force=True)
    repair, _ = parse_recovery("replaceme").repair(bench)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = save_pruned(model, None, bench.anatomy, bench.mask, tmp_path / "model", repair=repair)
    assert saved.form == "stock"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.num_hidden_layers == model.config.num_hidden_layers - 1
    with repaired(model, bench.anatomy, bench.mask, repair):
        torch.testing.assert_close(logits(again, bench.examples), logits(model, bench.examples))


def test_inspect_says_in_one_line_what_can_fold_and_the_first_reason_why_not():
    free, no = dict.fromkeys(["attention.0", "mlp.0"], ""), "norms or scales stand on the stream behind it"
    assert foldings(free) == "A recovery can fold a map into 2 of 2 blocks (replaceme)."
    assert foldings({**free, "mlp.1": no}).endswith(f"2 of 3 blocks (replaceme); not into mlp.1: {no}.")
    assert foldings({"mlp.0": no, "mlp.1": no}).endswith(f"not into mlp.0 and 1 other: {no}.")
