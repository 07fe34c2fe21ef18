"""All weights of a pruned model trained; and what every training of a pruned model shares, from bench to record.

The dense model is only borrowed: what is trained are replacements, LoRA's factors, or new values for its parameters,
which stand in their places only while the pruned model runs.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.blocks import format_mask
from blockpruner.courses import Course, Lesson, Number, Trace
from blockpruner.errors import InputError
from blockpruner.examples import IGNORED, Examples
from blockpruner.gaps import Repair
from blockpruner.models import computation
from blockpruner.probing import evaluating, stood_in
from blockpruner.pupil import Pupil, asking
from blockpruner.recovery import Bench, GapRecord, Trained
from blockpruner.standin import Replacement
from blockpruner.teaching import Predictions, check_predicts
from blockpruner.training import train

UNHELPED = "held-out text is better off as it was before the training"
Told = dict[str, str | int | float]


def train_weights(
    bench: Bench, options: Trained, loss: Literal["lm", "kl"], temperature: float = 1.0, hidden: float = 0.0
) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New values for all parameters that are left, replacements too; see `distill` and `continued`."""
    model, start = bench.model, bench.start
    check_predicts(model, bench.examples)
    maps = {path: live(module, options) for path, module in start.replacements.items()}
    with stood_in(model, bench.anatomy.stand_ins(bench.mask)):
        left = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    values = {name: start.weights.get(name, p.data).detach().clone() for name, p in left.items()}
    pupil = Pupil(model, bench.anatomy, bench.mask, replace(start, replacements=maps, weights=values))
    numbers = {name: Number(p, values[name]) for name, p in left.items()}
    numbers |= {f"{at}.{name}": Number(p, p.data) for at, m in maps.items() for name, p in m.named_parameters()}
    trace = trained(bench, options, pupil, numbers, Predictions(pupil, loss, temperature, hidden))
    record = record_of(
        bench, f"all {len(numbers)} parameters", {"loss": loss, **told(options, trace, bench.force)}, trace
    )
    if not trace.best(bench.force):
        return start, (record,)
    made = {path: still(module, model) for path, module in maps.items()}
    return replace(start, replacements=made, weights={**start.weights, **values}), (record,)


def trained(
    bench: Bench,
    options: Trained,
    pupil: Pupil,
    numbers: Mapping[str, Number],
    lesson: Lesson,
    own: Callable[[Examples], float] | None = None,
) -> Trace:
    """Train on the bench's examples; judged by the loss of predictions, by its `own` where there are none.

    InputError for a model in float16.
    """
    model = bench.model
    if model.dtype == torch.float16:
        raise InputError("gradients leave the range of float16", fix="train in bfloat16 or float32 (--dtype float32)")
    predicts = bool((bench.held_out.targets != IGNORED).any())
    eyes = lesson if isinstance(lesson, Predictions) else Predictions(pupil)

    def judge(part: Examples) -> tuple[float, float]:
        if own is not None and not predicts:
            return own(part), lesson.weigh(part)
        return eyes.judge(part), eyes.weigh(part)

    with evaluating(model), asking(model, [number.parameter for number in numbers.values()]):
        if predicts:
            eyes.probe(bench.held_out, {name: number.parameter for name, number in numbers.items()})
        return train(
            Course(
                options=options,
                numbers=numbers,
                lesson=lesson,
                judge=judge,
                examples=bench.examples,
                held_out=bench.held_out,
                identity=" ".join(
                    (type(options).__name__, format_mask(bench.mask), computation(model), bench.start.digest())
                ),
                noise=pupil.train,
                force=bench.force,
                folder=bench.folder,
                report=bench.report,
            )
        )


def live(module: Replacement, options: Trained) -> Replacement:
    """A copy to train."""
    made = copy.deepcopy(module)
    return made.to(wide(made.bias, options)).requires_grad_(True)


def still(module: Replacement, model: PreTrainedModel) -> Replacement:
    """A copy that is part of a repair."""
    return copy.deepcopy(module).to(model.dtype).requires_grad_(False)


def wide(value: Tensor, options: Trained) -> torch.dtype:
    """The dtype to train in what is new."""
    return torch.promote_types(value.dtype, torch.float32) if options.masters == "float32" else value.dtype


def told(options: Trained, trace: Trace, force: bool) -> Told:
    """The settings that a record names."""
    return {"lr": options.lr, "steps": trace.step, "best step": trace.best(force)}


def record_of(bench: Bench, place: str, settings: Told, trace: Trace) -> GapRecord:
    """The record of what was trained for all gaps together, without new parameters."""
    best = bool(trace.best(bench.force))
    return GapRecord(
        removed=format_mask(bench.mask),
        place=place,
        added_parameters=0,
        settings=settings,
        error=None,
        applied=best,
        reason="" if best else UNHELPED,
        curve=trace.curve,
    )
