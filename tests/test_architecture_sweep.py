import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import zoo

from blockpruner.anatomy.reading import read_anatomy

HEADER = {"versions": {"torch": "2"}, "code": "abc"}


@pytest.fixture
def module(monkeypatch):
    """Imports a program of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return lambda name: importlib.import_module(name)


@pytest.fixture
def checked(module, monkeypatch, tmp_path):
    """Runs the checks on tiny Llamas, with an anatomy whose attention stand-ins have been tampered with."""
    checks: Any = module("architecture_checks")

    def run(**change):
        def tampered(model):
            anatomy = read_anatomy(model)
            for part in anatomy.parts.values():
                if part.block.kind == "attention":
                    part.modules[part.path].update(change)
            return anatomy

        monkeypatch.setattr(checks, "read_anatomy", tampered)
        model, reference = zoo.build("causal/llama"), zoo.build("causal/llama")
        return checks.check(model, reference, "causal", zoo.inputs(model), tmp_path)

    return run


def test_what_is_right_is_found_right(checked):
    row = checked()
    assert row["wrong"] == []
    assert row["errors"] == {}
    assert row["removal"] == {"attention": 0.0, "mlp": 0.0, "other": None}
    assert row["exact"]
    assert row["identity"]
    assert {way: found["after"] for way, found in row["generation"].items()} == dict.fromkeys(
        ("dynamic", "static", "left padding", "decode loop"), "equal"
    )
    assert row["registered"] == "equal"
    assert row["mask_tree"] == "used"
    assert [case["name"] for case in row["cases"]] == ["dense", "layer 0", "layer 2", "blocks"]


def test_a_planted_stand_in_that_hands_its_input_on_is_caught(checked):
    row = checked(output={"tuple": ["input", None]}, input="hidden_states")
    assert not row["exact"]
    assert not row["identity"]
    assert row["removal"]["attention"] > 0.1
    assert row["removal"]["mlp"] == 0.0
    assert any(text.startswith("removal of attention.0: off by") for text in row["wrong"])


def test_a_planted_stand_in_that_does_not_write_to_the_cache_is_caught(checked):
    row = checked(cache=[])
    assert row["exact"]
    assert any(text.startswith("left padding cache without") for text in row["wrong"])
    assert row["generation"]["decode loop"]["before"] == "equal"
    assert row["generation"]["decode loop"]["after"].startswith("differs by")


def test_weights_that_other_modules_share_stay_what_they_are(module):
    checks: Any = module("architecture_checks")
    model = zoo.build("causal/llama")
    first, second = (model.get_submodule(f"model.layers.{index}.mlp") for index in (0, 1))
    second.down_proj.weight = first.down_proj.weight
    with checks.no_weights(model, ["model.layers.0.mlp"]):
        assert not first.down_proj.weight.any()
        assert second.down_proj.weight.all()
    assert first.down_proj.weight is second.down_proj.weight


def test_totals_count_architectures_and_wrong_comparisons(module):
    sweep: Any = module("architecture_sweep")
    good = {
        "architecture": "causal/a",
        "instantiated": True,
        "proved": True,
        "exact": True,
        "registered": "equal",
        "remote": "equal",
        "generation": {"dynamic": {"before": "equal", "after": "equal"}, "static": {"before": "X", "after": "X"}},
        "layer_reload": {"0": "equal", "2": "equal"},
    }
    worse = good | {
        "architecture": "causal/b",
        "exact": False,
        "remote": "differs by 1",
        "wrong": ["a", "b"],
        "generation": {"dynamic": {"before": "equal", "after": "differs by 1"}},
        "layer_reload": {"0": "equal", "2": "no stock model: attention.2 makes what other layers need"},
    }
    refused = {"architecture": "masked/c", "instantiated": True, "proved": False, "reason": "it folds its stream"}
    rows = [good, worse, refused, {"architecture": "masked/d", "instantiated": False, "reason": "ImportError"}]
    assert sweep.totals(rows) == {
        "mapped": 4,
        "instantiated": 3,
        "proved": 2,
        "exact": 1,
        "cache_consistent_before": 2,
        "cache_equal": 1,
        "layer_reload_equal": 1,
        "block_reload_equal": 1,
        "refused": 1,
        "silently_wrong": 2,
    }
    assert sweep.remark(refused) == "it folds its stream"
    assert sweep.remark(worse) == "WRONG: a"


def test_a_journal_is_continued_without_its_torn_line(module, tmp_path):
    sweep: Any = module("architecture_sweep")
    journal = tmp_path / "journal.jsonl"
    assert sweep.recalled(journal, HEADER) == {}
    with journal.open("a") as file:
        file.write(json.dumps({"architecture": "causal/a"}) + "\n" + '{"architecture": "cau')
    assert sweep.recalled(journal, HEADER) == {"causal/a": {"architecture": "causal/a"}}
    assert journal.read_text().endswith('{"architecture": "causal/a"}\n')


def test_a_journal_of_other_code_is_refused(module, tmp_path):
    sweep: Any = module("architecture_sweep")
    sweep.recalled(tmp_path / "journal.jsonl", HEADER)
    with pytest.raises(SystemExit, match="--fresh"):
        sweep.recalled(tmp_path / "journal.jsonl", HEADER | {"code": "def"})


def test_a_child_that_takes_too_long_or_dies_has_a_row_that_says_so(module, tmp_path):
    sweep: Any = module("architecture_sweep")
    assert sweep.child(lambda: {"made": 1}, tmp_path / "a.json", 60) == {"made": 1}
    assert sweep.child(lambda: {"made": 1 // 0}, tmp_path / "b.json", 60)["crash"].startswith("ZeroDivisionError")
    stuck = importlib.import_module("time").sleep
    assert sweep.child(lambda: stuck(60), tmp_path / "c.json", 0.2) == {"crash": "not ready after 0.2 seconds"}
