"""Criteria on one harness: what every one promises, on every kind of model, and what a run of several leaves."""

import copy
import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from tiny import token_ids

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Estimate
from blockpruner.blocks import Move
from blockpruner.criteria import CRITERIA, parse_criterion
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError, RunFolderError
from blockpruner.importance.criterion import Lab
from blockpruner.importance.ranking import ranks, spearman
from blockpruner.loading.models import load
from blockpruner.planning import check_words
from blockpruner.registry import format_method
from blockpruner.scores import Recorded, ScoreTable, least_first
from blockpruner.scoring import compare, score
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.moves import offered
from blockpruner.subject import open_subject, subject_of
from blockpruner.texts.examples import Signs, examples_of

# Cheap settings of those that sample or learn.
QUICK = {"shapley": "shapley:permutations=8", "gates": "gates:steps=40", "coalitions": "coalitions:draws=40"}
NAMES = [QUICK.get(name, name) for name in CRITERIA]
BASELINES = ("random", "deepest")


@pytest.fixture(scope="module")
def subject(checkpoint):
    return open_subject(load(str(checkpoint), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def planted(subject):
    """Makes copies of the subject in which all weights of these modules are zero."""

    def make(*paths):
        model = copy.deepcopy(subject.model)
        for path in paths:
            for parameter in model.get_submodule(path).parameters():
                torch.nn.init.zeros_(parameter)
        return subject_of(model, subject.given_tokenizer, "planted")

    return make


@pytest.fixture
def compared(subject, prose):
    def make(*criteria, **options):
        given = {"calibration": str(prose), "tokens": 128, "window": 16, **options}
        return compare(given.pop("subject", subject), criteria=criteria, **given)

    return make


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_a_frozen_dataclass_that_says_what_it_is(name):
    criterion = CRITERIA[name]
    assert dataclasses.is_dataclass(criterion)
    assert criterion.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field in ("title", "source", "needs", "passes", "moves"):
        assert isinstance(getattr(criterion, field), str), field
        assert getattr(criterion, field), field
    assert parse_criterion(format_method(criterion(), CRITERIA)) == criterion()


SIGNS = {"seq2seq/t5": Signs(last=6, sentinels=(120, 121, 122)), "masked/bert": Signs(first=5, last=6, mask=7)}


@functools.cache
def zoo_lab(name):
    model = zoo.build(name)
    anatomy = read_anatomy(model)
    examples = examples_of(model, token_ids(4, 20), SIGNS.get(name, Signs()))
    return Lab(model, anatomy, examples, Evaluations(ModelObjective(model, anatomy, examples, batch_tokens=40)))


@pytest.mark.parametrize("moves", ["block", "layer"])
@pytest.mark.parametrize("model", ["causal/gpt2", "masked/bert", "seq2seq/t5", "causal/mixtral", "causal/falcon_h1"])
@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_scores_every_move_of_every_kind_of_model(name, model, moves):
    lab, criterion = zoo_lab(model), parse_criterion(name)
    found = offered(moves, lab.anatomy.outline, frozenset(), frozenset())
    before = {key: value.clone() for key, value in lab.model.state_dict().items()}
    scores = criterion.scores(lab, found)
    assert list(scores) == list(found)
    for move, estimate in scores.items():
        assert estimate is not None, move
        assert (estimate.stderr is None) == (estimate.reason is not None), move
    assert len({estimate.value for estimate in scores.values() if estimate}) > 1
    assert criterion.scores(lab, found) == scores, "the same a second time"
    assert criterion.cost(lab, found) >= 0
    after = lab.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in lab.model.parameters())


def assert_least(move, found):
    """It comes first; by true Shapley values it is a null player, which only harmful blocks can come before."""
    if found.criterion.startswith("shapley"):
        assert abs(found.scores[move].value) < 1e-6
        assert all(score.value < 1e-6 for text, score in found.scores.items() if text in before(move, found))
    else:
        assert found.least_first[0] == move


def before(move, found):
    return found.least_first[: found.least_first.index(move)]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BASELINES])
def test_a_block_that_does_nothing_is_the_least_important(name, compared, planted):
    layer = "model.layers.1"
    dead = planted(f"{layer}.self_attn", f"{layer}.input_layernorm")
    assert_least("attention.1", score(compared(name, subject=dead)).criteria[0])
    assert_least("attention.1+mlp.1", score(compared(name, subject=planted(layer), moves="layer")).criteria[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name.partition(":")[0] not in ("coalitions", "gates")])
def test_scores_are_those_on_top_of_what_is_gone(name, compared, subject):
    removed = frozenset(Move.parse("attention.0+mlp.2").blocks)
    table = score(compared(name, removed=removed))
    moves = [Move.parse(text) for text in table.criteria[0].scores]
    assert not any(move.blocks & removed for move in moves)
    assert len(moves) == 6
    assert table.removed == ("attention.0", "mlp.2")


def test_a_criterion_may_be_compared_with_itself_under_other_options(compared, tmp_path):
    table = score(compared("update-norm:p=1", "update-norm:p=2", "random:seed=1", "random:seed=2"), tmp_path)
    assert len({one.criterion for one in table.criteria}) == 4


def test_what_does_not_fit_is_said_before_anything_is_spent_or_left_out_if_asked(compared, tmp_path, caplog):
    with pytest.raises(InputError, match="share"):
        score(compared("cosine", "shapley", moves="span=2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    table = score(compared("cosine", "shapley", moves="span=2", whatever_fits=True))
    assert [one.criterion for one in table.criteria] == ["cosine:residual=True"]
    assert "left out: shapley" in caplog.text
    with pytest.raises(InputError, match=r"blocks this model does not have: mlp\.99"):
        compared("cosine", removed=frozenset(Move.parse("mlp.99").blocks))


def test_the_baselines_look_at_nothing_but_their_seed_and_the_depth(compared):
    table = score(compared("deepest", "random:seed=1", "random:seed=2", "random:seed=1"))
    deepest, first, second, again = (one.least_first for one in table.criteria)
    assert deepest[:2] == ("mlp.3", "attention.3")
    assert first == again != second


def test_several_criteria_make_one_table_that_is_read_back_and_says_how_they_agree(compared, tmp_path):
    table = score(compared("cosine", "magnitude", "deepest"), tmp_path / "run")
    assert ScoreTable.load(tmp_path / "run" / "scores.json") == table
    assert (table.objective, table.moves, table.question) == ("loss", "block", "next token")
    agreement = table.agreement()
    assert agreement["deepest"]["deepest"] == pytest.approx(1.0)
    cosine, depth = ([s.value for s in table.criteria[i].scores.values() if s] for i in (0, 2))
    assert agreement["cosine:residual=True"]["deepest"] == spearman(cosine, depth)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_killed_ends_in_the_same_bytes(name, compared, tmp_path):
    score(compared(name), tmp_path / "whole")
    (journal,) = (path.name for path in (tmp_path / "whole").glob("*.jsonl"))
    lines = (tmp_path / "whole" / journal).read_bytes().splitlines(keepends=True)
    for kept in {1, len(lines) // 2, len(lines) - 1, len(lines)} - {0}:
        (tmp_path / f"cut{kept}").mkdir()
        (tmp_path / f"cut{kept}" / journal).write_bytes(b"".join(lines[:kept]))
        score(compared(name), tmp_path / f"cut{kept}")
        for file in (journal, "scores.json"):
            assert (tmp_path / f"cut{kept}" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), kept


def test_a_run_folder_of_other_inputs_is_not_mixed_up(compared, tmp_path):
    score(compared("cosine"), tmp_path)
    score(compared("cosine:residual=false"), tmp_path)  # has a journal of its own
    with pytest.raises(RunFolderError, match="moves: block -> layer"):
        score(compared("cosine", moves="layer"), tmp_path)


def test_protecting_the_ends_works_with_every_criterion(compared):
    table = score(compared("deepest", protect="0,-1"))
    layers = {block.layer for text in table.criteria[0].scores for block in Move.parse(text).blocks}
    assert layers == {1, 2}
    with pytest.raises(InputError, match="every one touches a protected layer"):
        compared("deepest", protect="plus")


def test_spans_are_moves_where_a_state_before_and_after_is_enough(compared):
    table = score(compared("angular:tokens=last", "leave-one-out", moves="span=2"))
    expected = [{f"{kind}.{layer}" for layer in (i, i + 1) for kind in ("attention", "mlp")} for i in range(3)]
    assert [set(text.split("+")) for text in table.criteria[0].scores] == expected
    with pytest.raises(InputError, match="attention"):
        score(compared("shapley", moves="span=2"))


def test_a_task_is_data_as_well(compared, tmp_path):
    words = ["cat", "dog", "fox", "layer", "block", "stack"]
    records = [
        {"context": f"The quick brown {a}", "choices": [b, a], "gold": i % 2}
        for i, (a, b) in enumerate(zip(words, words[::-1], strict=True))
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = score(compared("leave-one-out", "coalitions:draws=20", calibration=str(path), objective="accuracy"))
    assert table.question == "choices"
    assert table.calibration is not None
    assert table.calibration["documents"] == 6
    values = [estimate.value for estimate in table.criteria[0].scores.values() if estimate]
    assert all(round(value * 6, 6).is_integer() for value in values)


VALUES = st.lists(st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float), min_size=2, max_size=12)


@given(VALUES)
def test_ranks_are_places_and_equals_share_theirs(values):
    found = ranks(values)
    assert sum(found) == pytest.approx(len(values) * (len(values) + 1) / 2)
    for value, place in zip(values, found, strict=True):
        below, equal = sum(other < value for other in values), values.count(value)
        assert place == below + (equal + 1) / 2


@given(VALUES)
def test_rankings_agree_with_themselves_and_disagree_with_their_reverse(values):
    assert spearman(values, values) == pytest.approx(1)
    assert len(set(values)) == 1 or spearman(values, [-value for value in values]) == pytest.approx(-1)


def test_moves_without_a_score_come_last_and_equals_as_they_were_given():
    moves = [Move.parse(f"mlp.{i}") for i in range(4)]
    values = [None, 2.0, 1.0, 2.0]
    scores = {
        m: None if v is None else Estimate(value=v, stderr=None, n=1, unit="")
        for m, v in zip(moves, values, strict=True)
    }
    assert least_first(scores) == [moves[2], moves[1], moves[3], moves[0]]


def test_the_example_of_an_own_criterion_runs(checkpoint, prose, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "examples" / "own_criterion.py"
    spec = importlib.util.spec_from_file_location("own_criterion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "own_criterion", module)
    spec.loader.exec_module(module)
    words = ["--model", str(checkpoint), "--calibration", str(prose), "--tokens", "48"]
    monkeypatch.setattr("sys.argv", ["own_criterion.py", *words])
    module.main()
    own, ours = capsys.readouterr().out.splitlines()
    first = {"attention.2", "attention.3", "mlp.3"}  # held at zero; gone already, so that nothing is lost with them
    assert first < set(own.removeprefix("WithoutTheLast:layers=1: ").removesuffix(" first").split(", "))
    assert ours.startswith("leave-one-out: ")


def test_one_of_several_criteria_in_a_file_is_named_by_its_name_with_or_without_options(compared, subject, tmp_path):
    table = score(compared("deepest", "random", "random:seed=7"), tmp_path / "run")
    path = tmp_path / "run" / "scores.json"
    deepest, _, last = table.criteria
    assert Recorded.read(path, subject.identity, "deepest").known == deepest
    assert Recorded.read(path, subject.identity, "random:seed=7").known == last
    for name, which in ((None, "several criteria"), ("random", "several 'random'"), ("cosine", "no 'cosine'")):
        with pytest.raises(InputError, match=f"has scores of {which}: deepest, random:seed=0, random:seed=7") as said:
            Recorded.read(path, subject.identity, name)
        assert said.value.fix == f"name one of them: {path}:deepest"
    with pytest.raises(InputError, match="has scores of no 'cosine'"):
        check_words(target="blocks=1", search="one-shot", criterion=f"{path}:cosine")
    check_words(target="blocks=1", search="one-shot", criterion=f"{path}:deepest")
