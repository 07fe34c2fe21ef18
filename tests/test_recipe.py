"""Recipes: each runs from end to end by its name, says what it is and how it differs, and can be repeated."""

import json
import tomllib

import pytest
import torch
import zoo
from tiny import token_ids

from blockpruner import pipeline, recipe
from blockpruner.blocks import parse_mask
from blockpruner.criteria import parse_criterion
from blockpruner.errors import InputError
from blockpruner.loading.models import load
from blockpruner.objectives import parse_objective
from blockpruner.outcome import Outcome
from blockpruner.plan import Plan
from blockpruner.price import quote
from blockpruner.recipe import Recipe
from blockpruner.searches import parse_search
from blockpruner.searching.moves import Target
from blockpruner.subject import open_subject

NAMES = recipe.names()
# What the issue of a recipe is: named in the README, so none may get lost.
EXPECTED = """
    blockpruner blockpruner-attention blockpruner-mlp blockpruner-no-iteration shortgpt sleb
    llm-drop-block llm-drop-attention llm-drop-mlp llm-drop-joint
    shortened-llama-ppl shortened-llama-taylor shortened-llama-magnitude
    deeper-look-cosine deeper-look-shapley deeper-look-task-shapley gromov evopress replaceable
"""
# Targets for a model of four layers: what a recipe removes by default is meant for thirty-two.
SMALL = {"layer": "layers=1", "block": "blocks=2", "attention": "blocks=2", "mlp": "blocks=2"}


@pytest.fixture(scope="module")
def subject(checkpoint):
    return open_subject(load(str(checkpoint), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    words = ["cat", "dog", "fox", "layer", "block", "stack"]
    pairs = zip(words, words[::-1], strict=True)
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    records = [{"context": f"The quick {a}", "choices": [b, a], "gold": i % 2} for i, (a, b) in enumerate(pairs)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scaled(name, prose, items):
    """The recipe on local data and for a model of four layers."""
    found = Recipe.read(name)
    if found.protect == "plus":  # of four layers nothing would be left
        found = found.model_copy(update={"protect": "0,-1"})
    if found.search.startswith("evolution"):
        found = found.model_copy(update={"search": found.search + ",offspring=4,initial=4,generations=3"})
    if found.recovery:  # the rank is meant for wider ones
        found = found.model_copy(update={"recovery": "linear:rank=2,ridge=0.1"})
    source = str(items if found.objective == "accuracy" else prose)
    size = {} if found.objective == "accuracy" else {"tokens": 96, "window": 16}
    changed = found.changed(source, source, target=SMALL[found.moves], **size)
    return changed.model_copy(update={"evaluation": changed.evaluation.model_copy(update={"tokens": 64, "window": 16})})


def run(chosen, subject, folder, **options):
    """What the command does."""
    task = pipeline.prepared(chosen, subject, folder)
    return pipeline.run(chosen, task, quote(task), folder, **options)


def test_the_recipes_are_those_that_are_promised():
    assert sorted(EXPECTED.split()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_repeats_and_uses_words_that_there_are(name):
    found = Recipe.read(name)
    assert "arXiv" in found.paper
    assert found.differences
    parse_search(found.search)
    parse_criterion(found.criterion or "cosine")
    parse_objective(found.objective)
    Target.parse(found.target)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_from_a_model_to_a_smaller_one(name, subject, checkpoint, prose, items, tmp_path):
    chosen, save = scaled(name, prose, items), name in ("blockpruner", "sleb", "replaceable")
    if save:  # which may take the blocks out of the model for good
        subject = open_subject(load(str(checkpoint), dtype="float32", device="cpu"))
    outcome, plan, saved = run(chosen, subject, tmp_path / "run", save=save)
    assert Outcome.load(tmp_path / "run" / "outcome.json") == outcome
    assert Recipe.load(tmp_path / "run" / "recipe.json") == chosen
    assert Plan.load(tmp_path / "run" / "plan.json") == plan
    assert len(plan.mask()) == 2
    more = ["recovered"] if (tmp_path / "run" / "model" / "recovery.json").exists() else []
    assert list(outcome.contestants) == ["dense", "pruned", *(f"random {seed}" for seed in range(5)), *more]
    assert bool(more) == bool(chosen.recovery)
    assert parse_mask(outcome.contestants["pruned"].removed) == plan.mask()
    assert outcome.contestants["pruned"].parameters < outcome.contestants["dense"].parameters
    kinds = {block.kind for block in plan.mask()}
    assert chosen.moves in ("block", "layer") or kinds == {chosen.moves}
    if saved:
        assert saved.difference <= 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_who_measures_on_text_that_the_recovery_was_fitted_on_is_told(shared, subject, prose, items, tmp_path, caplog):
    """Windows of 32 tokens, so that runs fit in; the text repeats itself by chance only."""
    chosen = scaled("replaceable", prose, items)
    words = prose.read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text(words[len(words) // 2 :], encoding="utf-8")
    (tmp_path / "first.txt").write_text(words[: len(words) // 2], encoding="utf-8")
    first, other = str(tmp_path / "first.txt"), str(tmp_path / "other.txt")
    size = {"tokens": 384, "window": 32}
    chosen = chosen.model_copy(
        update={
            "calibration": chosen.calibration.model_copy(update={"source": first, **size}),
            "evaluation": chosen.evaluation.model_copy(update={"source": first if shared else other, **size}),
        }
    )
    outcome, *_ = run(chosen, subject, tmp_path / "run", save=False)
    assert "recovered" in outcome.contestants
    assert ("of the text to measure on was fitted on, or chose the recovery" in caplog.text) == shared


def test_run_again_a_recipe_ends_in_the_same_files(subject, prose, items, tmp_path):
    chosen = scaled("blockpruner", prose, items)
    files = []
    for _ in range(2):
        run(chosen, subject, tmp_path / "run", save=False)
        found = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
        assert found.pop("price.json")  # which has the seconds that were spent
        files.append(found)
    assert files[0].keys() == {"recipe.json", "journal.jsonl", "plan.json", "outcome.json"}
    assert files[0] == files[1]
    run(Recipe.load(tmp_path / "run" / "recipe.json"), subject, tmp_path / "other", save=False)
    assert (tmp_path / "other" / "outcome.json").read_bytes() == files[0]["outcome.json"]


@pytest.mark.parametrize(
    ("name", "said"), [("blockprunner", "did you mean 'blockpruner'"), ("none.toml", "choose one of")]
)
def test_a_recipe_that_there_is_not_is_refused_with_those_that_are(name, said):
    with pytest.raises(InputError) as error:
        Recipe.read(name)
    assert said in error.value.fix


def test_a_recipe_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('title = "Mine"\npaper = "none"\ntarget = "blocks=2"\n[calibration]\nsource = "builtin"\n')
    found = Recipe.read(str(path))
    assert (found.title, found.search, found.calibration.tokens) == ("Mine", "exhaustive", 16384)
    path.write_text("title = ")
    with pytest.raises(InputError, match=r"mine.toml is not TOML"):
        Recipe.read(str(path))
    path.write_text('title = "Mine"\npapr = "none"\n')
    with pytest.raises(InputError, match=r"mine.toml: \w+"):
        Recipe.read(str(path))


def test_settings_given_by_hand_take_the_place_of_the_papers():
    found = Recipe.read("llm-drop-attention")
    changed = found.changed("mine.txt", target="blocks=3", tokens=0, window=256, seed=4)
    assert (changed.target, changed.seed) == ("blocks=3", 4)
    assert changed.calibration.source == "mine.txt"
    assert (changed.calibration.split, changed.calibration.options()["tokens"]) == (None, None)
    assert found.changed() == found
    assert (
        tomllib.loads((recipe.SHELF / "evopress.toml").read_text())["search"]
        == "evolution:equal=true,first=1,second=16"
    )


ENCODERS = ["masked/bert", "masked/roberta", "seq2seq/t5", "seq2seq/bart"]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("search", ["exhaustive", "one-shot", "beam:width=2", "swap:rounds=1"])
def test_encoders_and_encoder_decoders_go_through_the_same_searches(name, search):
    from blockpruner.anatomy.reading import read_anatomy
    from blockpruner.engine.objective import ModelObjective
    from blockpruner.importance.criterion import Lab
    from blockpruner.searching import driver
    from blockpruner.searching.contract import Problem
    from blockpruner.texts.examples import Signs, examples_of

    model = zoo.build(name)
    anatomy = read_anatomy(model)
    signs = Signs(last=6, sentinels=(120, 121)) if name.endswith("t5") else Signs(first=5, last=6, mask=7)
    examples = examples_of(model, token_ids(2, 16), signs)
    objective = ModelObjective(model, anatomy, examples)
    problem = Problem(anatomy.outline, "block", Target.parse("blocks=2"), sizes=objective.sizes)
    cosine = parse_criterion("cosine")

    def scorer(evaluations):
        return lambda mask, moves: cosine.scores(Lab(model, anatomy, examples, evaluations, mask=mask), moves)

    result = driver.run(parse_search(search), problem, objective, scorer=scorer)
    mask = frozenset().union(*(step.move.blocks for step in result.steps))
    assert len(mask) == 2
    assert result.steps[-1].loss is not None
    with torch.no_grad():
        losses = [
            value for batch in range(objective.batches) for value in next(iter(objective.batch_losses([mask], batch)))
        ]
    assert result.steps[-1].loss.value == pytest.approx(sum(losses) / len(losses))
