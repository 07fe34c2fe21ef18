"""Recovery inside the search: a mask is scored with its replacements, as a plain forward pass would have it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from labs import SIGNS, made
from tiny import FAMILIES

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError, RunFolderError
from blockpruner.loading.models import load
from blockpruner.objectives.kl import KL
from blockpruner.plan import Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.price import quote
from blockpruner.recoveries import parse_recovery
from blockpruner.repairs import side_by_side
from blockpruner.repairs.closed_form import fill_gaps
from blockpruner.repairs.recovery import Bench
from blockpruner.replaceable import Replacing
from blockpruner.searching.contract import DENSE
from blockpruner.subject import open_subject
from blockpruner.surgery.gaps import filled, gaps, repaired
from blockpruner.texts.examples import examples_of

# In each a layer that loses all its blocks, and one that loses one of them.
ARCHITECTURES = {
    "causal/llama": "attention.1+mlp.1+mlp.2",
    "causal/gpt2": "attention.1+mlp.1+attention.3",
    "causal/falcon": "attention.1+mlp.1+mlp.2",
    "causal/mixtral": "mlp.1+attention.2+mlp.2",
    "causal/mamba": "mixer.1+mixer.2",
    "causal/gemma3_text": "attention.1+mlp.1+mlp.2",
    "masked/bert": "attention.1+mlp.1+mlp.2",
    "seq2seq/t5": "encoder.attention.1+encoder.mlp.1+decoder.cross_attention.1",
}


def examples(model, windows=16, tokens=24, seed=1):
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=seed)["input_ids"], SIGNS)


def replacing(name, method="linear:rank=4,ridge=3") -> Any:
    model, anatomy = made(name)
    return Replacing.of(model, anatomy, parse_recovery(method), examples(model))


def values(objective, masks) -> Any:
    """By mask, its values on all micro-batches."""
    found = dict.fromkeys(masks, ())
    for _, mask, more in objective.losses({batch: list(masks) for batch in range(objective.batches)}):
        found[mask] += more
    return found


BIASES = [(name, "bias") for name in ("causal/llama", "masked/bert")]


@pytest.mark.parametrize(("name", "method"), [*((name, "linear:rank=4,ridge=3") for name in ARCHITECTURES), *BIASES])
def test_the_loss_of_a_mask_is_that_of_the_repaired_model_in_a_plain_forward_pass(name, method):
    inside = replacing(name, method)
    model, anatomy = made(name)
    mask = parse_mask(ARCHITECTURES[name])
    objective = ModelObjective(model, anatomy, inside.held_out, filling=inside)
    found = values(objective, [DENSE, mask, mask - {min(mask, key=lambda b: b.order)}])
    repair = filled(anatomy, mask, inside)
    assert repair.replacements
    with repaired(model, anatomy, mask, repair):
        assert found[mask] == pytest.approx(plain(model, inside.held_out), rel=1e-5)
    assert found[DENSE] == pytest.approx(plain(model, inside.held_out), rel=1e-5)
    bare = values(ModelObjective(model, anatomy, inside.held_out), [DENSE, mask])
    assert found[DENSE] == bare[DENSE]
    assert found[mask] != pytest.approx(bare[mask], rel=1e-6)


@torch.no_grad()
def plain(model, batch):
    """Mean loss of each row from an ordinary forward pass, by torch's own cross entropy."""
    return tuple(
        float(
            torch.nn.functional.cross_entropy(
                model(**row.inputs).logits[0], row.targets[0], ignore_index=-100, reduction="mean"
            )
        )
        for row in batch.rows()
    )


@pytest.mark.parametrize("name", ["causal/llama", "masked/bert", "causal/falcon"])
def test_what_stands_in_a_layer_is_what_the_recovery_fits_to_that_layer_alone(name):
    inside = replacing(name)
    model, anatomy = made(name)
    for layer in anatomy.stacks[0].layers[1:3]:
        for removed in (frozenset(part.block for part in layer.parts), frozenset([layer.parts[0].block])):
            bench = Bench(model, anatomy, removed, inside.fit, inside.held_out)
            repair, _ = fill_gaps(bench, inside.form)
            found = inside(layer, removed)
            assert found.keys() == repair.replacements.keys() <= {gap.path for gap in gaps(anatomy, removed)}
            for path, made_ in found.items():
                for key, value in made_.state_dict().items():
                    assert torch.equal(value, repair.replacements[path].state_dict()[key])
            assert inside(layer, removed) is found


@pytest.mark.parametrize("method", ["linear:rank=4,ridge=3", "linear:rank=4,ridge=3,target=dense"])
def test_fits_in_order_of_depth_take_one_pass_together_and_any_order_gives_the_same(method):
    model, anatomy = made("causal/llama")
    layers = anatomy.stacks[0].layers
    asked = [(layer, frozenset([part.block])) for layer in layers for part in layer.parts]
    ordered, backward, calls = replacing("causal/llama", method), replacing("causal/llama", method), []
    handle = model.get_submodule(layers[0].path).register_forward_hook(lambda *_: calls.append(1))
    try:
        first, each = {}, []
        for layer, removed in asked:
            before = len(calls)
            first[removed] = ordered(layer, removed)
            each.append(len(calls) - before)
    finally:
        handle.remove()
    assert any(each[:3])
    assert not any(each[3:])  # the first layer is looked at for its two blocks and is left once
    for layer, removed in reversed(asked):
        assert backward(layer, removed).keys() == first[removed].keys()
        for path, made_ in backward(layer, removed).items():
            for key, value in made_.state_dict().items():
                assert torch.equal(value, first[removed][path].state_dict()[key])


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_fit_after_one_that_was_interrupted_is_the_same(count, monkeypatch):
    model, anatomy = made("causal/llama")
    monkeypatch.setattr(side_by_side, "BATCH_TOKENS", 48)
    layers = anatomy.stacks[0].layers
    first, third = (frozenset([layers[number].parts[0].block]) for number in (0, 2))
    inside, calls = replacing("causal/llama"), []
    inside(layers[0], first)

    def stop(*_):
        calls.append(1)
        if len(calls) == count:  # in the midst of leading the streams through the first layer
            raise KeyboardInterrupt

    handle = model.get_submodule(layers[0].path).register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            inside(layers[2], third)
    finally:
        handle.remove()
    again, whole = inside(layers[2], third), replacing("causal/llama")(layers[2], third)
    assert again.keys() == whole.keys() != set()
    for path, made_ in again.items():
        for key, value in made_.state_dict().items():
            assert torch.equal(value, whole[path].state_dict()[key])


def test_the_bits_of_a_loss_do_not_depend_on_what_was_asked_before():
    mask, other = parse_mask("attention.1+mlp.2"), parse_mask("mlp.1+mlp.2+attention.1")
    model, anatomy = made("causal/llama")
    both = values(
        ModelObjective(model, anatomy, replacing("causal/llama").held_out, filling=replacing("causal/llama")),
        [other, mask],
    )
    alone = values(
        ModelObjective(model, anatomy, replacing("causal/llama").held_out, filling=replacing("causal/llama")), [mask]
    )
    assert both[mask] == alone[mask]


def test_half_of_the_windows_are_fitted_on_and_the_losses_are_those_of_the_others():
    inside = replacing("causal/llama")
    assert (len(inside.fit), len(inside.held_out)) == (8, 8)
    text = examples(made("causal/llama")[0])
    assert torch.equal(inside.fit.inputs["input_ids"], text.inputs["input_ids"][:8])
    assert torch.equal(inside.held_out.inputs["input_ids"], text.inputs["input_ids"][8:])
    assert inside.identity.endswith("fitted on the first 8 windows, losses of the other 8")


@pytest.fixture(scope="module")
def subject(checkpoint):
    return open_subject(load(str(checkpoint), dtype="float32", device="cpu"))


@pytest.fixture
def task(subject, prose):
    """Makes searches on the planted model."""

    def make(**options) -> Any:
        given = {"target": "blocks=2", "tokens": 256, "window": 16, "search": "greedy", "recovery": "bias"} | options
        return prepare(subject, calibration=str(prose), **given)

    return make


def test_a_plan_is_searched_under_the_loss_with_replacements_and_says_so(task, subject):
    job = task()
    plan: Any = find_plan(job)
    assert plan.method.recovery == "bias:sinks=0.0"
    mask = plan.mask()
    with repaired(subject.model, subject.anatomy, mask, filled(subject.anatomy, mask, job.replacing)):
        expected = plain(subject.model, job.replacing.held_out)
    assert plan.steps[-1].loss.value == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    first, end = plan.method.windows
    assert (first, end) == (8, 16) == (len(job.replacing.fit), plan.calibration["windows"])
    assert plan.dense_loss.n == len(job.replacing.held_out) == end - first
    assert torch.equal(job.data.examples.part(first, end).targets, job.replacing.held_out.targets)
    assert Plan.from_value(plan.model_dump(mode="json"), "this") == plan


def test_a_plan_from_before_it_named_its_windows_is_still_read(task):
    plan: Any = find_plan(task())
    value = plan.model_dump(mode="json")
    del value["method"]["windows"]
    older: Any = Plan.from_value(value, "this")
    assert (older.method.windows, older.steps) == (None, plan.steps)
    without: Any = find_plan(task(recovery=None))
    assert without.method.windows is None


def test_the_counted_work_is_that_of_the_same_search_without_and_the_fits_are_in_the_price(task):
    assert quote(task(search="exhaustive")).passes == 1 + 8 / 4 + 1 / 2  # two steps, four layers of two blocks
    assert (
        find_plan(task(search="exhaustive")).evaluations
        == find_plan(task(search="exhaustive", recovery=None)).evaluations
    )


def test_a_search_that_was_begun_with_another_recovery_is_not_gone_on_with(task, tmp_path):
    plan = find_plan(task(), tmp_path / "run")
    assert find_plan(task(), tmp_path / "run") == plan
    for other in ("linear:rank=2", None):
        with pytest.raises(RunFolderError):
            find_plan(task(recovery=other), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recovery": "replaceme"}, "cannot be fitted inside a search"),
        ({"recovery": "span"}, "cannot be fitted inside a search"),
        ({"recovery": "biass"}, "biass"),
        ({"tokens": 16}, "one window cannot be both"),
    ],
)
def test_what_cannot_be_inside_a_search_is_refused_with_the_reason(task, options, said):
    with pytest.raises(InputError, match=said):
        task(**options)


def test_the_command_line_takes_a_recovery_and_says_what_it_fits_on_and_what_comes_next(run, checkpoint, prose):
    words = ("--calibration", prose, "--tokens", 64, "--window", 16, "--dtype", "float32", "--device", "cpu")
    done = run("search", checkpoint, "--target", "blocks=1", "--recovery", "bias", *words, "--run", "out")
    assert done.code == 0
    assert "bias:sinks=0.0, fitted on the first 2 windows, losses of the other 2" in done.err
    assert f"or: blockpruner recover out/plan.json --dense {checkpoint} --method bias --calibration" in done.err
    assert run("search", "none", "--target", "blocks=1", "--recovery", "biass", *words).code == 2


def test_streamed_weights_and_workers_are_refused(task, subject, prose):
    streamed = replace(subject, memory=1 << 20)
    with pytest.raises(InputError, match="not streamed"):
        prepare(streamed, target="blocks=1", calibration=str(prose), tokens=256, window=16, recovery="bias")
    crew: Any = object()
    with pytest.raises(InputError, match="workers do not fit replacements"):
        find_plan(task(), crew=crew)


def test_a_block_that_adds_a_constant_costs_nothing_where_a_bias_stands_for_it_and_much_where_not():
    model = FAMILIES["gpt2"]()
    with torch.no_grad():
        mlp = model.transformer.h[1].mlp
        mlp.c_proj.weight.zero_()
        mlp.c_proj.bias.normal_(generator=torch.Generator().manual_seed(0)).mul_(5)
    anatomy = read_anatomy(model)
    inside: Any = Replacing.of(model, anatomy, parse_recovery("bias:sinks=1"), examples(model))
    masks = [frozenset([block]) for block in anatomy.parts]
    for filling, first in ((inside, True), (None, False)):
        objective = ModelObjective(model, anatomy, inside.held_out, KL(), filling=filling)
        mean = {str(next(iter(mask))): sum(each) / len(each) for mask, each in values(objective, masks).items()}
        assert (min(mean, key=mean.__getitem__) == "mlp.1") == first
        assert (mean["mlp.1"] < 1e-4) == first
