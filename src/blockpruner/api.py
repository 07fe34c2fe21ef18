"""The verbs of the command line as Python functions on models in memory; same words, same defaults."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner import scoring
from blockpruner.anatomy import read_anatomy
from blockpruner.blocks import Block, Mask, parse_mask
from blockpruner.calibration import TextOptions
from blockpruner.checkpoint import Form, Saved
from blockpruner.criterion import Criterion
from blockpruner.evaluation.quality import Evaluation, evaluate_masks, load_text
from blockpruner.hands import Crew
from blockpruner.mending import mend
from blockpruner.parts import Anatomy
from blockpruner.plan import Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.recovery import RecoveryRecord
from blockpruner.scores import ScoreTable
from blockpruner.scoring import compare
from blockpruner.searching import Progress
from blockpruner.subject import Subject, save_subject, subject_of


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
    objective: str
    moves: str
    protect: str
    seed: int


class RecoverOptions(TextOptions, total=False):
    """The options of `blockpruner recover`; see `mending.mend`."""

    held_out: str | None
    first: int | None
    force: bool
    seed: int


def inspect(model: PreTrainedModel) -> Anatomy:
    """Find and prove the blocks of `model`; see `anatomy.read_anatomy`."""
    return read_anatomy(model)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    target: str,
    calibration: str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
    **options: Unpack[SearchOptions],
) -> Plan:
    """Find which blocks of `model` to remove: the plan that `blockpruner search` with these options writes.

    run: a folder for the journal and the plan, from which the same call resumes; None keeps nothing.
    crew: workers that load `model` by its name, see `hands.Crew`; one that is in memory alone must be saved first.
    """
    task = prepare(_subject(model, tokenizer), target=target, calibration=calibration, **options)
    return find_plan(task, None if run is None else Path(run), progress, crew=crew)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    criteria: Sequence[str | Criterion],
    calibration: str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
    **options: Unpack[ScoreOptions],
) -> ScoreTable:
    """How important each move is, higher = keep: the scores that `blockpruner score` with these options writes.

    criteria: names with their options, or objects of your own that keep the promise of `criterion.Criterion`.
    crew: workers, as for `search`.
    """
    comparison = compare(_subject(model, tokenizer), criteria=criteria, calibration=calibration, **options)
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
    calibration: str,
    progress: Progress | None = None,
    **options: Unpack[RecoverOptions],
) -> tuple[Saved, RecoveryRecord]:
    """Like `save`, with something small where blocks were, as `method` makes it: what `blockpruner recover` writes.

    CheckFailedError, and no folder, if held-out text is worse off with it, unless `force`.
    """
    mended = mend(
        *(_subject(model, tokenizer), plan), method=method, calibration=calibration, progress=progress, **options
    )
    return mended.save(Path(out)), mended.record


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str,
    masks: Mapping[str, Iterable[Block]] | None = None,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Evaluation:
    """Quality of `model` on `data`, and of the model without each of `masks` (name -> blocks), in one sweep."""
    windows = load_text(data, tokenizer, model, seed=seed, **text)
    named = {"model": parse_mask("dense"), **{name: frozenset(mask) for name, mask in (masks or {}).items()}}
    return Evaluation.of(evaluate_masks(model, read_anatomy(model), windows, named), windows.record)


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Subject:
    """`model` under the name it was loaded by, with the folder it came from."""
    folder = Path(model.config.name_or_path or "")
    return subject_of(
        model,
        tokenizer,
        model.name_or_path or type(model).__name__,
        folder if model.config.name_or_path and folder.is_dir() else None,
    )
