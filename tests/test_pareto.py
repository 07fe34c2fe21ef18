"""Pareto fronts, knees and budgets against their definitions, and the command on a small model's plan."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.artifacts import Estimate
from blockpruner.errors import InputError
from blockpruner.pareto import Pareto, Point, depths, front, knee, read_plans, within
from blockpruner.plan import Plan


def point(parameters, loss, cache=0, time=None, dense=0.0):
    known = None if loss is None else Estimate(value=loss, stderr=0.01, n=4, unit="nats per token")
    rise = None if loss is None else loss - dense
    return Point(
        plan="p", depth=1, removed=1, loss=known, rise=rise, parameters=parameters, cache_bytes=cache, time=time
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(pairs):
    points = [point(size, loss) for size, loss in pairs]

    def beaten(place):
        size, loss = pairs[place]
        return any(a <= size and b <= loss and (a, b) != (size, loss) for a, b in pairs)

    found = front(points, "parameters")
    assert {pairs[place] for place in found} == {pairs[place] for place in range(len(pairs)) if not beaten(place)}
    assert [pairs[place] for place in found] == sorted({pairs[place] for place in found})


def test_the_knee_is_farthest_below_the_line_between_the_ends():
    points = [point(100, 1.0), point(80, 1.1), point(60, 1.3), point(40, 3.0), point(20, 5.0)]
    assert knee(points, front(points, "parameters"), "parameters") == 2


def test_a_straight_front_has_no_knee():
    points = [point(100, 1.0), point(50, 2.0), point(0, 3.0)]
    assert knee(points, front(points, "parameters"), "parameters") is None
    assert knee(points[:2], [1, 0], "parameters") is None


def test_the_cheapest_within_a_budget_is_the_smallest_that_loses_no_more():
    points = [point(100, 1.0, dense=1.0), point(70, 1.05, dense=1.0), point(70, 1.04, dense=1.0), point(9, 2, dense=1)]
    assert within(points, "parameters", 0.1) == 2
    assert within(points[3:], "parameters", 0.1) is None


def test_points_without_a_loss_or_a_time_are_on_no_front():
    points = [point(100, 1.0, time=1.0), point(50, None, time=0.1), point(70, 1.2)]
    assert front(points, "parameters") == [2, 0]
    assert front(points, "time") == [0]
    pareto = Pareto.of(points, model="m", judged_by="j", time="t")
    assert [p.best_in for p in pareto.points] == [("parameters", "time"), (), ("parameters",)]
    assert [one.axis for one in pareto.advice] == ["parameters", "time"]


def test_only_a_nested_plan_has_a_point_for_each_depth():
    steps = [{"remove": ["mlp.1"]}, {"remove": ["mlp.2"]}]
    plan = Plan.from_value({"format": Plan.FORMAT, "version": 1, "steps": steps}, "here")
    assert depths(plan) == [1, 2]
    assert depths(plan.model_copy(update={"nested": False})) == [2]


@pytest.fixture
def searched(run, checkpoint, prose):
    """A run folder with a plan of three steps."""
    words = ("search", checkpoint, "--target", "blocks=3", "--search", "exhaustive", "--calibration", prose)
    found = run(*words, "--tokens", "256", "--window", "32", "--run", "one", "--dtype", "float32")
    assert found.code == 0, found.err
    return "one"


def test_the_command_weighs_every_depth_by_the_losses_of_the_search(run, searched, checkpoint):
    found = run("pareto", searched, "--model", checkpoint, "--json", "--run", "out", "--plot", "front.png")
    assert found.code == 0, found.err
    value = json.loads(found.out)
    plan = json.loads(Path("one/plan.json").read_text(encoding="utf-8"))
    assert [p["depth"] for p in value["points"]] == [0, 1, 2, 3]
    assert [p["loss"] for p in value["points"][1:]] == [step["loss"] for step in plan["steps"]]
    assert value["points"][0]["loss"] == plan["dense_loss"]
    assert all(a["parameters"] > b["parameters"] for a, b in zip(value["points"], value["points"][1:], strict=False))
    assert Path("front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads(Path("out/pareto.json").read_text(encoding="utf-8")) == value


def test_other_text_judges_all_points_alike(run, searched, checkpoint, prose):
    words = ("--model", checkpoint, "--data", prose, "--tokens", "128", "--window", "32", "--json")
    found = run("pareto", searched, *words)
    assert found.code == 0, found.err
    value = json.loads(found.out)
    assert {p["loss"]["n"] for p in value["points"]} == {4}
    assert "prose" in value["judged_by"]


def test_losses_of_different_data_do_not_compare(run, searched, checkpoint, prose):
    words = ("search", checkpoint, "--target", "blocks=1", "--search", "exhaustive", "--calibration", prose)
    run(*words, "--tokens", "128", "--window", "32", "--run", "two", "--dtype", "float32")
    found = run("pareto", "one", "two", "--model", checkpoint)
    assert (found.code, "--data" in found.err) == (2, True)


def test_a_table_names_where_to_begin(run, searched, checkpoint):
    found = run("pareto", searched, "--model", checkpoint, "--within", "9")
    assert found.code == 0, found.err
    assert "cheapest within +9: one, first 3 steps" in found.out


def test_a_plan_without_losses_must_be_judged(run, checkpoint):
    by_hand = {"format": Plan.FORMAT, "version": 1, "steps": [{"remove": ["mlp.1"]}]}
    Path("hand.json").write_text(json.dumps(by_hand), encoding="utf-8")
    found = run("pareto", "hand.json", "--model", checkpoint)
    assert (found.code, "recorded no losses" in found.err) == (2, True)
    found = run("pareto", "hand.json")
    assert (found.code, "--model" in found.err) == (2, True)


def test_a_missing_folder_is_said(run):
    found = run("pareto", "nowhere", "--model", "x")
    assert (found.code, "no plan at nowhere" in found.err) == (2, True)


def test_two_plans_of_one_name_are_refused(tmp_path):
    text = json.dumps({"format": Plan.FORMAT, "version": 1, "steps": [{"remove": ["mlp.1"]}]})
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="one name"):
        read_plans([str(tmp_path / "a/x"), str(tmp_path / "b/x")], None)
