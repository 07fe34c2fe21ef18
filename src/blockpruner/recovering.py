"""A pruned model made better: recoveries run, each judged on held-out text, and applied if that agrees."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, format_mask
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.recoveries import RECOVERIES, format_chain
from blockpruner.registry import format_method
from blockpruner.repairs.courses import rows_of
from blockpruner.repairs.kept import Made, keep, kept
from blockpruner.repairs.recovery import Bench, GapRecord, Recovery, RecoveryRecord, StepRecord, Trained
from blockpruner.repairs.written import windows_to_write, with_written
from blockpruner.searching.contract import DENSE, Progress
from blockpruner.searching.evaluations import Evaluations
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import Examples
from blockpruner.texts.overlap import sketch, tokens_of, windows_in_common

HELD_OUT = 5  # where no other text is given, the last fifth of the windows is held out
_log = logging.getLogger("blockpruner")


def recover(
    model: PreTrainedModel,
    anatomy: Anatomy,
    mask: Mask,
    method: Recovery | Sequence[Recovery],
    examples: Examples,
    held_out: Examples | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> tuple[Repair, RecoveryRecord]:
    """The repair of `model` without the blocks of `mask`, and the record of what it is worth on held-out text.

    model: the dense one, which is only borrowed; `removal.prune_` and `checkpoint.save_pruned` apply a repair.
    method: one, or a chain of them, each of which goes on from what those before it made. held_out: other examples;
    without them the last fifth of `examples` is held out. A step with which the held-out loss is larger than before it
    is left out, and the record says so, unless `force`. folder: for what each method made, and checkpoints of what is
    trained, from which the same call goes on. Cost: the methods', and two evaluations of the loss on the held-out
    examples, and one per method. InputError where text to fit on is held out as well, the dense model's loss is not
    finite, or a method cannot do it.
    """
    anatomy.outline.check(mask, "the plan")
    fit, held_out = apart(examples, held_out)
    chain = tuple(method) if isinstance(method, Sequence) else (method,)
    check_written(chain, fit)
    dense, pruned = _dense_loss(model, anatomy, held_out), loss(model, anatomy, held_out, mask)
    bench = Bench(model, anatomy, mask, fit, held_out, force, progress)
    repair, made, recovered, steps = UNREPAIRED, UNREPAIRED, pruned, list[StepRecord]()
    for number, each in enumerate(chain, 1):
        name = format_method(each, RECOVERIES)
        here = None if folder is None else folder / f"{number}-{name.partition(':')[0]}"
        made, gaps = _made(replace(bench, start=repair, folder=here), each, name)
        _check_holds(made, repair, name)
        found, reason = recovered, _unchanged(gaps)
        if not _same(made, repair):
            found = loss(model, anatomy, held_out, mask, made)
            reason = "" if force or held_out.question == "states" else _worse(recovered, found)
        steps.append(StepRecord(method=name, gaps=gaps, recovered=found, applied=not reason, reason=reason))
        if not reason:
            repair, recovered = made, found
    applied = any(step.applied for step in steps)
    worth = recovered if applied else steps[-1].recovered
    return repair, RecoveryRecord(
        format=RecoveryRecord.FORMAT,
        version=RecoveryRecord.VERSION,
        method=format_chain(chain),
        removed=format_mask(mask),
        examples=fit.fingerprint,
        held_out=held_out.fingerprint,
        seen=sketch([tokens_of(fit), tokens_of(held_out)]),
        tokens=(_tokens(fit), _tokens(held_out)),
        steps=tuple(steps),
        added_parameters=(repair if applied else made).added_parameters,
        dense=dense,
        pruned=pruned,
        recovered=worth,
        recovered_share=_share(dense, pruned, worth),
        applied=applied,
        reason="" if applied else steps[-1].reason,
    )


def _made(bench: Bench, method: Recovery, name: str) -> Made:
    """What a method makes, or made before it was killed later in the chain; most trainings see to that themselves."""
    if isinstance(method, Trained) and method.written:
        bench = replace(bench, examples=with_written(bench, method))
    if isinstance(method, Trained) and method.restorable:
        return method.repair(bench)
    made = kept(bench, name)
    if made is None:
        made = method.repair(bench)
        if not _same(made[0], bench.start):  # else what comes back would be taken for a change
            keep(bench, name, made)
    return made


def check_written(chain: Sequence[Recovery], fit: Examples) -> None:
    """InputError if a training of the chain has the dense model write where it cannot: before what comes first."""
    for method in chain:
        if isinstance(method, Trained) and method.written:
            windows_to_write(fit, method)


def _dense_loss(model: PreTrainedModel, anatomy: Anatomy, held_out: Examples) -> Estimate | None:
    """The loss that all is judged beside; InputError if it is not finite. Without a head there is none."""
    found = loss(model, anatomy, held_out)
    if found is None and held_out.question != "states":  # that of the pruned model may be, and a recovery mend it
        raise InputError(
            "the held-out loss of the dense model is not a finite number, so nothing can be judged by it",
            fix="load it with --dtype float32, or hold out other text",
        )
    return found


def _unchanged(gaps: Sequence[GapRecord]) -> str:
    """Why a method left everything as it was."""
    reason = next((f": {gap.removed or gap.place}: {gap.reason}" for gap in gaps if gap.reason), "")
    return f"nothing was recovered{reason}"


def _same(one: Repair, other: Repair) -> bool:
    """Whether two repairs hold the very same things; tensors are not compared."""
    pairs = ((one.replacements, other.replacements), (one.weights, other.weights))
    return all(a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in pairs)


def _check_holds(made: Repair, start: Repair, name: str) -> None:
    """InputError if a method began anew instead of going on from what was there."""
    if start.replacements.keys() - made.replacements.keys() or start.weights.keys() - made.weights.keys():
        raise InputError(
            f"{name.partition(':')[0]} begins with the plain pruned model, so it cannot follow another method",
            fix="put it first in the chain",
        )


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


def apart(examples: Examples, held_out: Examples | None) -> tuple[Examples, Examples]:
    """Text to fit on, and other text to judge by; InputError if some of it is the same.

    Of the last fifth, which judges where no other text is given, what the rest has too is left out.
    """
    for asked in (examples, held_out):
        if asked is not None and asked.question == "choices":
            raise InputError("a recovery is fitted on windows of text, not on items with answers", fix="give text")
    fit, judged = _split(examples) if held_out is None else (examples, held_out)
    common = windows_in_common(tokens_of(fit), tokens_of(judged))
    others = [number for number in range(len(judged)) if number not in common]
    if common and (held_out is not None or not others):
        raise InputError(
            f"{len(common)} of the windows that a recovery is judged by are also fitted on, or parts of them are",
            fix="hold out other text",
        )
    if common:
        _log.warning("%d of %d windows to judge by are left out: they are fitted on too", len(common), len(judged))
        judged = rows_of(judged, others)
    return fit, judged


def _split(examples: Examples) -> tuple[Examples, Examples]:
    """All but the last fifth of the windows, and that."""
    last = len(examples) // HELD_OUT
    if not last:
        raise InputError(
            f"{len(examples)} windows are too few to hold one of {HELD_OUT} out",
            fix="give more text, or text of its own to hold out",
        )
    return examples.part(0, len(examples) - last), examples.part(len(examples) - last, len(examples))


def _worse(pruned: Estimate | None, recovered: Estimate | None) -> str:
    if recovered is None:
        return "the held-out loss is not finite with it"
    if pruned is not None and recovered.value > pruned.value:
        return f"the held-out loss rises with it, from {pruned.value:.4f} to {recovered.value:.4f}"
    return ""


def _share(dense: Estimate | None, pruned: Estimate | None, recovered: Estimate | None) -> float | None:
    if dense is None or pruned is None or recovered is None or not pruned.value > dense.value:
        return None
    return (pruned.value - recovered.value) / (pruned.value - dense.value)


def _tokens(examples: Examples) -> int:
    return examples.tokens * len(examples.targets)
