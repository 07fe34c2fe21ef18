"""Layers that are trained to make up for those that are gone: which, on what, and that it is that alone."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from labs import apart, examples, made

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.recoveries import parse_chain
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.streamlining import Streams, places
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import examples_of

FAST = "lr=0.01,batch=4,accumulate=1,epochs=4,warmup=0"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("mlp.1", {1: 1}),
        ("attention.1+mlp.1", {0: 1}),
        ("attention.1+mlp.1+attention.2+mlp.2", {0: 2}),
        ("attention.2+mlp.2+attention.3+mlp.3+mlp.1", {1: 3}),
        ("attention.0+mlp.0", {1: 1}),
        ("attention.0+mlp.0+attention.2+mlp.2", {1: 2}),
        ("attention.0+mlp.0+attention.1+mlp.1+attention.3", {2: 2, 3: 3}),
        ("dense", {}),
    ],
)
def test_a_layer_stands_for_what_it_lost_and_for_the_run_behind_it(mask, expected):
    _, anatomy = made("causal/llama")
    (stack,) = anatomy.stacks
    paths = {layer.path: number for number, layer in enumerate(stack.layers)}
    found = places(anatomy, parse_mask(mask))
    assert {paths[place.path]: paths[place.behind] for place in found} == expected
    assert frozenset[Any]().union(*(place.blocks for place in found)) == parse_mask(mask)


def test_each_stack_has_its_own():
    _, anatomy = made("seq2seq/t5")
    mask = parse_mask("encoder.attention.1+encoder.mlp.1+decoder.mlp.2")
    assert [place.path for place in places(anatomy, mask)] == ["encoder.block.0", "decoder.block.2"]


def streams_of(model, part, paths):
    """The plain way: every layer's output, by hooks, in a whole pass."""
    kept = {}
    with contextlib.ExitStack() as hooks:
        for path in paths:

            def keep(_module, _args, output, path=path):
                kept[path] = output[0] if isinstance(output, tuple) else output

            hooks.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        model(**part.inputs, use_cache=False)
    return kept


@pytest.mark.parametrize("name", ["causal/llama", "causal/gpt2", "causal/gemma3_text", "masked/bert"])
def test_loss_and_gradients_are_those_of_whole_passes(name):
    model, anatomy = made(name)
    mask = parse_mask("mlp.0+attention.1+mlp.1")
    behind = {place.path: place.behind for place in places(anatomy, mask)}
    part = examples(model, 3, 12)
    names = [name for name, _ in model.named_parameters() if any(name.startswith(f"{path}.") for path in behind)]
    numbers = [model.get_parameter(name) for name in names]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in numbers:
        p.requires_grad_(True)
    try:
        with torch.no_grad():
            wanted = streams_of(model, part, behind.values())
        # Far from the dense weights, which must not be seen on the way back.
        repair = Repair({}, apart(dict(zip(names, numbers, strict=True))))
        with repaired(model, anatomy, mask, repair):
            found = streams_of(model, part, behind)
            total = torch.tensor(0.0)
            for path, at in behind.items():
                for s, t in zip(found[path].flatten(0, 1), wanted[at].flatten(0, 1), strict=True):
                    total = total + (s - t).square().sum() / t.square().sum()
            mean = total / (len(behind) * 36)
            mean.backward()
        plain = float(mean.detach())
        truth = [p.grad for p in numbers]
        for p in numbers:
            p.grad = None
        lesson = Streams(Pupil(model, anatomy, mask, repair), [*behind.values()])
        assert lesson.weigh(part) == 3
        assert lesson.measure(part) == pytest.approx(3 * plain, rel=1e-5)
        assert lesson.backward(part, 1 / 3) == pytest.approx(3 * plain, rel=1e-5)
        for name, p, grad in zip(names, numbers, truth, strict=True):
            if grad is None or p.grad is None:
                assert grad is None, name
                assert p.grad is None, name
            else:
                torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
    finally:
        for p in model.parameters():
            p.grad = None
            p.requires_grad_(True)


@pytest.mark.parametrize(
    ("name", "mask", "changed"),
    [
        ("causal/llama", "attention.1+mlp.1+attention.2+mlp.2", ["model.layers.0."]),
        ("causal/gpt2", "attention.1", ["transformer.h.1."]),
        ("causal/mixtral", "attention.0+mlp.0+mlp.2", ["model.layers.1.", "model.layers.2."]),
        ("masked/bert", "attention.1+mlp.1", ["bert.encoder.layer.0."]),
        ("seq2seq/bart", "decoder.mlp.1+encoder.mlp.0", ["model.encoder.layers.0.", "model.decoder.layers.1."]),
    ],
)
def test_only_the_layers_beside_gaps_change_and_what_they_miss_becomes_less(name, mask, changed):
    model, anatomy = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = examples(model, 8, 16)
    bench = Bench(model, anatomy, parse_mask(mask), text, text, force=True)
    (method,) = parse_chain(f"streamline:{FAST}")
    repair, records = method.repair(bench)
    assert not repair.replacements
    assert {prefix for prefix in changed for key in repair.weights if key.startswith(prefix)} == set(changed)
    assert all(key.startswith(tuple(changed)) for key in repair.weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(records) == len(changed)
    behind = [place.behind for place in places(anatomy, bench.mask)]
    missing = [Streams(Pupil(model, anatomy, bench.mask, each), behind).measure(text) for each in (UNREPAIRED, repair)]
    assert missing[1] < 0.9 * missing[0]


def test_maps_that_stand_in_a_run_count_as_what_is_there():
    """The layer before the run is to do what is missing behind the maps, not what they do already."""
    model, anatomy = made("causal/llama")
    mask = parse_mask("attention.1+mlp.1+attention.2+mlp.2")
    text = examples(model, 8, 16)
    bench = Bench(model, anatomy, mask, text, text, force=True)
    linear, streamline = parse_chain(f"linear,streamline:{FAST}")
    filled, _ = linear.repair(bench)
    (place,) = places(anatomy, mask)

    def missing(repair):
        with repaired(model, anatomy, mask, repair), torch.no_grad():
            found = streams_of(model, text, [place.behind])[place.behind]
        with torch.no_grad():
            wanted = streams_of(model, text, [place.behind])[place.behind]
        return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())

    assert filled.replacements
    assert Streams(Pupil(model, anatomy, mask, filled), [place.behind]).measure(text) == pytest.approx(
        8 * missing(filled), rel=1e-4
    )
    both, _ = streamline.repair(replace(bench, start=filled))
    assert missing(both) < missing(filled)


@pytest.mark.parametrize(
    ("name", "mask", "expected"),
    [
        ("causal/llama", "attention.1+mlp.1+attention.2+mlp.2+mlp.3", {"0": "layers 0 to 2", "3": None}),
        ("causal/llama", "attention.0+mlp.0", {"1": "layers 0 to 1"}),
        ("seq2seq/t5", "encoder.attention.1+encoder.mlp.1", {"0": "encoder layers 0 to 1"}),
    ],
)
def test_the_record_says_for_which_layers_one_was_trained(name, mask, expected):
    model, anatomy = made(name)
    text = examples(model, 4, 16)
    (method,) = parse_chain(f"streamline:{FAST}")
    _, records = method.repair(Bench(model, anatomy, parse_mask(mask), text, text, force=True))
    assert {r.place.rpartition(".")[2]: r.settings.get("stands for") for r in records} == expected


@pytest.mark.parametrize("mask", ["dense", "+".join(f"attention.{n}+mlp.{n}" for n in range(4))])
def test_where_no_layer_is_left_beside_a_gap_nothing_is_done_and_said(mask):
    model, anatomy = made("causal/llama")
    bench = Bench(model, anatomy, parse_mask(mask), examples(model, 4, 16), examples(model, 4, 16))
    (method,) = parse_chain("streamline")
    repair, (record,) = method.repair(bench)
    assert repair == UNREPAIRED
    assert "no layer is left beside it" in record.reason


def test_an_encoder_without_a_head_is_judged_by_what_is_missing():
    whole, _ = made("masked/bert")
    model = whole.bert
    text = examples_of(model, zoo.inputs(whole, 8, 16, seed=1)["input_ids"])
    bench = Bench(model, read_anatomy(model), parse_mask("mlp.1+attention.2"), text, text)
    (method,) = parse_chain(f"streamline:{FAST}")
    made_of: Any = method.repair(bench)
    repair, (first, second) = made_of
    assert first.applied
    assert second.applied
    assert repair.weights
    assert min(look.loss for look in first.curve) < 0.8 * first.curve[0].loss
