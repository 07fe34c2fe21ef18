"""A pruned model made better: a recovery run, judged on held-out text, and applied if that agrees."""

import hashlib

from transformers import PreTrainedModel

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, format_mask
from blockpruner.errors import InputError
from blockpruner.evaluations import Evaluations
from blockpruner.examples import Examples
from blockpruner.gaps import UNREPAIRED, Repair, repaired
from blockpruner.objective import ModelObjective
from blockpruner.parts import Anatomy
from blockpruner.recoveries import RECOVERIES
from blockpruner.recovery import Bench, Recovery, RecoveryRecord
from blockpruner.registry import format_method
from blockpruner.searching import DENSE, Progress

HELD_OUT = 5  # where no other text is given, the last fifth of the windows is held out


def recover(
    model: PreTrainedModel,
    anatomy: Anatomy,
    mask: Mask,
    method: Recovery,
    examples: Examples,
    held_out: Examples | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Repair, RecoveryRecord]:
    """The repair of `model` without the blocks of `mask`, and the record of what it is worth on held-out text.

    model: the dense one, which is only borrowed; `surgery.prune_` and `checkpoint.save_pruned` apply a repair.
    held_out: other examples; without them the last fifth of `examples` is held out. A repair with which the held-out
    loss is larger comes back empty, and the record says so, unless `force`.
    Cost: the method's, and three evaluations of the loss on the held-out examples.
    InputError where text to fit on is held out as well, or the method cannot do it.
    """
    anatomy.outline.check(mask, "the plan")
    fit, held_out = _apart(examples, held_out)
    bench = Bench(model, anatomy, mask, fit, held_out, force, progress)
    repair, gaps = method.repair(bench)
    dense, pruned = loss(model, anatomy, held_out), loss(model, anatomy, held_out, mask)
    recovered = loss(model, anatomy, held_out, mask, repair) if repair != UNREPAIRED else pruned
    reason = "" if force else _worse(pruned, recovered)
    record = RecoveryRecord(
        format=RecoveryRecord.FORMAT,
        version=RecoveryRecord.VERSION,
        method=format_method(method, RECOVERIES),
        removed=format_mask(mask),
        examples=fit.fingerprint,
        held_out=held_out.fingerprint,
        tokens=(_tokens(fit), _tokens(held_out)),
        gaps=gaps,
        added_parameters=repair.added_parameters,
        dense=dense,
        pruned=pruned,
        recovered=recovered,
        recovered_share=_share(dense, pruned, recovered),
        applied=not reason,
        reason=reason,
    )
    return (UNREPAIRED if reason else repair), record


def loss(
    model: PreTrainedModel,
    anatomy: Anatomy,
    examples: Examples,
    mask: Mask = DENSE,
    repair: Repair = UNREPAIRED,
) -> Estimate | None:
    """The loss of `model` without `mask` and with `repair`; None for a model without a head, or if it is not finite."""
    if examples.question == "states":
        return None
    with repaired(model, anatomy, mask, repair):
        return Evaluations(ModelObjective(model, anatomy, examples)).losses([DENSE], "measuring")[DENSE]


def _apart(examples: Examples, held_out: Examples | None) -> tuple[Examples, Examples]:
    """Text to fit on, and other text to judge by; InputError if some of it is the same."""
    for asked in (examples, held_out):
        if asked is not None and asked.question == "choices":
            raise InputError("a recovery is fitted on windows of text, not on items with answers", fix="give text")
    if held_out is None:
        last = len(examples) // HELD_OUT
        if not last:
            raise InputError(
                f"{len(examples)} windows are too few to hold one of {HELD_OUT} out",
                fix="give more text, or text of its own to hold out",
            )
        return examples.part(0, len(examples) - last), examples.part(len(examples) - last, len(examples))
    if common := _fingerprints(examples) & _fingerprints(held_out):
        raise InputError(
            f"{len(common)} of the windows that a recovery is judged by are also fitted on",
            fix="hold out other text",
        )
    return examples, held_out


def _fingerprints(examples: Examples) -> set[bytes]:
    """Of the tokens of each row."""
    return {hashlib.sha256(row.cpu().numpy().tobytes()).digest() for row in examples.inputs["input_ids"]}


def _worse(pruned: Estimate | None, recovered: Estimate | None) -> str:
    if pruned is None:
        return ""
    if recovered is None:
        return "the held-out loss is not finite with it"
    if recovered.value > pruned.value:
        return f"the held-out loss rises with it, from {pruned.value:.4f} to {recovered.value:.4f}"
    return ""


def _share(dense: Estimate | None, pruned: Estimate | None, recovered: Estimate | None) -> float | None:
    if dense is None or pruned is None or recovered is None or pruned.value == dense.value:
        return None
    return (pruned.value - recovered.value) / (pruned.value - dense.value)


def _tokens(examples: Examples) -> int:
    return examples.tokens * len(examples.targets)
