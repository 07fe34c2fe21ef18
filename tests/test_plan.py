"""Plans are data: what is written is read back, what is wrong is named, what is another model's is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import Toy, additive, toy_outline, toy_problem

from blockpruner.artifacts import write_json
from blockpruner.blocks import Block, Move, parse_mask
from blockpruner.errors import InputError
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searching.driver import run

MODEL = ModelIdentity(name="toy", model_type="toy", parameters=3200, fingerprint="f" * 64)
CALIBRATION = {"source": "builtin", "windows": 4, "share": 0.5, "bos": True, "fingerprint": "abc", "note": None}


@pytest.fixture
def searched():
    problem = toy_problem(4, "block", "blocks=3", protected=[0])
    result = run(Exhaustive(), problem, Toy(additive({"attention.2": 1.0, "mlp.3": 2.0, "mlp.1": float("nan")})))
    return Plan.from_search(
        result,
        search=Exhaustive(),
        problem=problem,
        objective="loss",
        seed=0,
        dtype="float32",
        model=MODEL,
        calibration=CALIBRATION,
    )


def by_hand(*steps, **fields):
    return {"format": "blockpruner.plan", "version": 1, "steps": [{"remove": blocks} for blocks in steps], **fields}


def written(tmp_path, value):
    write_json(tmp_path / "plan.json", value)
    return tmp_path / "plan.json"


def test_a_saved_plan_is_read_back_whole(searched, tmp_path):
    searched.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == searched
    Plan.read(tmp_path / "plan.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_searched_plan_carries_its_evidence(searched):
    saved = searched.model_dump(mode="json")
    assert [step["remove"] for step in saved["steps"]] == [["attention.2"], ["mlp.3"], ["attention.1"]]
    assert saved["method"] == {
        "search": "exhaustive:ends=False",
        "criterion": None,
        "objective": "loss",
        "moves": "block",
        "target": "blocks=3",
        "protected": ["0"],
        "seed": 0,
        "dtype": "float32",
        "recovery": None,
        "windows": None,
    }
    first = saved["steps"][0]
    assert list(first["scores"]) == ["attention.1", "attention.2", "attention.3", "mlp.1", "mlp.2", "mlp.3"]
    assert first["scores"]["attention.2"] == first["loss"]
    assert first["scores"]["mlp.1"] is None
    assert first["loss"]["n"] == 5
    assert saved["calibration"] == CALIBRATION
    assert (saved["stop_reason"], saved["evaluations"]) == ("the target is reached", 1 + 6 + 5 + 4)
    assert saved["work"]["mlp_tokens"] == 5 * 5 * 16  # five windows


def test_the_least_plan_written_by_hand_is_enough(tmp_path):
    plan = Plan.read(written(tmp_path, by_hand(["attention.3"])))
    assert plan.mask() == {Block("attention", 3)}
    plan.check(toy_outline(4), MODEL, "plan.json")


@given(st.lists(st.sampled_from(toy_outline(4).blocks), unique=True, min_size=1))
def test_the_first_steps_are_the_first_removals(blocks):
    plan = Plan.of(*map(Move.of, blocks))
    assert plan.mask() == frozenset(blocks)
    for first in range(1, len(blocks) + 1):
        assert plan.mask(first) == frozenset(blocks[:first])


def test_a_step_may_remove_several_blocks():
    plan = Plan.of(Move.parse("mlp.0+attention.1"), Move.parse("mlp.2"))
    assert plan.steps[0].remove == ("attention.1", "mlp.0")
    assert plan.mask(1) == parse_mask("attention.1+mlp.0")


@pytest.mark.parametrize("first", [-1, 0, 3])
def test_more_steps_than_there_are_cannot_be_asked_for(first):
    with pytest.raises(InputError) as error:
        Plan.of(Move.parse("mlp.0"), Move.parse("mlp.1")).mask(first)
    assert f"the first {first} steps" in error.value.what
    assert "1 to 2" in error.value.fix


def test_a_plan_that_is_not_nested_is_used_whole_or_not_at_all(tmp_path):
    plan = Plan.read(written(tmp_path, by_hand(["mlp.0"], ["mlp.1"], nested=False)))
    assert len(plan.mask()) == len(plan.mask(2)) == 2
    with pytest.raises(InputError, match="the first 1 of 2 steps are no plan"):
        plan.mask(1)


ESTIMATE = {"value": 1.0, "stderr": 0.1, "n": 4, "unit": "nats", "reason": None}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (by_hand(["attn.3"]), "steps.0.remove.0: 'attn.3' does not name a block"),
        (by_hand(["mlp.1"], ["attention"]), "steps.1.remove.0: 'attention' does not name a block"),
        (by_hand(["mlp.1"], []), "steps.1.remove: "),
        (by_hand(["mlp.1"], ["mlp.2", "mlp.1"]), "steps: mlp.1 is removed twice, by steps 0 and 1"),
        (by_hand(["mlp.1", "mlp.1"]), "steps: mlp.1 is removed twice, by steps 0 and 0"),
        (by_hand(["mlp.1"], ["mlp.01"]), "steps: mlp.1 is removed twice"),
        (by_hand([3]), "steps.0.remove.0: "),
        (by_hand(["mlp.1"], nestet=True), "nestet: "),
        (by_hand(["mlp.1"], nested="yes"), "nested: "),
        (by_hand(["mlp.1"], model={"name": "x"}), "model.model_type: "),
        ({"format": "blockpruner.plan", "version": 1}, "steps: "),
        ({**by_hand(), "steps": [{"remove": ["mlp.1"], "scores": {"mlp": ESTIMATE}}]}, "'mlp' does not name a block"),
        ({**by_hand(), "steps": [{"remove": ["mlp.1"], "loss": {**ESTIMATE, "value": "1"}}]}, "steps.0.loss.value: "),
        ({**by_hand(), "version": 2}, "version 2; this blockpruner reads up to 1"),
        ({**by_hand(), "format": "blockpruner.scores"}, "not a blockpruner.plan file"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(value, said, tmp_path):
    path = written(tmp_path, value)
    with pytest.raises(InputError) as error:
        Plan.read(path)
    assert str(path) in error.value.what
    assert said in error.value.what


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_loss_that_is_no_number_is_refused(number, searched, tmp_path):
    value = searched.model_dump(mode="json")
    text = json.dumps(value).replace(json.dumps(value["dense_loss"]["value"]), number, 1)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.read(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"format": "blockpruner.plan", "format"', "\ufeff{}", "[" * 9999])
def test_what_is_not_json_is_refused_with_its_place(text, tmp_path):
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.read(tmp_path / "plan.json")


def test_a_block_that_the_model_does_not_have_is_named():
    with pytest.raises(InputError, match=r"mine\.json names blocks this model does not have: mlp.4"):
        Plan.of(Move.parse("mlp.0"), Move.parse("mlp.4")).check(toy_outline(4), None, "mine.json")


def test_a_plan_of_another_model_is_refused_naming_both(searched):
    searched.check(toy_outline(4), MODEL.model_copy(update={"name": "renamed"}), "plan.json")
    other = ModelIdentity(name="other", model_type="llama", parameters=7, fingerprint="e" * 64)
    with pytest.raises(InputError) as error:
        searched.check(toy_outline(4), other, "plan.json")
    assert "plan.json was made for toy (toy, 3,200 parameters, fingerprint ffffffffffff)" in error.value.what
    assert "other (llama, 7 parameters" in error.value.what
    assert '"model"' in error.value.fix


def test_removal_lists_of_other_projects_are_plans(tmp_path):
    path = written(tmp_path, {"1": [["mha", 2]], "2": [["mha", 2], ["mlp", 0]]})
    assert [step.remove for step in Plan.read(path).steps] == [("attention.2",), ("mlp.0",)]
    path = written(tmp_path, {"num_hidden_layers": 4, "drop_attn_list": [3, 1], "drop_mlp_list": None})
    assert [step.remove for step in Plan.read(path).steps] == [("attention.3",), ("attention.1",)]
    path = written(tmp_path, [0, 1, 2, 3, 4, 5, 6])
    assert Plan.read(path, toy_outline(4)).mask() == parse_mask("mlp.3")


def test_a_foreign_file_of_unknown_form_is_named(tmp_path):
    path = written(tmp_path, {"layers": [1, 2]})
    with pytest.raises(InputError) as error:
        Plan.read(path)
    assert str(path) in error.value.what


def test_a_cut_plan_claims_nothing_of_the_search_that_went_further():
    plan = Plan.of(*(Move.of(Block("mlp", layer)) for layer in range(3)))
    plan = plan.model_copy(update={"stop_reason": "the target is reached", "evaluations": 10})
    cut = plan.cut(2)
    assert (cut.mask(), cut.stop_reason, cut.evaluations) == (plan.mask(2), None, None)
    with pytest.raises(InputError, match="the first 4 steps"):
        plan.cut(4)
