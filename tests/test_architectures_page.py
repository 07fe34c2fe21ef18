"""The page of architectures and the README say what the sweep has measured, and it measured what was promised."""

import importlib
import json
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
architectures_page = importlib.import_module("architectures_page")  # a program of benchmarks/


@pytest.fixture(scope="module")
def sweep():
    return json.loads((REPO / "experiments" / "architecture_sweep.json").read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_figures(sweep):
    written = (REPO / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert written == architectures_page.page(sweep), "run python benchmarks/architectures_page.py"


def test_the_readme_quotes_the_totals(sweep):
    totals = sweep["totals"]
    readme = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    for text in (
        f"Of {totals['mapped']} entries, {totals['instantiated']} make a tiny model that runs on text",
        f"the blocks of {totals['proved']} are found and proved",
        f"removal is exact for {totals['exact']}",
        f"cached generation stays equal for {totals['cache_equal']} of {totals['cache_consistent_before']} causal ones",
        f"{totals['layer_reload_equal']} reload without whole layers in plain transformers",
        f"{totals['block_reload_equal']} without single blocks",
        f"{totals['silently_wrong']} were wrong without an error",
    ):
        assert text in readme


def test_what_was_promised_holds(sweep):
    totals = sweep["totals"]
    assert set(architectures_page.TOTALS) == set(totals)
    assert totals["silently_wrong"] == 0
    assert totals["proved"] >= 258
    assert totals["exact"] >= 253
    assert totals["cache_equal"] >= 0.98 * totals["cache_consistent_before"]
    assert totals["layer_reload_equal"] >= 242
    assert totals["block_reload_equal"] >= 253


def test_every_refusal_has_a_reason(sweep):
    assert not [row["architecture"] for row in sweep["rows"] if not row.get("proved") and not row.get("reason")]
