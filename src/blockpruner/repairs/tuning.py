"""Weights of a pruned model trained; and what every training of a pruned model shares, from bench to record.

The dense model is only borrowed: what is trained are replacements, LoRA's factors, or new values for its parameters,
which stand in their places only while the pruned model runs.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import asking, evaluating, stood_in
from blockpruner.blocks import Mask, format_mask
from blockpruner.errors import InputError
from blockpruner.loading.models import computation
from blockpruner.repairs.at_the_head import head_of
from blockpruner.repairs.courses import Course, Lesson, Number, Trace, numbers_in
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench, GapRecord, Trained
from blockpruner.repairs.taught import Taught
from blockpruner.repairs.teaching import Predictions, check_predicts
from blockpruner.repairs.training import train
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import Repair
from blockpruner.texts.examples import IGNORED, Examples

UNHELPED = "held-out text is better off as it was before the training"
Told = dict[str, str | int | float]
Gauge = Callable[[Examples], float]  # what is measured of text on which nothing is predicted


def train_weights(bench: Bench, options: Trained, taught: Taught) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New values for all parameters that are left, replacements too; see `distill` and `continued`.

    Without the head where it is not looked at.
    """
    check_predicts(bench.model, bench.examples)
    maps = {path: live(module, options) for path, module in bench.start.replacements.items()}
    left = left_of(bench)
    if options.keeps_head:
        head = {id(parameter) for parameter in head_of(bench.model).parameters()}
        left = {name: parameter for name, parameter in left.items() if id(parameter) not in head}

    def lesson(pupil: Pupil) -> tuple[Lesson, None]:
        return taught.lesson(pupil, bench.examples), None

    made, trace = tuned(bench, options, left, lesson, maps=maps)
    numbers = len(left) + sum(len(list(module.parameters())) for module in maps.values())
    settings = {**taught.told, **told(options, trace, bench.force)}
    return made, (record_of(bench, f"all {numbers} parameters", settings, trace),)


def left_of(bench: Bench) -> dict[str, nn.Parameter]:
    """The parameters of the model that its pruned self has too, by name."""
    with stood_in(bench.model, bench.anatomy.stand_ins(bench.mask)):
        return {name: p for name, p in bench.model.named_parameters() if p.is_floating_point()}


def tuned(
    bench: Bench,
    options: Trained,
    parameters: Mapping[str, nn.Parameter],
    lesson: Callable[[Pupil], tuple[Lesson, Gauge | None]],
    *,
    maps: Mapping[str, Replacement] | None = None,
) -> tuple[Repair, Trace]:
    """The repair with new values of these parameters, and with these maps of its gaps trained as well.

    The dense model keeps its own; the new values are a second copy of these. lesson: for the pruned model with them;
    with what is measured of text on which nothing is predicted, see `trained`.
    """
    model, start, maps = bench.model, bench.start, maps or {}
    values = {name: start.weights.get(name, p.data).detach().clone() for name, p in parameters.items()}
    weights = {**start.weights, **values}
    filled = {**start.replacements, **maps}
    pupil = Pupil(model, bench.anatomy, bench.mask, replace(start, replacements=filled, weights=weights))
    numbers = {name: Number(p, values[name]) for name, p in parameters.items()}
    numbers |= numbers_in(maps)
    trace = trained(bench, options, pupil, numbers, *lesson(pupil))
    if not trace.best(bench.force):
        return start, trace
    made = {path: still(module, model) for path, module in maps.items()}
    return replace(start, replacements={**start.replacements, **made}, weights=weights, made_up=bench.mask), trace


def trained(
    bench: Bench,
    options: Trained,
    pupil: Pupil,
    numbers: Mapping[str, Number],
    lesson: Lesson,
    own: Gauge | None = None,
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
    written: Told = {"written": options.written} if options.written else {}
    return {"lr": options.lr, **written, "steps": trace.step, "best step": trace.best(force)}


def record_of(bench: Bench, place: str, settings: Told, trace: Trace, blocks: Mask | None = None) -> GapRecord:
    """The record of what was trained for these blocks, or for all that are gone, without new parameters."""
    best = bool(trace.best(bench.force))
    return GapRecord(
        removed=format_mask(bench.mask if blocks is None else blocks),
        place=place,
        added_parameters=0,
        settings=settings,
        error=None,
        applied=best,
        reason="" if best else UNHELPED,
        curve=trace.curve,
    )
