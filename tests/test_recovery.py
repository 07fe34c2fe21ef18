"""Closed-form recoveries: what they put in the place of removed blocks, and what they refuse."""

import functools
import logging
from typing import Any

import pytest
import torch
import zoo
from labs import SIGNS, made
from tiny import FAMILIES
from transformers import AutoModelForCausalLM

from blockpruner import recovering
from blockpruner.anatomy.probing import evaluating
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Estimate
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.recoveries import RECOVERIES, parse_chain, parse_recovery
from blockpruner.registry import format_method
from blockpruner.repairs.closed_form import TAKEN, ClosedForm, Given, fitted_at, gathered, regressors_of, replacement
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.side_by_side import Walk
from blockpruner.repairs.updates import UpdatesAt, stream_after, token_axes
from blockpruner.standin import Replacement, StandIn
from blockpruner.surgery.gaps import UNREPAIRED, Repair, gaps, repaired
from blockpruner.texts.examples import examples_of

recover: Any = recovering.recover  # what it may not know, it knows here: losses and errors are numbers
loss: Any = recovering.loss

ARCHITECTURES = {
    "causal/llama": "attention.1+mlp.2",
    "causal/gpt2": "attention.1+mlp.1+mlp.2",
    "causal/gemma3_text": "attention.1+mlp.1+mlp.2",
    "causal/falcon": "attention.1+mlp.1+mlp.2",
    "causal/gpt_neox": "attention.1+mlp.2",
    "causal/mixtral": "attention.1+mlp.2",
    "causal/mamba": "mixer.1+mixer.2",
    "causal/bloom": "attention.1+mlp.1+mlp.2",
    "causal/opt": "attention.1+mlp.2",
    "masked/bert": "attention.1+mlp.1+mlp.2",
    "seq2seq/t5": "encoder.attention.1+decoder.cross_attention.1+decoder.mlp.2",
    "seq2seq/bart": "encoder.attention.1+encoder.mlp.1+decoder.mlp.2",
}


def examples(model, windows=12, tokens=24, seed=1):
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=seed)["input_ids"], SIGNS)


def mended(method, bench) -> Any:
    """The repair and the records of a method, as text."""
    return parse_recovery(method).repair(bench)


def bench_of(name, removed=None, **more):
    model, anatomy = made(name)
    mask = parse_mask(removed or ARCHITECTURES[name])
    return Bench(model, anatomy, mask, examples(model), examples(model, 4, seed=2), **more)


@functools.cache
def linear_model(family="llama"):
    """A model whose mlp.1 is exactly linear: in place of the mlp stands one projection."""
    model = FAMILIES[family]()
    layers = model.model.layers if family == "llama" else model.transformer.h
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers[1].mlp = torch.nn.Linear(32, 32)
    return model.eval(), read_anatomy(model)


@torch.no_grad()
def logits(model, batch):
    with evaluating(model):
        return model(**batch.inputs).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_is_exactly_linear_is_replaced_without_loss(family):
    model, anatomy = linear_model(family)
    text, other, mask = examples(model), examples(model, 3, seed=9), parse_mask("mlp.1")
    method = parse_recovery("linear:regressor=input,ridge=1e-12")
    repair, record = recover(model, anatomy, mask, method, text, force=True)
    (gap,) = record.gaps
    assert gap.error < 1e-9
    assert record.recovered.value == pytest.approx(record.dense.value, abs=1e-5)
    if record.pruned.value > record.dense.value:  # of random weights either may be better
        assert record.recovered_share == pytest.approx(1, abs=1e-3)
    assert record.added_parameters == repair.added_parameters == gap.added_parameters == 32 * 32 + 32
    expected = logits(model, other)
    with repaired(model, anatomy, mask, repair):
        torch.testing.assert_close(logits(model, other), expected, atol=2e-4, rtol=1e-4)
    with repaired(model, anatomy, mask):
        assert float((logits(model, other) - expected).abs().max()) > 0.1


def test_of_a_linear_block_of_low_rank_that_rank_is_enough_and_less_is_not():
    model, anatomy = linear_model()
    weight = model.model.layers[1].mlp.weight
    kept = weight.data
    try:
        weight.data = (kept[:, :3] @ kept[:3, :]).contiguous()
        errors = {
            rank: recover(
                *(model, anatomy, parse_mask("mlp.1")),
                parse_recovery(f"linear:regressor=input,ridge=1e-12,rank={rank}"),
                examples(model),
            )[1]
            .gaps[0]
            .error
            for rank in (2, 3)
        }
    finally:
        weight.data = kept
    assert errors[3] < 1e-9 < 0.01 < errors[2]


@pytest.mark.parametrize("method", ["bias", "linear:rank=4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_recovered_as_far_as_its_own_text_goes(name, method):
    bench = bench_of(name, force=True)
    bench = Bench(**{**vars(bench), "held_out": bench.examples})  # so that what is minimised is what is measured
    repair, records = mended(method, bench)
    assert [record.reason for record in records] == [""] * len(records)
    assert list(repair.replacements) == [gap.path for gap in gaps(bench.anatomy, bench.mask)]
    assert all(0 <= record.error < 1 for record in records)
    assert repair.added_parameters == sum(record.added_parameters for record in records)


def observed(bench, gap, repair=UNREPAIRED, sinks=1.0, dense=False):
    axes = token_axes(bench.model)
    updates = UpdatesAt(*(bench.model, bench.anatomy, bench.mask, gap, repair), sinks=sinks, dense=dense, axes=axes)
    return updates.observe(bench.examples)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("masked/bert", "seq2seq/bart")])
def test_what_is_missing_is_the_difference_that_the_block_makes_to_the_stream(name):
    bench = bench_of(name)
    for gap in gaps(bench.anatomy, bench.mask):
        (block,) = gap.blocks
        seen = observed(bench, gap)
        here = (bench.model, bench.anatomy, block)
        made_by_it = stream_after(*here, bench.mask - gap.blocks, bench.examples) - stream_after(
            *here, bench.mask, bench.examples
        )
        torch.testing.assert_close(seen.y, made_by_it.reshape(seen.y.shape), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_update_itself_put_in_the_gap_gives_the_stream_of_the_block(name):
    bench = bench_of(name)
    for gap in gaps(bench.anatomy, bench.mask):
        update = observed(bench, gap).y

        class Exactly(torch.nn.Module):
            def forward(self, hidden, update=update):
                return update.reshape(*hidden.shape[:-1], -1)

        exact: dict = {gap.path: Exactly()}
        with repaired(bench.model, bench.anatomy, bench.mask, Repair(exact)):
            found = last_states(bench.model, bench.examples)
        with repaired(bench.model, bench.anatomy, bench.mask - gap.blocks):
            expected = last_states(bench.model, bench.examples)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def last_states(model, batch):
    return model(**batch.inputs).logits


def test_what_reaches_a_gap_is_what_its_replacement_is_given():
    bench = bench_of("causal/gemma3_text")
    for gap in gaps(bench.anatomy, bench.mask):
        given = []

        class Looking(torch.nn.Module):
            def forward(self, hidden, given=given):
                given.append(hidden)
                return torch.zeros_like(hidden)

        looking: dict = {gap.path: Looking()}
        with repaired(bench.model, bench.anatomy, bench.mask, Repair(looking)):
            last_states(bench.model, bench.examples)
        torch.testing.assert_close(observed(bench, gap).x, given[0].reshape(-1, given[0].shape[-1]))


def test_the_own_normed_input_of_a_block_is_a_linear_map_of_the_regressor():
    for name in ("causal/llama", "causal/gpt2", "causal/gemma3_text"):
        model, anatomy = made(name)
        bench = bench_of(name, "mlp.1")
        (gap,) = gaps(anatomy, bench.mask)
        inputs = []
        module = model.get_submodule(gap.path)
        hook = module.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
        last_states(model, bench.examples)
        hook.remove()
        own = inputs[0].reshape(-1, 32).double()
        (regressor,) = regressors_of("input", model, gap)
        x = regressor.of(observed(bench, gap).x).double()
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        residual = own - x @ torch.linalg.lstsq(x, own).solution
        assert float(residual.abs().max()) < 1e-5 * float(own.abs().max())


def test_the_first_position_of_every_row_weighs_what_was_asked_for():
    bench = bench_of("causal/llama")
    weights = observed(bench, gaps(bench.anatomy, bench.mask)[0], sinks=0.25).weights.view(12, 24)
    assert torch.equal(weights[:, 0], torch.full((12,), 0.25))
    assert torch.equal(weights[:, 1:], torch.ones(12, 23))


def test_a_gap_is_fitted_on_the_model_as_recovered_before_it():
    bench = bench_of("causal/llama", force=True)
    first, second = gaps(bench.anatomy, bench.mask)
    repair, _ = mended("linear:ridge=0.1", bench)
    form, walk = ClosedForm("auto", ridge=0.1), Walk(bench)
    before = Repair({first.path: repair.replacements[first.path]})
    again = replacement(fitted_at(walk, second, form, before), bench.model.device, torch.float32)
    torch.testing.assert_close(again.state_dict(), repair.replacements[second.path].state_dict())
    alone = replacement(fitted_at(walk, second, form, UNREPAIRED), bench.model.device, torch.float32)
    assert not torch.allclose(alone.bias, again.bias)


def test_micro_batches_add_up_to_the_same_sums():
    bench = bench_of("causal/gpt2")
    gap = gaps(bench.anatomy, bench.mask)[0]
    axes = token_axes(bench.model)
    updates = UpdatesAt(*(bench.model, bench.anatomy, bench.mask, gap, UNREPAIRED), sinks=0.5, dense=False, axes=axes)
    whole, pieces = (
        gathered(map(updates.observe, bench.examples.batches(tokens)), [Given("rms")])[Given("rms")]
        for tokens in (2048, 50)
    )
    assert (pieces.tokens, pieces.inputs) == (whole.tokens, whole.inputs)
    torch.testing.assert_close(pieces.products(), whole.products(), atol=1e-5, rtol=1e-5)


def test_with_the_dense_target_an_exact_map_would_end_in_the_dense_stream():
    bench = bench_of("causal/llama", "mlp.0+attention.2")
    gap = gaps(bench.anatomy, bench.mask)[1]
    seen = observed(bench, gap, dense=True)
    (block,) = gap.blocks
    here = (bench.model, bench.anatomy, block)
    dense = stream_after(*here, frozenset(), bench.examples)
    pruned = stream_after(*here, bench.mask, bench.examples)
    torch.testing.assert_close(pruned.reshape(seen.y.shape) + seen.y, dense.reshape(seen.y.shape))
    assert not torch.allclose(seen.y, observed(bench, gap).y, atol=1e-2)


def test_the_dense_target_is_refused_where_norms_stand_on_the_stream():
    bench = bench_of("masked/bert")
    with pytest.raises(InputError, match="norms or scales stand on the stream"):
        mended("linear:target=dense", bench)


@pytest.fixture(scope="module")
def trained(checkpoint, prose, tokenizer):
    """A tiny Llama that has learned a text, its anatomy, and the windows that it has learned."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = tokenizer(prose.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 32 * 15]).view(32, 15)
    return model, read_anatomy(model), examples_of(model, torch.nn.functional.pad(windows, (1, 0), value=0))


def test_a_model_that_has_learned_something_gets_much_of_it_back(trained):
    model, anatomy, text = trained
    shares = {}
    for method in ("bias", "linear", "linear:rank=8", "linear:target=dense", "replaceme"):
        _, record = recover(
            *(model, anatomy, parse_mask("mlp.1+mlp.3"), parse_recovery(method)),
            *(text.part(12, 32), text.part(0, 12)),
        )
        assert record.dense.value < record.recovered.value < record.pruned.value, method
        assert record.applied
        shares[method] = record.recovered_share
    assert shares["linear"] > 0.3
    assert shares["linear"] > shares["bias"]


def test_a_repair_that_makes_the_held_out_loss_worse_comes_back_empty_unless_forced(trained, monkeypatch):
    model, anatomy, text = trained
    mask, method = parse_mask("attention.1+mlp.2"), parse_recovery("bias")
    worse = Repair({gap.path: Replacement("bias", 0, 32) for gap in gaps(anatomy, mask)})
    for each in worse.replacements.values():
        torch.nn.init.normal_(each.bias, std=3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(method), "repair", lambda *_: (worse, ()))
    repair, record = recover(model, anatomy, mask, method, text)
    assert repair == UNREPAIRED
    assert not record.applied
    assert record.reason.startswith("the held-out loss rises with it, from ")
    assert record.recovered_share < 0
    forced, record = recover(model, anatomy, mask, method, text, force=True)
    assert forced is worse
    assert record.applied


def test_nothing_is_won_back_where_pruning_made_nothing_worse():
    dense, better, worse = (Estimate(value=value, stderr=0.1, n=4, unit="nats") for value in (3.0, 2.9, 3.2))
    assert recovering._share(dense, better, worse) is None
    assert recovering._share(dense, worse, dense) == 1


def test_a_repair_with_a_loss_that_is_not_finite_is_left_out_even_where_none_was_before(trained, monkeypatch):
    model, anatomy, text = trained
    mask, method = parse_mask("attention.1"), parse_recovery("bias")
    broken = Repair({gap.path: Replacement("bias", 0, 32) for gap in gaps(anatomy, mask)})
    monkeypatch.setattr(type(method), "repair", lambda *_: (broken, ()))
    whole = recovering.loss(model, anatomy, text)
    monkeypatch.setattr(recovering, "loss", lambda *given: None if len(given) > 3 else whole)
    repair, record = recover(model, anatomy, mask, method, text)
    assert repair == UNREPAIRED
    assert (record.pruned, record.applied, record.reason) == (None, False, "the held-out loss is not finite with it")


def test_a_gap_that_held_out_text_is_better_off_without_stays_empty():
    model, anatomy = made("causal/llama")
    text = examples(model, 2, 24)  # too little to learn a map of 32 inputs that holds elsewhere
    bench = Bench(model, anatomy, parse_mask("attention.1"), text, examples(model, 8, seed=5))
    repair, (record,) = mended("linear:ridge=1e-8,regressor=stream", bench)
    assert record.error > 1
    assert (record.applied, record.reason) == (False, "held-out text is better off without it")
    assert not repair.replacements


def test_blocks_that_go_on_running_for_others_are_left_with_the_reason():
    model, anatomy = made("seq2seq/t5")
    kept = next(block for block, part in anatomy.parts.items() if part.kept)
    bench = Bench(model, anatomy, frozenset([kept]), examples(model), examples(model, 4, seed=2))
    repair, (record,) = mended("bias", bench)
    assert not repair.replacements
    assert "goes on running" in record.reason


def test_text_that_is_fitted_on_cannot_also_judge():
    model, anatomy = made("causal/llama")
    text = examples(model)
    with pytest.raises(InputError, match=r"2 of the windows .* are also fitted on"):
        recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("bias"), text, text.part(3, 5))


def test_without_other_text_the_last_fifth_is_held_out():
    model, anatomy = made("causal/llama")
    _, record = recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("bias"), examples(model))
    assert record.tokens == (10 * 24, 2 * 24)
    assert record.held_out == examples(model).part(10, 12).fingerprint
    with pytest.raises(InputError, match="4 windows are too few"):
        recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("bias"), examples(model, 4))


def test_of_the_last_fifth_what_is_fitted_on_too_does_not_judge(caplog):
    model, anatomy = made("causal/llama")
    ids = examples(model).inputs["input_ids"]
    twice = examples_of(model, torch.cat([ids[:10], ids[:1], ids[10:11]]))
    with caplog.at_level(logging.WARNING):
        _, record = recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("bias"), twice)
    assert "1 of 2 windows to judge by are left out" in caplog.text
    assert record.tokens == (10 * 24, 24)
    assert record.held_out == twice.part(11, 12).fingerprint
    everything = examples_of(model, torch.cat([ids[:10], ids[:2]]))
    with pytest.raises(InputError, match=r"2 of the windows .* are also fitted on") as error:
        recover(model, anatomy, parse_mask("mlp.1"), parse_recovery("bias"), everything)
    assert error.value.fix == "hold out other text"


def test_a_method_that_finds_every_place_taken_says_so():
    model, anatomy = made("causal/llama")
    mask, text = parse_mask("attention.1+mlp.1+mlp.3"), examples(model)
    for method in ("bias", "linear", "span", "replaceme", "replaceme:target=dense"):
        _, record = recover(model, anatomy, mask, parse_chain(f"linear,{method}"), text, force=True)
        second = record.steps[1]
        assert (second.applied, second.gaps != ()) == (False, True), method
        assert second.reason == f"nothing was recovered: {second.gaps[0].removed}: {TAKEN}"
        assert not any(gap.applied for gap in second.gaps)


def test_a_dense_model_whose_loss_is_not_finite_judges_nothing():
    model = FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    for removed in ("mlp.1", "mlp.3"):  # where it is what is removed, the pruned model's is finite
        with pytest.raises(InputError, match="loss of the dense model is not a finite number"):
            recover(model, anatomy, parse_mask(removed), parse_recovery("bias"), examples(model))


def test_a_pruned_model_whose_loss_is_not_finite_can_be_mended(trained, monkeypatch):
    model, anatomy, text = trained
    mask, true = parse_mask("mlp.1"), recovering.loss
    monkeypatch.setattr(recovering, "loss", lambda *given: None if len(given) == 4 else true(*given))
    _, record = recover(model, anatomy, mask, parse_recovery("linear"), text.part(12, 32), text.part(0, 12))
    assert (record.pruned, record.applied, record.recovered_share) == (None, True, None)


def test_too_few_tokens_for_a_map_are_an_error_that_names_the_block():
    bench = bench_of("causal/llama")
    few = Bench(**{**vars(bench), "examples": bench.examples.part(0, 1)})
    with pytest.raises(InputError, match=r"a map of attention.1 .* takes more than 32 tokens, and there are 23"):
        mended("linear", few)


def test_states_that_are_not_finite_are_an_error():
    model = FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    bench = Bench(model, anatomy, parse_mask("attention.2"), examples(model), examples(model, 4, seed=2))
    with pytest.raises(InputError, match=r"states before attention.2 are NaN or infinite"):
        mended("linear", bench)


def test_the_dense_model_comes_back_as_it_was():
    model, anatomy = made("causal/gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recover(model, anatomy, parse_mask("attention.1+mlp.1"), parse_recovery("linear"), examples(model), force=True)
    assert not [module for module in model.modules() if isinstance(module, StandIn)]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_loss_with_nothing_gone_is_the_model_s_own():
    model, anatomy = made("causal/llama")
    text = examples(model)
    own = torch.nn.functional.cross_entropy(
        logits(model, text)[:, :-1].flatten(0, 1), text.inputs["input_ids"][:, 1:].flatten()
    )
    assert loss(model, anatomy, text).value == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("text", ["linear:rank=-1", "linear:ridge=-0.1", "bias:sinks=2"])
def test_options_out_of_bounds_are_refused(text):
    with pytest.raises(InputError):
        mended(text, bench_of("causal/llama"))


def test_every_recovery_reads_back_from_its_text_and_says_what_it_adds():
    for name, kind in RECOVERIES.items():
        method = kind()
        assert parse_recovery(format_method(method, RECOVERIES)) == method, name
        assert method.title
        assert method.source
    assert parse_recovery("bias").added_parameters(32, 32) == 32
    assert parse_recovery("linear").added_parameters(32, 16) == 32 * 16 + 16
    assert parse_recovery("linear:rank=4").added_parameters(32, 16) == 4 * 48 + 16
    assert parse_recovery("replaceme").added_parameters(32, 32) == 0
