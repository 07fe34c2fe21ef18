"""The Python functions do what the command line does, on models in memory."""

import ast
import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import blockpruner as bp
from blockpruner import cli
from blockpruner.blocks import format_mask
from blockpruner.commands import finding, telling
from blockpruner.data import read_data
from blockpruner.errors import InputError
from blockpruner.evaluation.quality import load_text
from blockpruner.planning import prepare
from blockpruner.recipe import Text
from blockpruner.scoring import compare
from blockpruner.surgery import checkpoint as checkpoints

README = Path(__file__).parents[1] / "README.md"
SEARCH: dict[str, Any] = {"target": "blocks=2", "tokens": 96, "window": 16}


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return bp.load(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def plan(loaded, prose):
    return bp.search(loaded.model, loaded.tokenizer, calibration=str(prose), **SEARCH)


def test_a_search_in_python_and_one_on_the_command_line_write_the_same_plan(
    loaded, plan, checkpoint, prose, tmp_path, monkeypatch
):
    options = {"calibration": str(prose), **SEARCH}
    bp.search(loaded.model, loaded.tokenizer, run=tmp_path / "python", **options)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--dtype", "float32", "--device", "cpu", "--run", str(tmp_path / "shell")]
    monkeypatch.setattr(sys, "argv", ["blockpruner", "search", str(checkpoint), *words])
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    made = (tmp_path / "python" / "plan.json").read_bytes()
    assert made == (tmp_path / "shell" / "plan.json").read_bytes()
    assert bp.Plan.load(tmp_path / "python" / "plan.json") == plan


def test_a_search_in_python_ends_within_its_budget(loaded, prose):
    options = {**SEARCH, "search": "exhaustive"}
    found = bp.search(loaded.model, loaded.tokenizer, calibration=str(prose), budget=12, **options)
    assert "budget" in str(found.stop_reason)
    assert found.evaluations == 9
    assert len(found.steps) == 1


def test_inspect_proves_the_blocks(loaded):
    anatomy = bp.inspect(loaded.model)
    assert set(anatomy.parts) == {bp.Block(kind, layer) for kind in ("attention", "mlp") for layer in range(4)}


def test_a_mask_a_skipped_and_a_pruned_model_are_worth_the_same(loaded, plan, checkpoint, prose):
    options = {"data": str(prose), "tokens": 96, "window": 16}
    dense, masked = bp.evaluate(loaded.model, loaded.tokenizer, masks={"plan": plan.mask()}, **options).contestants
    assert (dense.name, masked.name) == ("model", "plan")
    assert masked.loss.value == plan.steps[-1].loss.value
    with bp.skipped(loaded.model, plan.mask()):
        (skipped,) = bp.evaluate(loaded.model, loaded.tokenizer, **options).contestants
    cut = bp.prune_(bp.load(str(checkpoint), dtype="float32", device="cpu").model, plan.mask())
    (pruned,) = bp.evaluate(cut, loaded.tokenizer, **options).contestants
    assert skipped.loss.value == pytest.approx(masked.loss.value, abs=1e-5)
    assert pruned.loss.value == pytest.approx(masked.loss.value, abs=1e-5)
    assert skipped.parameters == pruned.parameters == masked.parameters < dense.parameters
    (after,) = bp.evaluate(loaded.model, loaded.tokenizer, **options).contestants
    assert after == dense


def test_masks_are_named_as_everywhere_by_a_plan_or_by_blocks_as_such_or_as_text(loaded, plan, prose):
    blocks = sorted(plan.mask(), key=str)
    masks = {"plan": plan, "blocks": blocks, "text": [str(block) for block in blocks]}
    options = {"data": prose, "tokens": 32, "window": 16}
    found = bp.evaluate(loaded.model, loaded.tokenizer, masks=masks, **options).contestants[1:]
    assert {one.removed for one in found} == {format_mask(plan.mask())}
    assert len({one.loss.value for one in found}) == 1
    (cell,) = bp.bench(loaded.model, masks=masks, protocol="quick:rounds=2,new=2,context=8").cells
    assert len({one.weights_bytes for one in cell.contestants[1:]}) == 1
    wrong = {"far": ["attention.99"]}
    with pytest.raises(InputError, match=r"the mask 'far' names blocks this model does not have: attention\.99"):
        bp.evaluate(loaded.model, loaded.tokenizer, masks=wrong, **options)
    with pytest.raises(InputError, match=r"the mask 'far' names blocks this model does not have: attention\.99"):
        bp.bench(loaded.model, masks=wrong)


def test_an_option_that_there_is_not_is_a_type_error_in_every_function(loaded, plan, prose, tmp_path):
    text: Any = {"window": 16, "tokns": 32}
    given = (loaded.model, loaded.tokenizer)
    calls = {
        "search": lambda: bp.search(*given, target="blocks=1", calibration=prose, **text),
        "score": lambda: bp.score(*given, criteria=["deepest"], calibration=prose, **text),
        "recover": lambda: bp.recover(*given, plan, tmp_path / "out", method="bias", calibration=prose, **text),
        "explain": lambda: bp.explain(*given, plan, calibration=prose, **text),
        "evaluate": lambda: bp.evaluate(*given, data=prose, **text),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match="unexpected keyword argument 'tokns'"):
            call()


def test_text_is_named_by_a_path_as_well_as_by_its_name(loaded, plan, prose, tmp_path):
    text: Any = {"tokens": 96, "window": 16}
    given = (loaded.model, loaded.tokenizer)
    assert bp.search(*given, target="blocks=2", calibration=prose, **text) == plan
    assert bp.score(*given, criteria=["deepest"], calibration=prose, **text).criteria
    assert bp.explain(*given, plan, calibration=prose, criteria=(), **text).steps
    with pytest.raises(InputError, match="also fitted on"):
        bp.recover(*given, plan, tmp_path / "out", method="bias", calibration=prose, held_out=prose, **text)


def test_saved_and_loaded_a_plan_computes_what_it_promised(checkpoint, plan, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.0)
    loaded = bp.load(str(checkpoint), dtype="float32", device="cpu")
    with bp.skipped(loaded.model, plan.mask()), torch.no_grad():
        truth = loaded.model(torch.arange(3, 19)[None]).logits
    saved = bp.save(loaded.model, loaded.tokenizer, plan, tmp_path / "pruned")
    again = bp.load(str(saved.folder), dtype="float32", device="cpu")
    with torch.no_grad():
        found = again.model(torch.arange(3, 19)[None]).logits
    assert torch.allclose(found, truth, atol=1e-5)
    assert bp.Plan.load(saved.folder / "plan.json") == plan


def test_a_plan_of_another_model_and_a_place_in_the_source_are_refused(plan, checkpoint):
    other = bp.load(str(checkpoint), dtype="float32", device="cpu")
    with pytest.raises(InputError, match="lies in the source model"):
        bp.save(other.model, other.tokenizer, plan, checkpoint / "pruned")
    other.model.model.layers[0].mlp.down_proj.weight.zero_()
    with pytest.raises(InputError, match=r"the plan was made for planted .* this is planted"):
        bp.save(other.model, other.tokenizer, plan, checkpoint.parent / "pruned")
    assert not (checkpoint / "pruned").exists()
    assert not (checkpoint.parent / "pruned").exists()


def test_a_model_that_was_never_loaded_goes_by_the_name_of_its_class(loaded, prose):
    config = copy.deepcopy(loaded.model.config)
    config.name_or_path = ""
    model = type(loaded.model)(config).eval()
    plan: Any = bp.search(model, loaded.tokenizer, calibration=str(prose), **SEARCH)
    assert plan.model.name == "LlamaForCausalLM"


def defaults(function, *names):
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name in names}


def numbers(options):
    """The command line takes `all` for tokens as well, so its default is text."""
    return {**options, "tokens": int(options["tokens"])}


def test_python_and_the_command_line_have_the_same_defaults():
    search = ("seed", "search", "criterion", "objective", "moves", "protect", "recovery", "device_spec")
    assert defaults(prepare, *search) == defaults(finding.search, *search)
    score = ("seed", "objective", "moves", "protect")
    assert defaults(compare, *score) == defaults(finding.score, *score)
    text = ("tokens", "window", "bos", "split", "column")
    found = [numbers(defaults(verb, *text)) for verb in (finding.search, finding.score, telling.evaluate)]
    assert found == [{name: Text.model_fields[name].default for name in text}] * 3
    for reader in (read_data, load_text):
        assert str(found[0]["tokens"]) in inspect.getsource(reader)


def test_the_example_of_the_readme_uses_names_and_options_that_there_are():
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    used = {ast.unparse(call.func): {keyword.arg for keyword in call.keywords} for call in calls}
    ours = {name.removeprefix("bp."): options for name, options in used.items() if name.startswith("bp.")}
    assert {"load", "search", "skipped", "evaluate", "save"} <= ours.keys()
    for name, options in ours.items():
        assert name in bp.__all__
        known = inspect.signature(getattr(bp, name)).parameters
        assert options <= known.keys(), name
