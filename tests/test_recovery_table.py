"""The README's table of recoveries says what was measured, and so do the figures that benchmarks derive."""

import json

import pytest
import recovery_table
from beside import accuracy, compared, jackknife, won

PLAIN = {"plan": "searched", "fitted": "closed", "parameters": 268_098_176}


@pytest.mark.parametrize("name", recovery_table.TABLES)
def test_the_readme_has_the_tables_that_the_figures_make(name):
    (found,) = recovery_table.place(name).findall(recovery_table.README.read_text(encoding="utf-8"))
    assert found == recovery_table.TABLES[name](), "run: python benchmarks/recovery_table.py"


def test_rows_in_float32_stand_before_others_and_failures_for_nothing(tmp_path, monkeypatch):
    def row(method, text, loss, **more):
        return {**PLAIN, "method": method, "removed_blocks": 9, "text": text, "log_perplexity": loss, **more}

    dense = {"removed_blocks": 0}
    rows = [row("plain", text, 3.0, **dense) for text in recovery_table.TEXTS]
    rows += [row("plain", text, 4.0, removed_blocks=n) for text in recovery_table.TEXTS for n in (8, 9)]
    for text in recovery_table.TEXTS:
        rows.append(row("bias", text, 3.5, recovered_share=0.5, dtype="float32", tokens=16))
        rows.append(row("bias", text, 3.9, recovered_share=0.1, dtype="bfloat16", tokens=16))
        rows.append(row("span:rank=64", text, None, failed="no", dtype="float32"))
        rows.append(row("linear:rank=64", text, 4.1, recovered_share=-0.1, applied=False, dtype="float32"))
    figures = tmp_path / "recovery.json"
    figures.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setattr(recovery_table, "FIGURES", figures)
    made = recovery_table.table()
    assert "| `bias` | 16 | float32 | 268.1 M | 3.500 | 50% | 3.500 | 50% |" in made
    assert "span" not in made
    assert "left out: worse on held-out text" in made


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [3.1, 2.9, 3.6, 3.3]
    whole, error = jackknife(lambda mean: mean, values)
    middle = sum(values) / 4
    spread = sum((value - middle) ** 2 for value in values) / 3
    assert whole == pytest.approx(middle)
    assert error == pytest.approx((spread / 4) ** 0.5)


def test_a_share_is_surer_than_losses_whose_windows_differ_alike():
    dense = [1.0, 3.0, 2.0, 4.0]
    pruned, recovered = [d + 1 for d in dense], [d + 0.25 for d in dense]
    share, error = jackknife(won, dense, pruned, recovered)
    assert share == pytest.approx(0.75)
    assert error == pytest.approx(0, abs=1e-9)
    assert jackknife(won, dense, dense, recovered) == (None, None)


def test_answers_are_compared_item_by_item():
    assert accuracy("1101") == {"acc": 0.75, "standard_error": pytest.approx(0.25), "n": 4}
    found = compared("1101", "1011")
    assert (found.n, found.gained, found.lost, found.difference) == (4, 1, 1, 0.0)
