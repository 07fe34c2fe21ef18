"""Why each block of a plan went: what is in the run folder already is read, the rest is found on a little text."""

import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from blockpruner.artifacts import run_folder
from blockpruner.blocks import Mask, Move
from blockpruner.criteria import CRITERIA
from blockpruner.data import identity
from blockpruner.evaluation.explanation import ClassEffect, Explanation, StepExplanation
from blockpruner.evaluation.interactions import partners
from blockpruner.evaluation.stream_account import stream_account
from blockpruner.evaluation.token_classes import DEFINITIONS, TokenClass, effects, token_classes
from blockpruner.evidence import choice, place
from blockpruner.importance.criterion import Criterion, Lab
from blockpruner.inquiry import Inquiry
from blockpruner.journal import Journal
from blockpruner.registry import format_method
from blockpruner.scores import CriterionScores
from blockpruner.searching.contract import DENSE, Progress
from blockpruner.searching.evaluations import Evaluations
from blockpruner.texts.examples import IGNORED


def explain(inquiry: Inquiry, run: Path | None = None, progress: Progress | None = None) -> Explanation:
    """Find all that is asked for, and leave explanation.json in the run folder; killed, the same call goes on there."""
    subject = inquiry.subject
    with ExitStack() as held:
        sources = [subject.folder] if subject.folder else []
        folder = held.enter_context(run_folder(run, sources=sources)) if run else None
        journal = None
        if folder:
            depends = identity(subject, inquiry.data, inquiry.objective, inquiry.seed)
            name = f"explain-{zlib.crc32(repr(sorted(depends.items())).encode()):08x}.jsonl"
            journal = held.enter_context(Journal.open(folder / name, depends))
        found = _explanation(inquiry, inquiry.lab(journal, progress))
        if folder:
            found.save(folder / "explanation.json")
    return found


def _explanation(inquiry: Inquiry, lab: Lab) -> Explanation:
    losses = _token_losses(inquiry, lab.evaluations)
    classes: list[TokenClass] = []
    if inquiry.masks:
        classes = token_classes(inquiry.data.examples, inquiry.subject.given_tokenizer)
    tables = [*inquiry.known, *(_scored(lab, criterion, inquiry.rivals) for criterion in inquiry.criteria)]
    pairs = partners(inquiry.seen, inquiry.plan) if inquiry.seen else [()] * len(inquiry.moves)
    notes = dict(inquiry.notes)
    if inquiry.seen and not any(pairs):
        notes["partners"] = "the search evaluated no two moves both apart and together on the same windows"

    def changes(before: Mask, after: Mask) -> tuple[ClassEffect, ...]:
        return effects(classes, losses[before], losses[after]) if losses else ()

    steps = []
    for number, (step, move, given) in enumerate(zip(inquiry.plan.steps, inquiry.moves, inquiry.given, strict=True)):
        lab.report(number, len(inquiry.moves), "what each removal did to the stream")
        steps.append(
            StepExplanation(
                remove=step.remove,
                given=tuple(map(str, sorted(given, key=lambda block: block.order))),
                choice=choice(inquiry.plan, number),
                scores=tuple(place(table, move) for table in tables),
                classes=changes(given, given | move.blocks),
                stream=stream_account(replace(lab, mask=given, progress=None), move),
                partners=pairs[number],
            )
        )
    return Explanation.made(
        model=inquiry.subject.identity,
        calibration=inquiry.data.record.model_dump(mode="json"),
        question=inquiry.data.examples.question,
        dtype=inquiry.subject.dtype,
        seed=inquiry.seed,
        definitions={by: DEFINITIONS[by] for by in dict.fromkeys(each.by for each in classes) if by in DEFINITIONS},
        steps=tuple(steps),
        whole=changes(DENSE, inquiry.plan.mask()),
        notes=notes,
    )


def _token_losses(inquiry: Inquiry, evaluations: Evaluations) -> dict[Mask, Tensor]:
    """The loss of every predicted token by mask, float64 [rows, positions], 0 where none is predicted.

    An objective in segments of one position gives loss * positions / number of predicted tokens in the row, so that
    their mean is the row's loss.
    """
    if not inquiry.masks:
        return {}
    targets = inquiry.data.examples.targets.cpu()
    scale = (targets != IGNORED).sum(1, keepdim=True).double() / targets.shape[1]
    found: dict[Mask, list[float]] = {mask: [] for mask in inquiry.masks}
    for batch in range(inquiry.objective.batches):
        for mask, values in evaluations.pieces(inquiry.masks, [batch], "losses of tokens").items():
            found[mask] += values
    shape = targets.shape
    return {mask: torch.tensor(each, dtype=torch.float64).view(shape) * scale for mask, each in found.items()}


def _scored(lab: Lab, criterion: Criterion, moves: Sequence[Move]) -> CriterionScores:
    return CriterionScores.of(format_method(criterion, CRITERIA), criterion.scores(lab, moves))
