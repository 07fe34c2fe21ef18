"""Exact gradients of each window's loss with respect to the weights of blocks, handed out as they are made.

Models of one stack are walked backward layer by layer (`backward_walk`), after a probe on PROBE_TOKENS tokens that this
gives the gradients of a whole backward pass on this very model. Where it does not, or cannot be done, whole backward
passes over the model are made, a window at a time: they keep what all layers need for one window, and sums of gradients
over windows are then a copy of the blocks' weights. Cost: two forward passes and one backward pass; one of each where
passes are whole.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import MISFIT, asking, evaluating, vocabulary_size, without_cache
from blockpruner.blocks import Mask, Move, format_mask
from blockpruner.errors import InputError, is_out_of_memory
from blockpruner.importance.backward_walk import BackwardWalk, Disagreement
from blockpruner.importance.block_weights import floats, holdings, staying, sums
from blockpruner.importance.criterion import Lab
from blockpruner.searching.contract import Progress
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import IGNORED, Examples

PROBE_TOKENS = 64
_log = logging.getLogger("blockpruner")


class Sink(Protocol):
    """What takes gradients as they are made; `window` counts from 0, a gradient is of that window's loss alone."""

    def take(self, window: int, name: str, gradient: Tensor) -> None: ...

    def done(self, prefix: str) -> None:
        """No more gradients come of parameters whose names begin with `prefix`."""
        ...


S = TypeVar("S", bound=Sink)


def windows_of(model: PreTrainedModel, examples: Examples) -> list[Examples]:
    """One row per unit, on the model's device: the window, or the item with its right answer.

    InputError for a model without a head: it predicts nothing, so it has no loss.
    """
    check_has_loss(model, examples)
    rows, found, start = list(examples.rows()), [], 0
    for unit, length in enumerate(examples.lengths):
        found.append(rows[start + (examples.gold[unit] if examples.gold else 0)].to(model.device))
        start += length
    return found


def check_has_loss(model: PreTrainedModel, examples: Examples) -> None:
    """InputError for a model that predicts nothing."""
    if not bool((examples.targets != IGNORED).any()):
        raise InputError(
            f"{type(model).__name__} has no head that predicts tokens, so it has no loss with a gradient",
            fix="choose a criterion that compares states (cosine, update-norm), or load the model with its head",
        )


def mean_loss(model: PreTrainedModel, row: Examples) -> Tensor:
    """Mean cross entropy over the predicted tokens of one window, in nats, float32; holds all its logits."""
    logits = model(**row.inputs, **without_cache(model)).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), row.targets.flatten(), ignore_index=IGNORED)


def gradients(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rows: Sequence[Examples],
    parameters: Mapping[str, nn.Parameter],
    make: Callable[[], S],
    *,
    mask: Mask = frozenset(),
    report: Progress,
) -> S:
    """A sink that has taken the gradient of every window's `mean_loss` with respect to these parameters of blocks.

    Without the blocks of `mask`, in eval mode, all else frozen; afterwards the model is as it was, `requires_grad` and
    `.grad` too. make: a new sink, asked again where the walk through the layers turns out not to be the truth.
    """
    with evaluating(model), skipped(model, mask, anatomy=anatomy), torch.inference_mode(False), torch.enable_grad():
        reason = _why_not(model, anatomy, rows, parameters)
        if not reason:
            sink = make()
            try:
                with asking(model), _collecting(parameters, sink) as at:
                    BackwardWalk(model, anatomy).run(rows, at, sink.done, report)
                return sink
            except Disagreement as error:
                reason = str(error)
        _log.warning("whole backward passes, which may hold a copy of the blocks' weights: %s", reason)
        sink = make()
        with asking(model), _collecting(parameters, sink) as at:
            _whole(model, rows, at, sink, report)
        return sink


At = Callable[[int], None]


@contextlib.contextmanager
def _collecting(parameters: Mapping[str, nn.Parameter], sink: Sink) -> Iterator[At]:
    """While the block runs, the sink is given each gradient once it is made, and nobody keeps it.

    Yields what is to be called with the number of the window before its backward pass.
    """
    window = [0]

    def hand_over(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            sink.take(window[0], name, gradient)

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(hand_over, name)))
        yield partial(window.__setitem__, 0)
    finally:
        for handle in handles:
            handle.remove()


def _whole(model: PreTrainedModel, rows: Sequence[Examples], at: At, sink: Sink, report: Progress) -> None:
    for window, row in enumerate(rows):
        at(window)
        mean_loss(model, row).backward()
        report(window + 1, len(rows), "backward passes")
    sink.done("")


class _Sizes:
    """Per parameter the length of its gradient, and how far that goes along the weights: to tell gradients apart."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.found: dict[str, tuple[float, float]] = {}

    def take(self, window: int, name: str, gradient: Tensor) -> None:
        weight, gradient = self.parameters[name].detach().flatten().float(), gradient.flatten().float()
        along = torch.dot(weight, gradient) / weight.norm().clamp_min(1e-30)
        self.found[name] = float(gradient.norm()), float(along)

    def done(self, prefix: str) -> None: ...


def _why_not(
    model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[Examples], parameters: Mapping[str, nn.Parameter]
) -> str:
    """Empty if the walk gives the gradients of a whole backward pass on some tokens, else why it is not used."""
    if len(anatomy.stacks) != 1 or model.config.is_encoder_decoder:
        return f"the model has {max(2, len(anatomy.stacks))} stacks"
    ids = rows[-1].inputs["input_ids"]
    cut = {k: v[:, :PROBE_TOKENS] if v.shape[1:2] == ids.shape[1:] else v for k, v in rows[-1].inputs.items()}
    short = replace(rows[-1], inputs=cut, targets=cut["input_ids"])
    walked, whole = _Sizes(parameters), _Sizes(parameters)
    try:
        with asking(model), _collecting(parameters, walked) as at:
            BackwardWalk(model, anatomy, vocabulary_size(model) * PROBE_TOKENS // 2).run(
                [short], at, walked.done, _silent
            )
        with asking(model), _collecting(parameters, whole) as at:
            _whole(model, [short], at, whole, _silent)
    except Disagreement as error:
        return str(error)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return f"it stops with {type(error).__name__}: {error}"
    largest = max((length for length, _ in whole.found.values()), default=0.0)
    bound = 1e-3 if model.dtype.itemsize >= 4 else 5e-2
    for name in parameters:
        one, other = walked.found.get(name, (0.0, 0.0)), whole.found.get(name, (0.0, 0.0))
        gap = max(abs(a - b) for a, b in zip(one, other, strict=True))
        if not gap <= bound * max(other[0], 1e-3 * largest):
            return f"layer by layer, the gradient of {name} comes out otherwise ({one[0]:.3g} long, not {other[0]:.3g})"
    return ""


def _silent(done: int, total: int, message: str) -> None: ...


class _Sums(Sink, Protocol):
    values: dict[str, list[float]]


def weight_sums(
    lab: Lab, moves: Sequence[Move], kind: Callable[[Mapping[str, Tensor], int], _Sums], name: str
) -> dict[Move, tuple[float, ...]]:
    """Per move, the numbers of a sink of this `kind` over the weights that leave with it on top of `lab.mask`.

    The sink's values of all weights that are left are noted under `name` and the mask, so a killed run has them again.
    """
    held = holdings(lab.model, lab.anatomy)
    parameters = floats(lab.model, staying(held, lab.mask))

    def make() -> dict[str, list[float | str]]:
        rows = windows_of(lab.model, lab.examples)
        sink = gradients(
            lab.model,
            lab.anatomy,
            rows,
            parameters,
            lambda: kind(parameters, len(rows)),
            mask=lab.mask,
            report=lab.report,
        )
        # Strict JSON has no NaN, so such a number becomes text.
        return {weight: [v if math.isfinite(v) else str(v) for v in row] for weight, row in sink.values.items()}

    noted = lab.notes.get(f"{name} {format_mask(lab.mask)}", make)
    return sums(held, moves, lab.mask, {weight: [float(v) for v in row] for weight, row in noted.items()})
