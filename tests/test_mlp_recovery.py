"""Runs of blocks and the small MLP that stands for each: what it is fitted to, how well, and where it may not stand."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from labs import made
from test_arrivals import scaled
from test_spans import ARCHITECTURES, examples, layers, states
from tiny import FAMILIES

from blockpruner.anatomy.probing import recorded
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError, RunFolderError
from blockpruner.recoveries import parse_chain, parse_recovery
from blockpruner.recovering import recover
from blockpruner.repairs import run_mlps
from blockpruner.repairs.closed_form import TAKEN, WORSE, regressors_of
from blockpruner.repairs.folded_runs import runs
from blockpruner.repairs.folding import projection
from blockpruner.repairs.neurons import Neurons, neurons_in
from blockpruner.repairs.normal_equations import LinearMap
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.run_mlps import RunMlp, neurons_of
from blockpruner.repairs.run_states import run_states, walks_of
from blockpruner.repairs.side_by_side import side_by_side
from blockpruner.repairs.spans import layer_map
from blockpruner.repairs.updates import behind
from blockpruner.searching.contract import DENSE
from blockpruner.standin import Replacement
from blockpruner.surgery import checkpoint
from blockpruner.surgery.gaps import Repair, gaps, repaired

FAST = "epochs=3,warmup=0"


def bench_of(name, mask=None, **more):
    """A bench without the last block of layer 1 and all of layer 2, or without `mask`."""
    model, anatomy = scaled() if name == "scaled" else made(name)
    text = examples(model)
    gone = layers(anatomy, 2) | {anatomy.stacks[0].layers[1].parts[-1].block}
    return Bench(model, anatomy, gone if mask is None else mask, text, text, **more)


def mended(method, bench) -> Any:
    return parse_recovery(method).repair(bench)


def whole(bench):
    """A bench whose run is of whole layers, where norms stand on the stream."""
    return bench if bench.anatomy.stacks[0].layers[1].identity else replace(bench, mask=layers(bench.anatomy, 1, 2))


def plain(bench, last):
    """The streams behind a layer, [windows, tokens, width], dense and pruned, from whole passes."""
    _, dense = states(bench.model, bench.examples, last)
    with repaired(bench.model, bench.anatomy, bench.mask):
        _, pruned = states(bench.model, bench.examples, last)
    return dense, pruned


@pytest.mark.parametrize("name", [*ARCHITECTURES, "scaled"])
def test_what_is_missing_behind_a_run_is_what_a_whole_pass_of_either_model_says(name):
    bench = whole(bench_of(name))
    (run,) = runs(bench.anatomy, bench.mask)
    dense, pruned = plain(bench, bench.anatomy.stacks[0].layers[2].path)
    with walks_of(bench) as walks, run_states(bench, run, Repair(), walks) as around:
        pieces = [around.piece(number) for number in around.fit]
        assert len(around.held_out) == len(around.fit)
        gap, spread = around.gap, around.spread
    x, y = (torch.cat([getattr(piece, side) for piece in pieces]) for side in "xy")
    missing, stream = (each[:, 1:].reshape(-1, y.shape[1]) for each in (dense - pruned, dense))
    assert x.shape[0] == len(y) == len(missing)
    scale = bench.model.config.get_text_config().to_dict().get("residual_multiplier", 1.0)
    order, other = (each.norm(dim=-1).argsort() for each in (y * scale, missing))
    torch.testing.assert_close((y * scale)[order], missing[other], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(spread * abs(scale), stream.std(0, correction=0), atol=1e-4, rtol=1e-2)
    assert gap.blocks <= bench.mask


def put_in(bench):
    """The stream behind the run with exactly what is missing in its gap, and the dense model's."""
    (run,) = runs(bench.anatomy, bench.mask)
    one = replace(bench, examples=bench.examples.part(0, 1), held_out=bench.examples.part(1, 2))
    with walks_of(one) as walks, run_states(one, run, Repair(), walks) as around:
        gap, (piece,) = around.gap, [around.piece(number) for number in around.fit]

    class Exactly(torch.nn.Module):
        def forward(self, hidden):
            near = torch.cdist(hidden.flatten(0, -2), piece.x).argmin(-1)
            return piece.y[near].reshape(*hidden.shape[:-1], -1)

    exactly: dict = {gap.path: Exactly()}
    last = bench.anatomy.stacks[0].layers[2].path
    _, dense = states(bench.model, one.examples, last)
    with repaired(bench.model, bench.anatomy, bench.mask, Repair(exactly)):
        _, found = states(bench.model, one.examples, last)
    return found[:, 1:], dense[:, 1:]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "scaled"])
def test_what_is_missing_put_in_the_gap_gives_the_dense_models_stream_behind_the_run(name):
    found, dense = put_in(whole(bench_of(name)))
    torch.testing.assert_close(found, dense, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_runs_filled(name):
    bench = whole(bench_of(name, force=True))
    repair, (record,) = mended(f"mlp:neurons=8,{FAST}", bench)
    assert record.reason == ""
    assert record.error < 1
    (one,) = repair.replacements.values()
    assert (one.kind, one.rank) == ("mlp", 8)
    assert repair.added_parameters == record.added_parameters
    assert list(repair.spans.values()) == [bench.mask]


@functools.cache
def planted():
    """A model whose mlp.1, behind the norm of its layer, is a gated MLP of eight neurons that adds much."""
    model = FAMILIES["llama"]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        mlp = model.model.layers[1].mlp
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            projection.weight.copy_(torch.randn_like(projection.weight) / 4)
        mlp.down_proj.weight[:, 8:] = 0
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    return model.eval(), read_anatomy(model)


def test_a_planted_mlp_is_found_where_a_linear_map_misses_most_of_it():
    model, anatomy = planted()
    mask = parse_mask("mlp.1+attention.2")
    text, held_out = examples(model, 200), examples(model, 20, seed=7)
    bench = Bench(model, anatomy, mask, text, held_out)
    _, (linear, _) = mended("linear:target=dense", bench)
    _, (found,) = mended("mlp:neurons=32,epochs=8", bench)
    assert linear.error > 0.3
    assert found.error < linear.error / 3


def test_what_is_trained_computes_the_same_in_the_coordinates_of_the_states():
    bench = bench_of("causal/llama")
    (run,) = runs(bench.anatomy, bench.mask)
    with walks_of(bench) as walks, run_states(bench, run, Repair(), walks) as around:
        generator = torch.Generator().manual_seed(0)
        linear = LinearMap(torch.randn(32, 32, generator=generator).double(), None, torch.ones(32).double())
        mlp = RunMlp(around, linear, 8, 0)
        for parameter in mlp.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
        stands = Replacement("linear", 32, 32)
        stands.load_state_dict({"weight": linear.down, "bias": linear.bias})
        x = around.piece(0).x
        expected = x @ stands.weight + stands.bias + mlp(x) * around.spread
        torch.testing.assert_close(mlp.replacement(stands)(x), expected, atol=1e-4, rtol=1e-4)


def test_without_a_number_of_neurons_a_run_costs_what_maps_for_each_of_its_blocks_cost():
    bench = bench_of("causal/llama", parse_mask("mlp.1+attention.2+mlp.2+attention.0"), force=True)
    single, run = runs(bench.anatomy, bench.mask)
    assert [neurons_of(each, 0, 32) for each in (single, run)] == [0, 21]
    assert [neurons_of(each, 5, 32) for each in (single, run)] == [0, 5]
    repair, (first, second) = mended(f"mlp:{FAST}", bench)
    assert [one.kind for one in repair.replacements.values()] == ["linear", "mlp"]
    assert list(repair.spans) == ["model.layers.1.mlp"]
    assert first.added_parameters == 32 * 33
    assert second.added_parameters == 32 * 33 + 21 * (3 * 32 + 2) == pytest.approx(3 * 32 * 33, rel=0.03)


def test_a_single_block_is_left_to_the_map_of_linear():
    bench = bench_of("causal/gemma3_text", parse_mask("attention.1"), force=True)
    (found,), (expected,) = (mended(m, bench)[0].replacements.values() for m in ("mlp", "linear:target=dense"))
    assert found.spec == expected.spec
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-3)


def test_a_later_run_is_fitted_on_the_model_with_what_stands_for_the_earlier_one():
    mask = parse_mask("attention.0+mlp.1+attention.2")
    bench = bench_of("causal/llama", mask, force=True)
    both, _ = mended(f"mlp:{FAST}", bench)
    alone, _ = mended(f"mlp:{FAST}", replace(bench, mask=mask - parse_mask("attention.0")))
    at = "model.layers.1.mlp"
    assert not torch.allclose(both.replacements[at].bias, alone.replacements[at].bias)


def test_held_out_text_ends_at_what_it_is_best_off_with():
    bench = bench_of("causal/llama")
    other = examples(bench.model, 2, seed=5)
    bench = replace(bench, examples=examples(bench.model, 4, 20), held_out=other, force=False)
    repair, (record,) = mended("mlp:neurons=64,epochs=40,lr=0.05,patience=0", bench)
    best = min(record.curve, key=lambda look: look.loss)
    assert record.settings["best step"] == best.step < record.curve[-1].step
    assert (record.applied, record.reason) == ((True, "") if record.error < 1 else (False, WORSE))
    assert bool(repair.replacements) == record.applied


def test_what_stands_already_is_left_alone():
    bench = bench_of("causal/llama", force=True)
    begun, _ = mended("linear:rank=4", bench)
    repair, (record,) = mended("mlp", replace(bench, start=begun))
    assert (record.applied, record.reason) == (False, TAKEN)
    assert repair.replacements == begun.replacements
    filled, _ = mended(f"mlp:{FAST}", bench)
    for method in ("linear", "span", "mlp"):
        assert mended(method, replace(bench, start=filled))[0].replacements == filled.replacements


def test_where_norms_stand_on_the_stream_only_whole_layers_are_runs():
    bench = bench_of("masked/bert", force=True)  # mlp.1 and layer 2
    repair, (alone, whole) = mended(f"mlp:{FAST}", bench)
    assert "norms or scales stand on the stream" in alone.reason
    assert (alone.removed, alone.applied) == ("mlp.1", False)
    assert (whole.removed, whole.applied) == ("attention.2+mlp.2", True)
    assert list(repair.replacements) == ["bert.encoder.layer.2"]


def test_a_chain_goes_on_from_it_and_the_model_is_judged_as_after_any_recovery():
    model, anatomy = made("causal/gemma3_text")
    mask = parse_mask("mlp.1+attention.2+mlp.2")
    chain = parse_chain(f"mlp:{FAST},refit")
    found: Any = recover(model, anatomy, mask, chain, examples(model), force=True)
    repair, record = found
    assert [step.method.partition(":")[0] for step in record.steps] == ["mlp", "refit"]
    assert record.steps[0].applied
    assert repair.weights
    assert [one.kind for one in repair.replacements.values()] == ["mlp"]


def test_the_layer_map_says_what_a_run_stands_for():
    bench = bench_of("causal/gpt2", force=True)
    repair, _ = mended(f"mlp:{FAST}", bench)
    assert layer_map(bench.anatomy, bench.mask, repair) == {"": [(0,), (1, 2), (3,)]}


@pytest.mark.parametrize("name", ["causal/gemma3_text", "scaled"])
def test_the_error_of_a_single_block_too_goes_by_the_spread_of_each_channel(name):
    bench = bench_of(name, mask=parse_mask("mlp.1"), force=True)
    repair, (record,) = mended("mlp", bench)
    last = bench.anatomy.stacks[0].layers[1].path
    dense, pruned = (each[:, 1:] for each in plain(bench, last))
    with repaired(bench.model, bench.anatomy, bench.mask, repair):
        found = states(bench.model, bench.examples, last)[1][:, 1:]
    spread = dense.flatten(0, 1).std(0, correction=0)
    share, bare = (
        float(((found - dense) / by).square().sum() / ((pruned - dense) / by).square().sum()) for by in (spread, 1)
    )
    assert record.error == pytest.approx(share, rel=2e-4)
    assert record.error != pytest.approx(bare, rel=1e-3)


def test_a_run_whose_neurons_are_all_dead_begins_with_random_ones_and_numbers_that_are_not_finite_are_left_out():
    model: Any = FAMILIES["opt"]()
    with torch.no_grad():
        for layer in model.model.decoder.layers[1:3]:
            layer.fc1.bias.fill_(-1e4)
    anatomy, text = read_anatomy(model), examples(model)
    bench = Bench(model, anatomy, layers(anatomy, 1, 2), text, text, force=True)
    repair, (record,) = mended(f"mlp:{FAST}", bench)
    (one,) = repair.replacements.values()
    assert record.applied
    assert float(one.up.abs().max()) < 1e3
    assert one.act == "silu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_mlps, "_missing", lambda *_: float("nan"))
        repair, (record,) = mended(f"mlp:{FAST}", bench)
    assert (repair.replacements, record.applied, record.error) == ({}, False, None)
    assert "not finite" in record.reason


def test_the_price_is_said_where_the_configuration_names_no_width():
    model, anatomy = made("causal/blt")
    mask = frozenset(part.block for layer in anatomy.stacks[0].layers[:1] for part in layer.parts)
    text = examples(model)
    bench = Bench(model, anatomy, mask, text, text)
    for method in ("mlp", "adapter"):
        assert "of checkpoints on disk" in parse_recovery(method).price(bench)


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    bench = bench_of("causal/llama", force=True)
    method = f"mlp:evaluate_every=2,{FAST}"
    folder = tmp_path / "1-mlp"

    def stop(done, total, message):
        if message.startswith("training") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mended(method, replace(bench, folder=folder, progress=stop))
    assert [path.name for path in folder.glob("run-*/step-*")] == ["step-000000004"]
    first, _ = mended(method, replace(bench, folder=folder))
    plain, _ = mended(method, bench)
    at = "model.layers.1.mlp"
    for name, value in plain.replacements[at].named_parameters():
        assert torch.equal(value, first.replacements[at].get_parameter(name)), name
    other = replace(bench, folder=folder, examples=examples(bench.model, seed=9))
    with pytest.raises(RunFolderError, match="another training"):
        mended(method, other)
    bias, _ = mended("bias", replace(bench, mask=parse_mask("mlp.0")))
    with pytest.raises(RunFolderError, match="another training"):  # behind something else
        mended(method, replace(bench, folder=folder, start=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_and_loads_as_it_was(tmp_path, dtype):
    model = FAMILIES["llama"]().to(dtype)
    anatomy = read_anatomy(model)
    text, mask = examples(model), layers(anatomy, 1, 2)
    repair, _ = mended(f"mlp:{FAST}", Bench(model, anatomy, mask, text, text, force=True))
    (one,) = repair.replacements.values()
    assert one.gate.dtype == dtype
    saved = checkpoint.save_pruned(model, None, anatomy, mask, tmp_path / "out", repair=repair)
    assert saved.form == "stand-ins"


def test_numbers_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="-1 neurons"):
        parse_recovery("mlp:neurons=-1")
    for wrong in (
        {"kind": "mlp"},
        {"kind": "mlp", "act": "silu"},
        {"kind": "mlp", "rank": 4, "act": "no such"},
        {"kind": "linear", "act": "silu"},
    ):
        with pytest.raises(ValueError, match="no replacement"):
            Replacement(**{"inputs": 4, "outputs": 4, **wrong})


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("causal/mixtral", "causal/mamba")])
def test_the_neurons_of_an_mlp_are_found_and_are_what_reaches_its_last_projection(name):
    """Those of layer 2, evaluated on the dense model's own stream before that block."""
    model, anatomy = made(name)
    layer = anatomy.stacks[0].layers[2]
    part = next(part for part in layer.parts if part.block.kind == "mlp")
    text = examples(model)
    bench = Bench(model, anatomy, frozenset([part.block]), text, text)
    (normal,) = regressors_of("input", model, gaps(anatomy, bench.mask)[0])
    seen = {}

    def look(module, call):
        last: Any = projection(model, part)
        owner = last.weight.rpartition(".")[0]
        with recorded({owner: model.get_submodule(owner)}) as calls:
            behind(model, layer)(module, call)
        seen["wanted"] = calls[owner][0].args[0].flatten(0, -2)
        seen["streams"] = [dict(call.inputs())[layer.hidden], behind(model, layer, [part])(module, call)]
        return neurons_in(model, layer, part, normal, module, call)

    with side_by_side(bench, dense=True) as walk:
        walk.lead_to(layer, Repair())
        found = walk.at(layer, walk.fit[0], DENSE, Repair(), look)
    if not layer.identity:  # a block there reads the stream as it is, which is not the normed stream
        assert found is None
        return
    assert found is not None
    made_ = [found.of(normal.of(stream).flatten(0, -2)) for stream in seen["streams"]]
    assert min(float((each - seen["wanted"]).abs().max()) for each in made_) < 1e-3 * float(seen["wanted"].abs().max())


def test_an_mlp_begins_with_those_neurons_of_the_run_that_tell_most():
    model, anatomy = planted()
    mask = parse_mask("mlp.1+attention.2")
    text = examples(model, 100)
    bench = Bench(model, anatomy, mask, text, examples(model, 4, seed=7))
    (run,) = runs(anatomy, mask)
    with walks_of(bench) as walks, run_states(bench, run, Repair(), walks) as around:
        linear = LinearMap(torch.zeros(32, 32).double(), None, torch.zeros(32).double())
        begun = RunMlp(around, linear, 8, 0)
        more = RunMlp(around, linear, 100, 0)
        x = around.piece(0).x
        own = around.neurons[0].of(around.normal.of(x))[:, :8]  # those that something is led out of
        sides = (begun.gate, begun.gate_bias, begun.up, begun.up_bias)
        given = (around.normal.of(x) - begun.mean) / begun.spread
        mine = Neurons(begun.activation, *sides).of(given).detach()
        near = torch.corrcoef(torch.cat([own, mine], 1).T)[:8, 8:].abs()
        assert int((near.max(dim=1).values > 0.999).sum()) >= 6
        assert mine.std(0).median() == pytest.approx(0.3, rel=0.3)
        assert more.gate.shape == (32, 100)
        assert not begun.down.any()


def test_neurons_that_never_fire_are_not_begun_from():
    model = FAMILIES["opt"]()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias[8:] = -100
    anatomy, mask = read_anatomy(model), parse_mask("mlp.1+attention.2+mlp.2")
    text = examples(model)
    bench = Bench(model, anatomy, mask, text, text, force=True)
    repair, (record,) = mended(f"mlp:neurons=32,{FAST}", bench)
    (one,) = repair.replacements.values()
    assert one.act == "relu"
    assert all(float(parameter.abs().max()) < 1e3 for parameter in one.parameters())
    assert record.error < 1


def test_where_no_step_helps_the_linear_map_stands_alone():
    bench = bench_of("causal/llama")
    repair, (record,) = mended("mlp:neurons=64,epochs=2,lr=50,warmup=0,patience=0", bench)
    assert (record.settings["best step"], record.settings["neurons"]) == (0, 0)
    assert [one.kind for one in repair.replacements.values()] == ["linear"]
    assert record.error < 1


def test_a_run_ends_before_a_parallel_layer_that_keeps_a_block():
    """What is put in the gap would else be part of what that block reads, which the dense model's does not."""
    for name, expected in (("causal/falcon", [1, 1]), ("causal/llama", [2])):
        bench = bench_of(name, parse_mask("mlp.1+attention.2"), force=True)
        repair, records = mended(f"mlp:{FAST}", bench)
        assert [len(parse_mask(record.removed)) for record in records] == expected, name
        assert len(repair.replacements) == len(expected)
    whole_layers = bench_of("causal/falcon", parse_mask("mlp.1+attention.2+mlp.2"), force=True)
    assert len(mended(f"mlp:{FAST}", whole_layers)[1]) == 1


def test_the_price_says_what_is_written_and_nothing_of_a_training_that_is_none():
    bench = bench_of("causal/llama")
    priced: Any = parse_recovery("mlp:written=1")
    assert priced.price(bench).startswith("12 windows of 24 tokens written, 1 run: ")
    assert "36 steps on the states of 1 of them" in priced.price(bench)
    assert "steps" not in parse_recovery("mlp").price(replace(bench, mask=parse_mask("attention.1")))


def test_what_it_made_is_kept_for_a_chain_that_is_killed_later(tmp_path, monkeypatch):
    model, anatomy = made("causal/llama")
    mask, text = parse_mask("mlp.1+attention.2"), examples(model)
    again = functools.partial(recover, model, anatomy, mask, parse_chain(f"mlp:{FAST},linear"), text, force=True)
    first: Any = again(folder=tmp_path)
    monkeypatch.setattr("blockpruner.repairs.run_mlps.run_states", None)
    second: Any = again(folder=tmp_path)
    assert second[0].digest() == first[0].digest()
