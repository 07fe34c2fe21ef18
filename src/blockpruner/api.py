"""The verbs of the command line as Python functions on models in memory; same words, same defaults."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy import Anatomy, read_anatomy
from blockpruner.blocks import Block
from blockpruner.checkpoint import Form, Saved
from blockpruner.evaluation.quality import Evaluation, evaluate_masks, load_text
from blockpruner.pipeline import find_plan, prepare, save_subject, subject_of
from blockpruner.plan import Plan
from blockpruner.searching import Progress


def inspect(model: PreTrainedModel) -> Anatomy:
    """Find and prove the blocks of `model`; see `anatomy.read_anatomy`."""
    return read_anatomy(model)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: str,
    calibration: str,
    run: Path | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Find which blocks of `model` to remove: `blockpruner search` with the same options (`pipeline.prepare`).

    run: a folder for the journal and the plan, from which the same call resumes; None keeps nothing.
    """
    subject = subject_of(model, tokenizer, model.name_or_path or type(model).__name__)
    task = prepare(subject, target=target, calibration=calibration, **options)
    return find_plan(task, Path(run) if run else None, progress)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    out: Path | str,
    *,
    first: int | None = None,
    form: Form | None = None,
) -> Saved:
    """Write `model` without the blocks of `plan` to the new folder `out`, reloaded in a fresh process and compared."""
    subject = subject_of(model, tokenizer, model.name_or_path or type(model).__name__)
    plan.check(subject.anatomy.outline, subject.identity, "the plan")
    return save_subject(subject, plan, Path(out), first=first, form=form)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str,
    masks: Mapping[str, Iterable[Block]] | None = None,
    tokens: int = 16384,
    window: int = 2048,
    bos: str = "auto",
    seed: int = 0,
) -> Evaluation:
    """Quality of `model` on `data`, and of the model without each of `masks` (name -> blocks), in one sweep."""
    text = load_text(data, tokenizer, window=window, tokens=tokens, seed=seed, bos=bos)
    named = {"dense": frozenset[Block](), **{name: frozenset(mask) for name, mask in (masks or {}).items()}}
    found = evaluate_masks(model, read_anatomy(model), text, named)
    return Evaluation.of(found, text.record, str(model.dtype).removeprefix("torch."))
