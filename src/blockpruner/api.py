"""The verbs of the command line as Python functions on models in memory; same words, same defaults."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner import explaining, scoring
from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import run_folder
from blockpruner.blocks import Mask, parse_mask
from blockpruner.engine.hands import Crew
from blockpruner.errors import InputError
from blockpruner.evaluation import speed
from blockpruner.evaluation.assess import assess
from blockpruner.evaluation.assessment import Assessment, Contestant, Wanted
from blockpruner.evaluation.explanation import Explanation
from blockpruner.evaluation.quality import evaluate_masks
from blockpruner.evaluation.speed import Benchmark
from blockpruner.evaluation.suites import chosen_tasks
from blockpruner.evaluation.timing import parse_protocol
from blockpruner.frontier import WITHIN, Pareto, pareto_of
from blockpruner.importance.criterion import Criterion
from blockpruner.inquiry import CHEAP, inquire
from blockpruner.mending import mend
from blockpruner.plan import Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.repairs.recovery import RecoveryRecord
from blockpruner.scores import ScoreTable
from blockpruner.scoring import compare
from blockpruner.searching.contract import Progress
from blockpruner.subject import Subject, save_subject, subject_of
from blockpruner.surgery.checkpoint import Form, Saved
from blockpruner.surgery.removal import Removal, blocks_of
from blockpruner.texts.calibration import TextOptions


class ScoreOptions(TextOptions, total=False):
    """The options of `blockpruner score`; see `scoring.compare`."""

    objective: str
    moves: str
    protect: str
    removed: Mask
    seed: int


class SearchOptions(TextOptions, total=False):
    """The options of `blockpruner search`; see `planning.prepare`."""

    search: str
    criterion: str | Criterion
    objective: str
    moves: str
    protect: str
    start: Plan | None
    recovery: str | None
    device_spec: str | None
    seed: int


class RecoverOptions(TextOptions, total=False):
    """The options of `blockpruner recover`; see `mending.mend`."""

    first: int | None
    force: bool
    seed: int


def inspect(model: PreTrainedModel) -> Anatomy:
    """Find and prove the blocks of `model`; see `anatomy.reading`."""
    return read_anatomy(model)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    target: str,
    calibration: Path | str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    budget: int | None = None,
    crew: Crew | None = None,
    **options: Unpack[SearchOptions],
) -> Plan:
    """Find which blocks of `model` to remove: the plan that `blockpruner search` with these options writes.

    run: a folder for the journal and the plan, from which the same call resumes; None keeps nothing.
    budget: masks to evaluate at most, the whole model's included; what was found by then is the plan.
    crew: workers that load `model` by its name, see `hands.Crew`; one that is in memory alone must be saved first.
    """
    costs = None if run is None else Path(run) / "costs.json"
    task = prepare(_subject(model, tokenizer), target=target, calibration=str(calibration), costs=costs, **options)
    return find_plan(task, None if run is None else Path(run), progress, budget, crew)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    criteria: Sequence[str | Criterion],
    calibration: Path | str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
    **options: Unpack[ScoreOptions],
) -> ScoreTable:
    """How important each move is, higher = keep: the scores that `blockpruner score` with these options writes.

    criteria: names with their options, or objects of your own that keep the promise of `criterion.Criterion`.
    crew: workers, as for `search`.
    """
    comparison = compare(_subject(model, tokenizer), criteria=criteria, calibration=str(calibration), **options)
    return scoring.score(comparison, None if run is None else Path(run), progress, crew)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    out: Path | str,
    *,
    first: int | None = None,
    form: Form | None = None,
) -> Saved:
    """Write `model` without the blocks of `plan` to the new folder `out`, reloaded in a fresh process and compared.

    See `subject.save_subject`; saving stand-ins removes the blocks from `model` for good.
    """
    return save_subject(_subject(model, tokenizer), plan, Path(out), first=first, form=form)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    out: Path | str,
    *,
    method: str,
    calibration: Path | str,
    held_out: Path | str | None = None,
    run: Path | str | None = None,
    progress: Progress | None = None,
    **options: Unpack[RecoverOptions],
) -> tuple[Saved, RecoveryRecord]:
    """Like `save`, with quality won back as `method` does it: what `blockpruner recover` writes.

    method: one recovery, or several joined by commas. run: a folder for checkpoints of what is trained, from which the
    same call goes on; None keeps none. CheckFailedError, and no folder, if held-out text is worse off, unless `force`.
    """
    mended = mend(
        *(_subject(model, tokenizer), plan),
        method=method,
        calibration=str(calibration),
        held_out=None if held_out is None else str(held_out),
        run=None if run is None else Path(run),
        progress=progress,
        **options,
    )
    return mended.save(Path(out)), mended.record


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path | str | None = None,
    masks: Mapping[str, Removal] | None = None,
    protocol: str | None = None,
    suite: str | None = None,
    tasks: str | None = None,
    include_path: Path | str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 1,
    generate: bool = False,
    seed: int = 0,
    run: Path | str | None = None,
    progress: Progress | None = None,
    **text: Unpack[TextOptions],
) -> Assessment:
    """Quality of `model`, the reference, and of the model without each of `masks` (name -> what `skipped` takes).

    data: text, for which all are computed in one sweep; suite, tasks: of lm-eval; generate: what they write, on prompts
    from `data`. run: a folder for all results, from which the same call goes on. As `blockpruner evaluate` has them.
    """
    chosen, most = chosen_tasks(suite, tasks, shots, limit)
    tasks_of = None if include_path is None else Path(include_path)
    source = None if data is None else str(data)
    wanted = Wanted(source, text, seed, protocol, "", chosen, most, batch, tasks_of, generate)
    wanted.check()
    anatomy = read_anatomy(model)
    named = {"model": parse_mask("dense"), **_masks(model, anatomy, masks)}
    whole = Contestant(model, tokenizer, anatomy)
    windows = wanted.windows(whole)
    known = [] if windows is None else evaluate_masks(model, anatomy, windows, named, mean=wanted.mean)
    folder = _folder(model)
    with run_folder(Path(run), sources=[folder] if folder else []) if run is not None else nullcontext():
        return assess(
            list(named),
            lambda name: nullcontext(replace(whole, mask=named[name])),
            wanted,
            run=None if run is None else Path(run),
            progress=progress,
            found=known,
        )


def bench(
    model: PreTrainedModel,
    *,
    masks: Mapping[str, Removal] | None = None,
    protocol: str = "quick",
    limit: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Speed and memory of `model`, and of it without each of `masks` (name -> what `skipped` takes), in turns.

    protocol: a name with options, see `evaluation.timing`; limit: bytes that the largest batch and context are for.
    """
    subject, asked = _subject(model, None), parse_protocol(protocol)
    dense = speed.Contestant("model", subject)
    without = _masks(model, subject.anatomy, masks)
    others = [speed.Contestant(name, subject, mask) for name, mask in without.items()]
    cell = speed.measure([dense, *others], asked, limit=limit, progress=progress)
    return Benchmark.of(asked, subject, [cell], limit)


def pareto(model: PreTrainedModel, plans: Mapping[str, Plan], *, budget: float = WITHIN) -> Pareto:
    """Quality, as the searches saw it, against size, cache and operations, over all depths of `plans` (by name)."""
    return pareto_of(_subject(model, None), plans, budget=budget)


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    *,
    calibration: Path | str = "builtin",
    criteria: Sequence[str] = CHEAP,
    folder: Path | str | None = None,
    run: Path | str | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Explanation:
    """Why each block of `plan` went: the explanation that `blockpruner explain` writes; see `inquiry.inquire`.

    folder: of the run that found the plan, whose journal has the losses of pairs; run: where explanation.json goes.
    """
    asked = inquire(
        *(_subject(model, tokenizer), plan),
        calibration=str(calibration),
        criteria=criteria,
        folder=None if folder is None else Path(folder),
        seed=seed,
        **text,
    )
    return explaining.explain(asked, None if run is None else Path(run), progress)


def _masks(model: PreTrainedModel, anatomy: Anatomy, masks: Mapping[str, Removal] | None) -> dict[str, Mask]:
    if "model" in (masks or {}):
        raise InputError("'model' is the whole model, and a mask is called so too", fix="give the mask another name")
    found = {name: frozenset(blocks_of(model, anatomy, removal)) for name, removal in (masks or {}).items()}
    for name, mask in found.items():
        anatomy.outline.check(mask, f"the mask {name!r}")
    return found


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Subject:
    """`model` under the name it was loaded by, with the folder it came from."""
    return subject_of(model, tokenizer, model.name_or_path or type(model).__name__, _folder(model))


def _folder(model: PreTrainedModel) -> Path | None:
    """The folder that `model` was loaded from, if it was one."""
    folder = Path(model.config.name_or_path or "")
    return folder if model.config.name_or_path and folder.is_dir() else None
