"""Both models led through their layers: what is seen there is what a forward pass up to the layer shows."""

from dataclasses import replace

import pytest
import torch
import zoo
from labs import SIGNS, made

from blockpruner.anatomy.probing import first_tensor
from blockpruner.blocks import parse_mask
from blockpruner.recoveries import parse_recovery
from blockpruner.repairs import side_by_side
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.side_by_side import Walk, proved
from blockpruner.surgery.gaps import Repair
from blockpruner.texts.examples import examples_of

LED = ["causal/llama", "causal/gpt2", "causal/gemma3_text", "causal/gemma2", "causal/falcon", "causal/granite"]
SHARING = ["causal/gemma3n_text", "causal/gemma4_text"]  # keys and values are handed on from layer to layer
METHODS = ["linear:ridge=0.01", "linear:ridge=0.01,target=dense", "bias", "refit:ridge=0.01"]


def bench_of(name, removed, **more):
    model, anatomy = made(name)
    texts = (
        examples_of(model, zoo.inputs(model, windows, 24, seed=windows)["input_ids"], SIGNS) for windows in (20, 4)
    )
    return Bench(model, anatomy, parse_mask(removed), *texts, force=True, **more)


def mended(method, bench):
    return parse_recovery(method).repair(bench)[0]


def numbers(repair):
    held = {path: replacement.state_dict() for path, replacement in repair.replacements.items()}
    return held, dict(repair.weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("removed", ["attention.1+mlp.1+mlp.2", "mlp.2"])
@pytest.mark.parametrize("name", LED)
def test_what_is_fitted_by_leading_is_what_is_fitted_by_a_pass_for_every_look(name, removed, method, monkeypatch):
    monkeypatch.setattr(side_by_side, "BATCH_TOKENS", 200)
    bench = bench_of(name, removed)
    assert proved(bench)
    led = numbers(mended(method, bench))
    monkeypatch.setattr(side_by_side, "proved", lambda _: False)
    afresh = numbers(mended(method, bench))
    torch.testing.assert_close(led, afresh, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("removed", ["mlp.2", "attention.2+mlp.2", "mlp.1+mlp.2"])
def test_it_goes_on_from_weights_that_a_chain_has_changed(removed, monkeypatch):
    bench = bench_of("causal/llama", removed)
    name = "model.layers.0.mlp.down_proj.weight"
    start = Repair(weights={name: 1.5 * bench.model.get_parameter(name).data})
    bench = replace(bench, start=start)
    led = numbers(mended("linear:ridge=0.01,target=dense", bench))
    monkeypatch.setattr(side_by_side, "proved", lambda _: False)
    afresh = numbers(mended("linear:ridge=0.01,target=dense", bench))
    torch.testing.assert_close(led, afresh, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", SHARING)
def test_models_whose_layers_hand_on_more_than_the_stream_take_a_pass_for_every_look(name):
    last = [str(block) for block in made(name)[1].parts if block.kind == "mlp"][-1]
    bench = bench_of(name, last)
    assert not proved(bench)
    assert mended("bias", bench).replacements


def test_dropout_of_a_model_in_training_mode_is_off():
    bench = bench_of("causal/gpt2", "mlp.1")
    calm = numbers(mended("linear:ridge=0.01", bench))
    bench.model.train()
    try:
        torch.testing.assert_close(numbers(mended("linear:ridge=0.01", bench)), calm, atol=0, rtol=0)
        assert bench.model.training
    finally:
        bench.model.eval()


def test_states_on_disk_give_the_same_bits(monkeypatch):
    bench = bench_of("causal/llama", "attention.1+mlp.2")
    held = numbers(mended("linear:target=dense", bench))
    monkeypatch.setattr(side_by_side, "IN_MEMORY", 0)
    spilled = numbers(mended("linear:target=dense", bench))
    torch.testing.assert_close(held, spilled, atol=0, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_led_the_layers_see_fewer_tokens(method, monkeypatch):
    bench = bench_of("causal/llama", "mlp.1+mlp.2+attention.3")
    seen = {"tokens": 0}

    def count(_, __, output):
        states = first_tensor(output)
        assert states is not None
        seen["tokens"] += states.shape[0] * states.shape[1]

    handles = [layer.register_forward_hook(count) for layer in bench.model.model.layers]
    try:
        mended(method, bench)
        led, seen["tokens"] = seen["tokens"], 0
        monkeypatch.setattr(side_by_side, "proved", lambda _: False)
        mended(method, bench)
    finally:
        for handle in handles:
            handle.remove()
    assert led < seen["tokens"]


def test_models_with_two_stacks_take_a_pass_for_every_look():
    bench = bench_of("seq2seq/t5", "decoder.mlp.1")
    with side_by_side.side_by_side(bench, dense=True) as walk:
        assert type(walk) is Walk
    assert mended("refit", bench).weights
