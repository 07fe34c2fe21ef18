"""Pareto fronts, knees and budgets against their definitions, and the command on a small model's plan."""

import contextlib
import itertools
import json
import re
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.artifacts import Estimate
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.frontier import Pareto, Point, depths, front, knee, pareto_of, read_plans, within
from blockpruner.frontier_picture import HEIGHT, WIDTH, heights, labels, picture, widths
from blockpruner.plan import Plan
from blockpruner.subject import subject_of
from blockpruner.weighing_tables import print_pareto


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


# Recoveries


METHOD = {"search": "greedy", "objective": "loss", "moves": "block", "target": "blocks=2", "protected": []}


def plan_with(recovery, data="text"):
    """Two steps, found with a recovery or without."""
    loss = [{"value": value, "stderr": None, "n": 4, "unit": "nats per token"} for value in (1.0, 1.2, 1.5)]
    value = {
        "format": Plan.FORMAT,
        "version": 1,
        "calibration": {"fingerprint": data, "source": data},
        "method": {**METHOD, "seed": 0, "dtype": "float32", "recovery": recovery},
        "dense_loss": loss[0],
        "steps": [{"remove": [f"mlp.{at}"], "loss": loss[at]} for at in (1, 2)],
    }
    return Plan.from_value(value, "here")


@pytest.fixture(scope="module")
def small():
    return subject_of(tiny.FAMILIES["llama"](), None, "small")


def test_plans_of_other_recoveries_stand_apart_in_one_table(small, capsys):
    found = pareto_of(small, {"one": plan_with("linear"), "two": plan_with("bias")})
    assert [p.title for p in found.points] == ["dense", *["one + linear"] * 2, *["two + bias"] * 2]
    assert [p.recovered for p in found.points] == [False, True, True, True, True]
    assert Pareto.from_value(found.model_dump(mode="json"), "here") == found
    print_pareto(found)
    said = capsys.readouterr().out
    assert re.search(r"one\W+linear\W", said)
    assert re.search(r"two\W+bias\W", said)
    assert "Losses are with the recovery" in said


def test_losses_of_half_the_text_do_not_compare_with_those_of_all(small):
    with pytest.raises(InputError, match="half the text") as said:
        pareto_of(small, {"one": plan_with("linear"), "two": plan_with(None)})
    assert "--data" in said.value.fix
    with pytest.raises(InputError) as said:
        pareto_of(small, {"one": plan_with("linear"), "two": plan_with(None, "other")})
    assert "half" not in said.value.what


def test_on_other_text_a_plan_that_was_found_with_a_recovery_is_judged_without_it_and_says_so(small, capsys):
    def judge(masks):
        return {name: Estimate.of([1.0, 2.0 + len(mask)], "nats per token") for name, mask in masks.items()}

    plans = {"one": plan_with("linear"), "two": plan_with(None)}
    found = pareto_of(small, plans, judge=judge, judged_by="other text")
    assert [p.title for p in found.points] == ["dense", *["one (found with linear)"] * 2, *["two"] * 2]
    assert not any(p.recovered for p in found.points)
    print_pareto(found)
    said = capsys.readouterr().out
    assert "none here; found with linear" in said
    assert " 1.5000 ± 0.5000 " in said
    assert "Losses are with" not in said


# The picture


def drawn(places):
    """Points (cost, rise) of a plan and its labels, in pixels: where each point is, and the box of each text."""
    points = [point(cost, 1 + rise, dense=1.0) for cost, rise in places]
    pareto = Pareto.of(points, model="m", judged_by="j", time="t")
    advice = next(one for one in pareto.advice if one.axis == "parameters")
    texts = labels(pareto, advice)
    (low, high), (bottom, top) = widths(pareto, advice, texts), heights(pareto, advice)

    def across(cost):
        return WIDTH * (high - cost) / (high - low)

    def down(loss):
        return HEIGHT * (top - loss) / (top - bottom)

    spots = [(across(cost), down(1 + rise)) for cost, rise in places]
    lines = [(across(text.cost) + 8, down(text.loss) + text.shift, text.width) for text in texts]
    return spots, [(left, y - 6, left + width, y + 6) for left, y, width in lines]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 3)), min_size=2, max_size=9, unique_by=lambda pair: pair[0]),
)
def test_texts_in_the_picture_are_inside_and_cover_no_point_and_no_text(places):
    spots, boxes = drawn([(100, 0.0), *places])
    assert boxes
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= WIDTH + 1e-6
        assert 0 <= top < bottom <= HEIGHT
        assert not any(left < x < right and top < y < bottom for x, y in spots)
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_one_point_has_one_text_and_the_picture_is_a_png(tmp_path):
    pareto = Pareto.of([point(100, 1.0), point(60, 1.05), point(20, 3.0)], model="m", judged_by="j", time="t")
    (text,) = labels(pareto.model_copy(update={"budget": 0.5}), pareto.advice[0].model_copy(update={"within": 1}))
    assert text.text == "knee, cheapest within +0.5"
    picture(pareto, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("losses", [(None, 1.0, None), (1.0, 1.0, 1.0), (None, None, None)])
def test_points_of_which_little_is_known_are_drawn_or_refused(tmp_path, losses):
    points = [point(cost, loss) for cost, loss in zip((100, 60, 20), losses, strict=True)]
    pareto = Pareto.of(points, model="m", judged_by="j", time="t")
    refused = pytest.raises(CheckFailedError, match="nothing to draw")
    with refused if losses == (None,) * 3 else contextlib.nullcontext():
        picture(pareto, tmp_path / "a.png")


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
