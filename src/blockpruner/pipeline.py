"""The story of a pruned model, start reading here: a recipe, a model, and what comes of them."""

from collections.abc import Mapping
from pathlib import Path

from blockpruner.anatomy.parts import Layer, layer_stand_ins
from blockpruner.artifacts import Work
from blockpruner.blocks import Mask, format_mask
from blockpruner.data import Data, read_data
from blockpruner.engine.hands import Crew
from blockpruner.mending import Mended, mend
from blockpruner.objectives import OBJECTIVES
from blockpruner.outcome import Contestant, Outcome
from blockpruner.plan import Plan
from blockpruner.planning import Task, find_plan, prepare
from blockpruner.recipe import Recipe
from blockpruner.registry import format_method
from blockpruner.searches.random import Random
from blockpruner.searching import driver
from blockpruner.searching.contract import DENSE, Progress
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.standin import Replacement
from blockpruner.subject import Subject, save_subject
from blockpruner.surgery.checkpoint import Saved

RANDOMS = 5


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


def recovered(task: Task, data: Data, mended: Mended) -> Contestant:
    """What the recovered model is worth by the objective of the task on other data."""
    subject, mask, repair = mended.subject, mended.plan.mask(), mended.repair

    def filling(layer: Layer, removed: Mask) -> dict[str, Replacement]:
        return {
            path: repair.replacements[path] for path in layer_stand_ins(layer, removed) if path in repair.replacements
        }

    losses = Evaluations(data.objective(subject, task.objective.measure, filling)).losses([mask], "measuring")
    left = subject.identity.parameters - subject.anatomy.outline.removed_parameters(mask)
    return Contestant(removed=format_mask(mask), parameters=left + repair.added_parameters, loss=losses[mask])


def at_random(task: Task) -> dict[str, Mask]:
    """Masks that reach the same target by the same kind of moves at random."""
    free = Rehearsal(task.objective)
    results = {seed: driver.run(Random(seed), task.problem, free) for seed in range(RANDOMS)}
    return {
        f"random {seed}": frozenset().union(*(step.move.blocks for step in result.steps))
        for seed, result in results.items()
    }


def measured(task: Task, data: Data, masks: Mapping[str, Mask]) -> dict[str, Contestant]:
    """The loss of the model without each mask, by the objective of the task on other data."""
    subject, outline = task.subject, task.subject.anatomy.outline
    objective = data.objective(subject, task.objective.measure)
    losses = Evaluations(objective).losses(masks.values(), "measuring")
    return {
        name: Contestant(
            removed=format_mask(mask),
            parameters=subject.identity.parameters - outline.removed_parameters(mask),
            loss=losses[mask],
        )
        for name, mask in masks.items()
    }
