"""The story of a pruned model, start reading here: a recipe, a model, and what comes of them."""

import logging
import shutil
from pathlib import Path

from blockpruner.artifacts import Work, check_new_folder
from blockpruner.contestants import at_random, measured, recovered
from blockpruner.data import Data, read_data
from blockpruner.engine.hands import Crew
from blockpruner.engine.limits import context
from blockpruner.errors import InputError, RunFolderError
from blockpruner.mending import Mended, mend
from blockpruner.objectives import OBJECTIVES, in_full
from blockpruner.outcome import Outcome
from blockpruner.plan import Plan
from blockpruner.planning import Task, prepare
from blockpruner.price import Price, search_for
from blockpruner.recipe import Recipe
from blockpruner.registry import format_method
from blockpruner.searching.contract import DENSE, Progress, Stop
from blockpruner.subject import Subject, save_subject
from blockpruner.surgery.checkpoint import Saved
from blockpruner.texts.overlap import SEEN, share_known, tokens_of, told_share

_log = logging.getLogger("blockpruner")

MARK = "recipe.json"  # what a run writes into a model last, so that it knows the model for its own


def run(
    recipe: Recipe,
    task: Task,
    said: Price,
    folder: Path,
    *,
    save: bool = True,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> tuple[Outcome, Plan, Saved | None]:
    """Search, measure the smaller model, save it; all that is needed to do it again is left in the run folder.

    A recipe with a recovery has it fitted again to what was found; where held-out text agrees, that is what is saved.

    recipe.json, journal.jsonl, price.json, plan.json, outcome.json and model/; killed, the same call goes on.
    task, said: the search of the recipe, see `prepared`, and its price; crew: workers for it.
    KeyboardInterrupt after a Ctrl-C in the search, of which plan.json has what was found by then; RunFolderError where
    the model is to be saved and something else is.
    """
    subject, out, held_out = task.subject, folder / "model", judge(recipe, task)
    plan, _ = search_for(task, said, folder, progress, crew=crew)
    if plan.stop_reason == Stop.INTERRUPTED:
        raise KeyboardInterrupt
    missing = save and cleared(out, plan)
    recipe.save(folder / "recipe.json")
    masks = {"dense": DENSE, "pruned": plan.mask(), **at_random(task, plan)}
    contestants = measured(task, held_out, masks)
    mended = None if recipe.recovery is None else remade(recipe, subject, plan, progress)
    if mended is not None:
        contestants["recovered"] = recovered(task, held_out, mended)
        seen = share_known(mended.record.seen, tokens_of(held_out.examples))
        if seen and seen.value >= SEEN:
            _log.warning("%s of the text to measure on was fitted on, or chose the recovery", told_share(seen))
    outcome = Outcome(
        format=Outcome.FORMAT,
        version=Outcome.VERSION,
        recipe=recipe,
        model=subject.identity,
        objective=format_method(in_full(task.objective.measure), OBJECTIVES),
        data=held_out.record,
        work=plan.work or Work(),
        contestants=contestants,
    )
    outcome.save(folder / "outcome.json")
    if not missing:
        return outcome, plan, None
    saved = save_subject(subject, plan, out) if mended is None else mended.save(out)
    recipe.save(out / MARK)
    return outcome, plan, saved


def judge(recipe: Recipe, task: Task) -> Data:
    """What the result is measured on, in windows that the model can read."""
    text, longest = recipe.evaluation, context(task.subject.model)
    if text.window and longest and text.window > longest:
        _log.warning("measured in windows of %d tokens, the model's context, instead of %d", longest, text.window)
        text = text.model_copy(update={"window": longest})
    return read_data(task.subject, text.source, task.objective.measure, seed=recipe.seed, **text.options())


def cleared(out: Path, plan: Plan) -> bool:
    """Whether the model of `plan` is still to be made at `out`; one of another plan goes, if a run made it.

    RunFolderError for what a run did not make, or what was changed since.
    """
    if (out / "plan.json").is_file() and Plan.read(out / "plan.json") == plan:
        return False
    if not out.is_symlink() and _untouched(out):
        shutil.rmtree(out)
    try:
        check_new_folder(out)
    except InputError as error:
        what = f"{out} is not the model of this plan, and was not made by `run`, or was changed since"
        raise RunFolderError(what, fix="move it away, and run the same command again") from error
    return True


def _untouched(model: Path) -> bool:
    """Whether a run made it, and no file there has come or changed since."""
    mark = model / MARK
    return mark.is_file() and all(file.lstat().st_ctime_ns <= mark.stat().st_ctime_ns for file in model.rglob("*"))


def prepared(recipe: Recipe, subject: Subject, folder: Path, progress: Progress | None = None) -> Task:
    """The search of a recipe, ready to run; a target of speed goes by the times in the run folder, if it has some."""
    words = {"search", "criterion", "objective", "moves", "protect", "target", "recovery", "seed"}
    methods = recipe.model_dump(include=words)
    text = recipe.calibration
    costs = folder / "costs.json"
    return prepare(subject, calibration=text.source, costs=costs, progress=progress, **methods, **text.options())


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
