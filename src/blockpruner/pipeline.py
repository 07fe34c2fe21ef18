"""The story of a pruned model, start reading here: a recipe, a model, and what comes of them."""

from pathlib import Path

from blockpruner.artifacts import Work
from blockpruner.contestants import at_random, measured, recovered
from blockpruner.data import read_data
from blockpruner.engine.hands import Crew
from blockpruner.mending import Mended, mend
from blockpruner.objectives import OBJECTIVES
from blockpruner.outcome import Outcome
from blockpruner.plan import Plan
from blockpruner.planning import Task, find_plan, prepare
from blockpruner.recipe import Recipe
from blockpruner.registry import format_method
from blockpruner.searching.contract import DENSE, Progress
from blockpruner.subject import Subject, save_subject
from blockpruner.surgery.checkpoint import Saved


def run(
    recipe: Recipe,
    subject: Subject,
    folder: Path,
    *,
    save: bool = True,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> tuple[Outcome, Plan, Saved | None]:
    """Search, save the smaller model, measure it; all that is needed to do it again is left in the run folder.

    A recipe with a recovery has it fitted again to what was found; where held-out text agrees, that is what is saved.

    recipe.json, journal.jsonl, plan.json, model/ and outcome.json; killed, the same call goes on.
    crew: workers for the search.
    """
    task = prepared(recipe, subject)
    plan = find_plan(task, folder, progress, crew=crew)
    recipe.save(folder / "recipe.json")
    masks = {"dense": DENSE, "pruned": plan.mask(), **at_random(task)}
    held_out = read_data(
        subject, recipe.evaluation.source, task.objective.measure, seed=recipe.seed, **recipe.evaluation.options()
    )
    contestants = measured(task, held_out, masks)
    mended = None if recipe.recovery is None else remade(recipe, subject, plan, progress)
    if mended is not None:
        contestants["recovered"] = recovered(task, held_out, mended)
    outcome = Outcome(
        format=Outcome.FORMAT,
        version=Outcome.VERSION,
        recipe=recipe,
        model=subject.identity,
        objective=format_method(task.objective.measure, OBJECTIVES),
        data=held_out.record,
        work=plan.work or Work(),
        contestants=contestants,
    )
    outcome.save(folder / "outcome.json")
    out = folder / "model"
    if not save or out.exists():
        return outcome, plan, None
    return outcome, plan, save_subject(subject, plan, out) if mended is None else mended.save(out)


def prepared(recipe: Recipe, subject: Subject) -> Task:
    """The search of a recipe, ready to run."""
    words = {"search", "criterion", "objective", "moves", "protect", "target", "recovery", "seed"}
    methods = recipe.model_dump(include=words)
    text = recipe.calibration
    return prepare(subject, calibration=text.source, **methods, **text.options())


def remade(recipe: Recipe, subject: Subject, plan: Plan, progress: Progress | None) -> Mended | None:
    """The recovery of a recipe on the pruned model's own states; None where held-out text is worse off with it."""
    text, method = recipe.calibration, recipe.recovery or ""
    found = mend(
        subject,
        plan,
        method=method,
        calibration=text.source,
        seed=recipe.seed,
        progress=progress,
        **text.options(),
    )
    return found if found.record.applied and found.repair.replacements else None
