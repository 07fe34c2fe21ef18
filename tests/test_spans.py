"""Spans: runs of removed layers, and the one map that stands for each."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from labs import SIGNS, made
from tiny import FAMILIES

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.recoveries import parse_chain, parse_recovery
from blockpruner.recovering import recover
from blockpruner.repairs.closed_form import TAKEN, WORSE
from blockpruner.repairs.folded_runs import Run
from blockpruner.repairs.normal_equations import NormalEquations, ridge_map
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.run_states import run_states, walks_of
from blockpruner.repairs.spans import layer_map, spans
from blockpruner.surgery import checkpoint
from blockpruner.surgery.gaps import Repair, repaired
from blockpruner.texts.examples import examples_of

ARCHITECTURES = (
    "causal/llama",
    "causal/gpt2",
    "causal/gemma3_text",
    "causal/falcon",
    "causal/mixtral",
    "causal/mamba",
    "causal/bloom",
    "causal/granite",
    "masked/bert",
    "seq2seq/t5",
    "seq2seq/bart",
)


def examples(model, windows=12, tokens=24, seed=1):
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=seed)["input_ids"], SIGNS)


def layers(anatomy, *numbers, stack=0):
    """All blocks of these layers."""
    found = anatomy.stacks[stack].layers
    return frozenset(part.block for number in numbers for part in found[number].parts)


def bench_of(name, *numbers, held_out=None, **more):
    model, anatomy = made(name)
    text = examples(model)
    return Bench(model, anatomy, layers(anatomy, *numbers), text, held_out or text, **more)


@torch.no_grad()
def states(model, batch, path):
    """The stream before the layer at `path`, and behind it."""
    seen = {}
    module = model.get_submodule(path)
    before = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(before=(args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    behind = module.register_forward_hook(
        lambda _, __, output: seen.update(behind=(output if isinstance(output, torch.Tensor) else output[0]).clone())
    )
    model(**batch.inputs)
    before.remove()
    behind.remove()
    return seen["before"], seen["behind"]


def mended(method, bench) -> Any:
    """The repair and the records of a method, as text."""
    return parse_recovery(method).repair(bench)


def test_spans_are_the_longest_runs_of_whole_layers_in_each_stack():
    _, anatomy = made("causal/gpt2")
    assert [s.numbers for s in spans(anatomy, layers(anatomy, 0, 1, 3))] == [(0, 1), (3,)]
    assert [s.numbers for s in spans(anatomy, layers(anatomy, 2) | parse_mask("mlp.1"))] == [(2,)]
    assert spans(anatomy, parse_mask("mlp.1+attention.2")) == []
    _, both = made("seq2seq/t5")
    found = spans(both, layers(both, -1) | layers(both, 0, stack=1))
    assert [(s.stack, len(s.numbers)) for s in found] == [("encoder", 1), ("decoder", 1)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_span_misses_what_the_dense_models_stream_is_behind_it_less_the_pruned_models_before_it(name):
    bench = bench_of(name, 1, 2)
    (span,) = spans(bench.anatomy, bench.mask)
    first, last = span.layers[0].path, span.layers[-1].path
    _, dense = states(bench.model, bench.examples, last)
    with repaired(bench.model, bench.anatomy, bench.mask):
        pruned, _ = states(bench.model, bench.examples, first)
        _, handed_on = states(bench.model, bench.examples, last)
    torch.testing.assert_close(pruned, handed_on)
    run = Run(tuple(part.block for layer in span.layers for part in layer.parts), None)
    one = replace(bench, examples=bench.examples.part(0, 1))
    with walks_of(one) as walks, run_states(one, run, Repair(), walks, sinks=1.0) as around:
        gap, (piece,) = around.gap, list(around.observed[0])

    class Exactly(torch.nn.Module):
        def forward(self, hidden):
            near = torch.cdist(hidden.flatten(0, -2), piece.x).argmin(-1)
            return piece.y[near].reshape(*hidden.shape[:-1], -1)

    exactly: dict = {gap.path: Exactly()}
    with repaired(bench.model, bench.anatomy, bench.mask, Repair(exactly)):
        _, behind = states(bench.model, one.examples, last)
    torch.testing.assert_close(behind, dense[: len(behind)], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["span:rank=4", "span"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_runs_replaced_as_far_as_its_own_text_goes(name, method):
    bench = bench_of(name, 1, 2, force=True)
    repair, (record,) = mended(method, bench)
    assert record.reason == ""
    assert 0 <= record.error < 1
    assert record.settings["stands for"].endswith("layers 1 to 2")
    assert len(repair.replacements) == 1
    assert repair.added_parameters == record.added_parameters
    assert list(repair.spans.values()) == [bench.mask]


def test_the_map_of_a_span_is_that_of_states_held_in_memory():
    bench = bench_of("causal/llama", 1, 2, force=True)
    repair, _ = mended("span:ridge=0.01,regressor=stream,sinks=1", bench)
    (made_,) = repair.replacements.values()
    _, behind = states(bench.model, bench.examples, "model.layers.2")
    before, _ = states(bench.model, bench.examples, "model.layers.1")
    sums = NormalEquations(32, 32)
    sums.add(before.reshape(-1, 32), (behind - before).reshape(-1, 32))
    expected = ridge_map(sums, "this", ridge=0.01)
    torch.testing.assert_close(made_.weight.double(), expected.down, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(made_.bias.double(), expected.bias, atol=1e-4, rtol=1e-3)


@functools.cache
def linear_run():
    """A model whose layers 1 and 2 together are one linear map of what the norm before mlp.1 makes."""
    model = FAMILIES["llama"]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model.model.layers[1].mlp = torch.nn.Linear(32, 32)
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    return model.eval(), read_anatomy(model)


def test_a_run_that_is_exactly_linear_is_replaced_without_loss():
    model, anatomy = linear_run()
    method = parse_recovery("span:regressor=input,ridge=1e-12")
    record: Any = recover(model, anatomy, layers(anatomy, 1, 2), method, examples(model), force=True)[1]
    (gap,) = record.gaps
    assert gap.error < 1e-9
    assert record.recovered_share == pytest.approx(1, abs=1e-3)


def test_a_later_run_is_fitted_on_the_model_with_the_map_of_the_earlier_one():
    bench = bench_of("causal/gpt2", 0, 2, force=True)
    repair, records = mended("span:ridge=0.1", bench)
    assert [r.settings["stands for"] for r in records] == ["layer 0", "layer 2"]
    second = list(repair.replacements)[1]
    alone, _ = mended("span:ridge=0.1", replace(bench, mask=layers(bench.anatomy, 2)))
    assert not torch.allclose(repair.replacements[second].bias, alone.replacements[second].bias)


def test_blocks_that_left_alone_are_said_and_not_touched():
    bench = bench_of("causal/llama", 1, force=True)
    bench = replace(bench, mask=bench.mask | parse_mask("mlp.3"))
    repair, (first, second) = mended("span", bench)
    assert first.applied
    assert (second.removed, second.applied) == ("mlp.3", False)
    assert "linear can fill it" in second.reason
    assert len(repair.replacements) == 1
    with pytest.raises(InputError, match="no layer has lost all its blocks"):
        mended("span", replace(bench, mask=parse_mask("mlp.3")))


def test_what_another_method_does_after_spans_leaves_them_and_their_other_gaps_alone():
    bench = bench_of("causal/llama", 1, 2, force=True)
    bench = replace(bench, mask=bench.mask | parse_mask("mlp.3"))
    begun, _ = mended("span:rank=4", bench)
    bench = replace(bench, start=begun)
    repair, records = mended("linear:rank=4", bench)
    assert [record.removed for record in records if record.applied] == ["mlp.3"]
    assert {record.reason for record in records if not record.applied} == {TAKEN}
    assert set(repair.replacements) == {*begun.replacements, "model.layers.3.mlp"}
    assert repair.spans == begun.spans
    again, records = mended("span:rank=4", bench)
    assert again.replacements == begun.replacements
    assert [(r.place, r.reason == TAKEN) for r in records] == [
        *(("model.layers.1", True), ("model.layers.3.mlp", False)),
    ]


def test_spans_and_what_is_left_are_filled_by_a_chain():
    model, anatomy = made("causal/llama")
    mask = layers(anatomy, 1, 2) | parse_mask("mlp.3")
    chain = parse_chain("span:rank=4,linear:rank=4")
    found: Any = recover(model, anatomy, mask, chain, examples(model), force=True)
    repair, record = found
    assert [step.method.partition(":")[0] for step in record.steps] == ["span", "linear"]
    assert [gap.removed for gap in record.steps[1].gaps if gap.applied] == ["mlp.3"]
    assert len(repair.replacements) == 2


def test_a_map_that_held_out_text_is_worse_off_with_is_not_applied():
    model, _ = made("causal/llama")
    bench = bench_of("causal/llama", 1, 2, held_out=examples(model, 2, seed=5))
    repair, (record,) = mended("span:ridge=0,sinks=1", replace(bench, examples=examples(model, 2, 20)))
    assert (record.applied, record.reason, repair) == (False, WORSE, Repair())
    assert record.error > 1


def test_the_layer_map_says_which_dense_layers_each_place_stands_for():
    bench = bench_of("causal/gpt2", 1, 2, force=True)
    assert layer_map(bench.anatomy, bench.mask, Repair()) == {"": [(0,), (3,)]}
    repair, _ = mended("span:rank=4", bench)
    assert layer_map(bench.anatomy, bench.mask, repair) == {"": [(0,), (1, 2), (3,)]}
    assert layer_map(bench.anatomy, bench.mask - parse_mask("mlp.2"), Repair()) == {"": [(0,), (2,), (3,)]}


def test_a_span_is_saved_and_loads_as_it_was(tmp_path):
    model = FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    text = examples(model)
    mask = layers(anatomy, 1, 2)
    repair, _ = mended("span:rank=4", Bench(model, anatomy, mask, text, text, force=True))
    saved = checkpoint.save_pruned(model, None, anatomy, mask, tmp_path / "out", repair=repair)
    assert (saved.form, saved.difference < 1e-4) == ("stand-ins", True)
