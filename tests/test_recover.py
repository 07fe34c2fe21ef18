"""`blockpruner recover`, from the shell and from Python, and what a recovered model is to all other verbs."""

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from labs import examples, made
from toys import Toy, additive
from transformers import AutoModelForCausalLM

import blockpruner as bp
from blockpruner import recoveries
from blockpruner.anatomy.probing import fillings, first_tensor, recorded, unfilled
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block, parse_mask
from blockpruner.commands import making
from blockpruner.criteria.cosine import Cosine
from blockpruner.errors import InputError
from blockpruner.evaluation.quality import load_text
from blockpruner.importance.criterion import Lab
from blockpruner.loading.models import identify, load
from blockpruner.mending import prepare
from blockpruner.plan import Plan
from blockpruner.recipe import Text
from blockpruner.recoveries.bias import Bias
from blockpruner.repairs.closed_form import WORSE
from blockpruner.repairs.recovery import GapRecord, RecoveryRecord
from blockpruner.searching.evaluations import Evaluations
from blockpruner.standin import Replacement
from blockpruner.surgery import checkpoint as checkpoints
from blockpruner.surgery.gaps import UNREPAIRED, Repair, gaps
from blockpruner.surgery.removal import prune_, silenced, skipped

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
TEXT: dict[str, Any] = {"tokens": 512, "window": 16}  # what the model has learned, and little more
WORDS = ("--tokens", 512, "--window", 16, *FLOAT32)
REMOVED = ("mlp.1", "mlp.3")
LINEAR = "linear:rank=8"


@pytest.fixture
def unreloaded(monkeypatch):
    """Spares the fresh process, which one test and those of `checkpoint` wait for."""
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.0)


@pytest.fixture(scope="module")
def whole(checkpoint):
    return load(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def plan(whole, checkpoint):
    steps = Plan.of(*(bp.Move.of(Block.parse(name)) for name in REMOVED))
    return steps.model_copy(update={"model": identify(whole.model, str(checkpoint))})


@pytest.fixture(scope="module")
def plan_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return path


@pytest.fixture(scope="module")
def better(checkpoint, plan, prose, tmp_path_factory):
    """A recovered model in a folder, reloaded and compared, and its record."""
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    out = tmp_path_factory.mktemp("recovered") / "better"
    saved, record = bp.recover(loaded.model, loaded.tokenizer, plan, out, method=LINEAR, calibration=str(prose), **TEXT)
    return saved, record


@pytest.fixture
def recover(run, checkpoint, plan_file, prose, unreloaded):
    """Runs `recover` on the plan, with more or other options."""

    def call(*flags, pruned=plan_file, **options):
        named = {"dense": checkpoint, "method": LINEAR, "calibration": prose, "out": "better", **options}
        words = [word for name, value in named.items() if value for word in (f"--{name.replace('_', '-')}", value)]
        return run("recover", pruned, *words, *WORDS, *flags)

    return call


def refused(done, code, *said):
    assert (done.code, Path("better").exists()) == (code, False)
    for text in said:
        assert text in done.err


def test_what_prune_wrote_is_recovered_and_evaluate_sets_it_beside_the_others(
    run, recover, better, checkpoint, plan, plan_file, prose
):
    assert run("prune", checkpoint, "--plan", plan_file, "--out", "cut").code == 0
    done = recover(pruned="cut")
    assert done.code == 0, done.err
    record: Any = RecoveryRecord.load(Path("better/recovery.json"))
    assert record == better[1], "the same words, the same numbers"
    assert Plan.load(Path("better/plan.json")) == plan
    assert "linear:rank=8" in done.out
    assert (
        f"{record.recovered_share:.0%} of the increase won back with {record.added_parameters:,} parameters" in done.out
    )
    assert "better: stand-ins checkpoint" in done.out
    assert record.dense.value < record.recovered.value < record.pruned.value

    words = ("--data", prose, "--tokens", 512, "--window", 16, *FLOAT32, "--json")
    table = json.loads(run("evaluate", checkpoint, "cut", "better", *words).out)
    dense, cut, mended = table["contestants"]
    assert mended["parameters"] == cut["parameters"] + record.added_parameters
    assert cut["removed"] == mended["removed"] == "mlp.1+mlp.3"
    assert dense["loss"]["value"] < mended["loss"]["value"] < cut["loss"]["value"]


def test_evaluate_says_how_much_of_its_text_a_model_was_recovered_with(run, recover, checkpoint, prose, tmp_path):
    text = prose.read_text(encoding="utf-8")
    (tmp_path / "first.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
    long = ("--window", 48, "--tokens", "all")
    assert recover(*long, "--force", calibration=tmp_path / "first.txt").code == 0
    shutil.copytree("better", "again")
    Path("again/recovery.json").rename("again/recovery.earlier.json")  # as where it is pruned once more
    for source, share in (("first.txt", 1), ("other.txt", 0)):
        words = ("evaluate", checkpoint, "better", "again", "--data", tmp_path / source, *long, *FLOAT32)
        dense, better, again = json.loads(run(*words, "--json").out)["contestants"]
        assert dense["seen"] is None
        assert better["seen"] == again["seen"]
        assert better["seen"]["value"] == pytest.approx(share, abs=0.1)
        said = "better was recovered with" in run(*words).out
        assert said == (share > 0)
    Path("better/recovery.json").write_text("{}")  # of another program
    (found,) = json.loads(run("evaluate", "better", *words[4:], "--json").out)["contestants"]
    assert found["seen"] is None


def test_the_loss_of_a_recovered_model_is_that_of_its_own_forward_pass(better, tokenizer, prose):
    saved, _ = better
    model: Any = AutoModelForCausalLM.from_pretrained(saved.folder)
    found = bp.evaluate(model, tokenizer, data=str(prose), **TEXT).contestants[0]
    windows = load_text(str(prose), tokenizer, model, **TEXT).windows
    with torch.no_grad():
        plain = model(windows, labels=windows).loss
    assert found.loss.value == pytest.approx(float(plain), abs=1e-4)
    assert saved.difference < 1e-4
    assert saved.parameters == found.parameters == sum(p.numel() for p in model.parameters())


def test_the_dense_model_is_the_one_that_the_plan_names(recover, checkpoint, plan_file, monkeypatch, tmp_path):
    monkeypatch.chdir(checkpoint.parent)  # of a folder a plan knows the last part
    done = recover(dense=None, out=tmp_path / "better", method="bias")
    assert done.code == 0, done.err
    assert f"loading {checkpoint.name}" in done.err


def test_the_model_can_be_named_where_the_plan_does_not_know_it(recover, plan):
    other = plan.model.model_copy(update={"name": "no/such/folder"})
    plan.model_copy(update={"model": other}).save(Path("elsewhere.json"))
    plan.model_copy(update={"model": None}).save(Path("nameless.json"))
    refused(
        recover(dense=None, pruned="elsewhere.json"),
        2,
        "elsewhere.json is for 'no/such/folder': there is no model",
        "--dense",
    )
    refused(recover(dense=None, pruned="nameless.json"), 2, "does not say which model it is for", "--dense")


def test_as_json_the_result_is_what_was_saved_and_the_record(recover):
    value = json.loads(recover("--json", method="bias").out)
    assert value["recovery"] == json.loads(Path("better/recovery.json").read_text())
    assert (value["folder"], value["form"], value["difference"]) == ("better", "stand-ins", 0.0)


def test_a_map_folded_into_other_weights_adds_no_parameters(run, recover, better, plan, whole):
    value = json.loads(recover("--json", method="replaceme").out)
    total, gone = sum(p.numel() for p in whole.model.parameters()), 2 * (3 * 32 * 64 + 32)
    assert (value["parameters"], value["recovery"]["added_parameters"]) == (total - gone, 0)
    assert value["recovery"]["recovered"]["value"] < value["recovery"]["pruned"]["value"]


def test_the_first_steps_alone_can_be_removed(recover, plan):
    assert recover("--first", 1, method="bias").code == 0
    assert Plan.load(Path("better/plan.json")).steps == plan.steps[:1]


TRAINED = "linear:rank=4,lora:lr=0.003,batch=4,accumulate=1,epochs=2,evaluate_every=4,patience=0"


def test_a_chain_with_training_says_its_price_and_goes_on_where_it_was_killed(recover, monkeypatch):
    done = recover(method=TRAINED, out="whole")
    assert done.code == 0, done.err
    assert "price: linear: 2 gaps: about 1.8 forward passes over 416 + 96 tokens\n" in done.err
    assert "of checkpoints on disk\ncheckpoints: whole.run, until the model is saved; with --run they stay" in done.err
    assert "price: lora: 13 steps, 832 tokens forward and backward, no second copy of the weights, 5 times" in done.err
    assert "training, held-out loss" in done.err
    assert "Held-out loss by step: 0: " in done.out
    assert not Path("whole.run").exists()
    record: Any = RecoveryRecord.load(Path("whole/recovery.json"))
    assert [step.method.partition(":")[0] for step in record.steps] == ["linear", "lora"]
    assert record.recovered.value < record.steps[0].recovered.value

    def stop(self, done, _, message):
        if message.startswith("training") and done == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making.Progress, "__call__", stop)
        assert recover("--run", "runs/mine", method=TRAINED).code == 130
    assert sorted(path.name for path in Path("runs/mine/2-lora").glob("step-*"))[-1] == "step-000000008"
    assert recover("--run", "runs/mine", method=TRAINED).code == 0
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == [".lock", "1-linear", "2-lora"]
    names = ("recovery.json", "model.safetensors", "plan.json")
    assert all(Path("better", name).read_bytes() == Path("whole", name).read_bytes() for name in names)
    other = recover("--run", "runs/mine", method=TRAINED.replace("0.003", "0.004"), out="other")
    assert other.code == 5
    assert "is of another training" in other.err


def test_who_recovers_again_is_told_that_it_begins_anew(recover, better):
    done = recover("--dry-run", pruned=better[0].folder, out="again")
    assert (done.code, "begins anew" in done.err) == (0, True), done.err


def test_a_dry_run_says_the_price_and_stops(recover):
    done = recover("--dry-run", "--json", method=TRAINED)
    assert done.code == 0
    assert [line.partition(":")[0] for line in json.loads(done.out)["price"]] == ["linear", "lora"]
    assert not Path("better").exists()
    assert not Path("better.run").exists()


def test_what_was_kept_of_an_mlp_goes_when_the_model_is_saved(recover, monkeypatch):
    whole = parse_mask("mlp.1+attention.2+mlp.2+mlp.3")
    monkeypatch.setattr(Plan, "mask", lambda *_: whole)
    done = recover("--force", method="mlp:epochs=2,refit", out="small")
    assert done.code == 0, done.err
    assert "of states in memory and on disk" in done.err
    assert not Path("small.run").exists()


def test_methods_without_training_leave_no_run_folder(recover):
    assert recover(method="bias").code == 0
    assert not Path("better.run").exists()


def test_a_recovery_that_lacks_its_package_is_said_before_the_model_is_loaded(recover, monkeypatch):
    monkeypatch.setattr(recoveries, "find_spec", lambda name: None)
    done = recover(method="linear,lora")
    refused(done, 4, "LoRA needs the package 'peft'", "pip install 'blockpruner[train]'")
    assert "loading" not in done.err


def worse(bench):
    repair = Repair({gap.path: Replacement("bias", 0, 32) for gap in gaps(bench.anatomy, bench.mask)})
    for each in repair.replacements.values():
        torch.nn.init.normal_(each.bias, std=3, generator=torch.Generator().manual_seed(0))
    return repair, ()


def test_what_makes_held_out_text_worse_is_said_and_not_written_unless_forced(recover, monkeypatch):
    monkeypatch.setattr(Bias, "repair", lambda _, bench: worse(bench))
    done = recover(method="bias")
    refused(done, 3, "nothing was written: the held-out loss rises with it, from ", "--force")
    assert "Held-out loss: dense " in done.out
    forced = recover("--force", method="bias")
    assert forced.code == 0, forced.err
    record: Any = RecoveryRecord.load(Path("better/recovery.json"))
    assert record.applied
    assert record.recovered.value > record.pruned.value


def test_where_no_gap_can_be_filled_nothing_is_written(recover, monkeypatch):
    gap = GapRecord(removed="mlp.1", place="", added_parameters=0, settings={}, error=2.0, applied=False, reason=WORSE)
    monkeypatch.setattr(Bias, "repair", lambda *_: (UNREPAIRED, (gap,)))
    refused(recover(method="bias"), 3, f"nothing was recovered: mlp.1: {WORSE}", "fit on more text")


def test_text_to_judge_by_is_other_text(recover, prose):
    refused(recover(held_out=prose), 2, "are also fitted on", "hold out other text")
    words = prose.read_text().splitlines()
    Path("other.txt").write_text("\n".join(reversed(words)))
    assert recover(held_out="other.txt", method="bias").code == 0
    assert RecoveryRecord.load(Path("better/recovery.json")).tokens == (512, 128)


def test_without_other_text_the_last_fifth_judges(better):
    assert better[1].tokens == (416, 96)


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"method": "liner"}, "'liner' is not a known recovery", "did you mean 'linear'?"),
        ({"method": "linear:rnk=4"}, "'linear' has no option 'rnk'", "did you mean 'rank'?"),
        ({"method": "linear:rank=-1"}, "no linear map has rank=-1", "a rank and a ridge of 0 or more"),
        ({"pruned": "gone"}, "gone is not a file", "a folder that `blockpruner prune` wrote"),
        ({"calibration": "alpacca"}, "'alpacca' is no source of text", "alpaca, wikitext2 or builtin"),
    ],
    ids=str,
)
def test_a_wrong_word_is_named_with_what_to_do(recover, options, what, fix):
    refused(recover(**options), 2, what, fix)


def test_a_folder_that_is_there_or_lies_in_a_model_is_refused(recover, plan, tmp_path):
    plan.save(Path("plan.json"))
    refused(recover(out="."), 2, ". already exists")
    refused(recover(out="cut/better", pruned=tmp_path), 2, "lies in the source model")


def test_a_plan_of_another_model_and_one_that_removes_nothing_are_refused(whole, plan, prose, better):
    loaded = load(str(better[0].folder), dtype="float32", device="cpu")
    options: dict[str, Any] = {"method": "bias", "calibration": str(prose), **TEXT}
    with pytest.raises(InputError, match="was made for planted"):
        bp.recover(loaded.model, loaded.tokenizer, plan, "nowhere", **options)
    with pytest.raises(InputError, match="was recovered before, so it is not the dense model"):
        bp.recover(loaded.model, loaded.tokenizer, Plan.of(bp.Move.of(Block("mlp", 0))), "nowhere", **options)
    with pytest.raises(InputError, match="removes nothing, so nothing is missing"):
        bp.recover(whole.model, whole.tokenizer, Plan.of(), "nowhere", **options)


def test_a_recovered_model_can_be_pruned_again_and_keeps_what_was_won(run, better, tokenizer, prose, unreloaded):
    saved, record = better
    Plan.of(bp.Move.of(Block("attention", 1)), bp.Move.of(Block("attention", 2))).save(Path("more.json"))
    done = run("prune", saved.folder, "--plan", "more.json", "--out", "less", "--dtype", "float32")
    assert done.code == 0, done.err
    words = ("--data", prose, "--tokens", 512, "--window", 16, *FLOAT32, "--json", "--prompt", "")
    (less,) = json.loads(run("evaluate", "less", *words).out)["contestants"]
    loaded = load(str(saved.folder), dtype="float32", device="cpu")
    masks = {"less": [Block("attention", 1), Block("attention", 2)]}
    masked = bp.evaluate(loaded.model, tokenizer, data=str(prose), masks=masks, **TEXT).contestants[1]
    assert less["loss"]["value"] == pytest.approx(masked.loss.value, abs=1e-5)
    assert less["parameters"] == masked.parameters
    card = Path("less/README.md").read_text(encoding="utf-8")
    assert "had lost mlp.1, mlp.3 before" in card
    assert "see `plan.earlier.json` and `recovery.earlier.json`" in card
    assert "before" not in Path(saved.folder, "README.md").read_text(encoding="utf-8")
    for name in ("plan", "recovery"):
        assert Path(f"less/{name}.earlier.json").read_bytes() == Path(saved.folder, f"{name}.json").read_bytes()
    assert not Path("less/recovery.json").exists()
    said = run("inspect", "less", *FLOAT32).out
    assert "which stays: model.layers.1, model.layers.3." in said
    held = json.loads(Path("less/config.json").read_text())["blockpruner"]["modules"]
    assert sum("replacement" in spec for spec in held.values()) == len(record.gaps)


def filled(name, removed, kind="linear"):
    """The model without the blocks, with random maps in their places, its anatomy, and that of the dense model."""
    model, anatomy = made(name)
    model, mask = copy.deepcopy(model), parse_mask(removed)
    replacements = {gap.path: Replacement(kind, 32, 32, 0, "rms") for gap in gaps(anatomy, mask)}
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for each in replacements.values() for p in each.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    prune_(model, mask, anatomy=anatomy, repair=Repair(replacements))
    return model, read_anatomy(model), anatomy


@pytest.mark.parametrize("kind", ["bias", "linear"])
@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("causal/llama", "attention.1+mlp.2"),
        ("causal/llama", "attention.1+mlp.1"),
        ("causal/falcon", "mlp.1"),
        ("causal/mixtral", "mlp.2"),
        ("causal/mamba", "mixer.1"),
        ("masked/bert", "attention.1"),
        ("masked/bert", "attention.1+mlp.1"),
        ("seq2seq/t5", "encoder.attention.1+decoder.mlp.2"),
    ],
)
@torch.no_grad()
def test_what_stands_in_a_removed_block_s_place_is_no_block_and_stays(name, removed, kind):
    model, anatomy, dense = filled(name, removed, kind)
    assert set(anatomy.parts) == set(dense.parts) - parse_mask(removed)
    assert anatomy.total_parameters == sum(p.numel() for p in model.parameters())
    beside = {part.block for layer in layers(anatomy) for part in layer.parts if holds(model, layer)}
    inputs = zoo.inputs(model)
    for mask in [frozenset([block]) for block in anatomy.parts] + [frozenset(beside)]:
        with silenced(model, anatomy, mask):
            expected = model(**inputs)[0]
        with skipped(model, mask, anatomy=anatomy):
            assert torch.equal(model(**inputs)[0], expected)
    cut = prune_(copy.deepcopy(model), beside, anatomy=anatomy)
    assert held_parameters(cut) == held_parameters(model) > 0
    left = sum(p.numel() for p in cut.parameters())
    assert left == anatomy.total_parameters - anatomy.outline.removed_parameters(frozenset(beside))


def layers(anatomy):
    return [layer for stack in anatomy.stacks for layer in stack.layers]


def holds(model, layer):
    return any(isinstance(module, Replacement) for module in model.get_submodule(layer.path).modules())


def held_parameters(model):
    return sum(p.numel() for module in model.modules() if isinstance(module, Replacement) for p in module.parameters())


def test_replacements_can_be_taken_out_for_a_while():
    model, _, _ = filled("causal/llama", "attention.1")
    inputs = zoo.inputs(model)
    with torch.no_grad():
        with_it, kept = model(**inputs).logits, copy.deepcopy(model.state_dict())
        with unfilled(model):
            assert held_parameters(model) == 0
            assert not torch.equal(model(**inputs).logits, with_it)
        assert torch.equal(model(**inputs).logits, with_it)
    assert list(model.state_dict()) == list(kept)
    assert list(fillings(model)) == ["model.layers.1.self_attn"]


def test_a_criterion_sees_what_a_block_adds_beside_what_stands_in_the_other_s_place():
    model, anatomy, _ = filled("causal/llama", "attention.1")
    text = examples(model)
    move = bp.Move.of(Block("mlp", 1))
    lab = Lab(model, anatomy, text, Evaluations(Toy(additive({}))))
    found: Any = Cosine().scores(lab, [move])[move]
    states = []
    with torch.no_grad(), recorded({"": model.model.layers[1]}) as calls:
        for mask in (frozenset(), move.blocks):
            with silenced(model, anatomy, mask):
                model(**text.inputs)
            after: Any = first_tensor(calls[""][-1].output)
            states.append(after.double())
    assert found.value == pytest.approx(float(1 - torch.cosine_similarity(*states, dim=-1).mean()), rel=1e-4)


def test_the_shell_and_python_have_the_same_defaults():
    shell, python = (inspect.signature(verb).parameters for verb in (making.recover, prepare))
    for name in ("held_out", "first", "force", "seed"):
        assert shell[name].default == python[name].default
    for name, field in Text.model_fields.items():
        if name in shell:
            assert str(shell[name].default) == str(field.default)
