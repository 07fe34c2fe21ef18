"""Spans: a run of removed layers made up for by one linear map of the stream, in closed form.

The map takes the stream as it reaches the run in the pruned and so far recovered model to the dense model's stream
behind the run. It stands in the first gap of the run that can hold one: what is behind it in the run hands the stream
on, so that all gaps are worth the same, and a pipeline that leaves the layers behind out finds it where the run began.
Cost per run: a forward pass of the pruned model up to it and one of the dense model through it, over all text.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from blockpruner.anatomy.probing import Call, Enough
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.closed_form import (
    TAKEN,
    WORSE,
    ClosedForm,
    Fitted,
    chosen,
    gathered,
    left_alone,
    record_of,
    regressors_of,
    replacement,
)
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.side_by_side import BATCH_TOKENS
from blockpruner.repairs.spans import Span, spans
from blockpruner.repairs.updates import (
    Giving,
    Observed,
    Taking,
    at_layer,
    flat,
    tensor_of,
    token_axes,
    token_weights,
)
from blockpruner.surgery.gaps import Gap, Repair, attach, device_of, gaps, repaired
from blockpruner.texts.examples import Examples

T = TypeVar("T")
ROUNDED = 1e-2  # what a scale may be off by in half precision
ROUNDING = {True: 1e-5, False: 2e-2}  # of a stream in single precision, and in half


def fill_spans(bench: Bench, form: ClosedForm) -> tuple[Repair, tuple[GapRecord, ...]]:
    """One map for every run of layers that is better off with it. InputError if no whole layer is gone."""
    runs = spans(bench.anatomy, bench.mask)
    if not runs:
        raise InputError(
            "no layer has lost all its blocks, so there is no span", fix="use linear, or search with --moves layer"
        )
    places = gaps(bench.anatomy, bench.mask)
    repair, records, axes = bench.start, list[GapRecord](), token_axes(bench.model)
    for number, span in enumerate(runs):
        bench.report(number, len(runs), f"fitting {span.numbered}")
        inside = [gap for gap in places if gap.blocks <= span.blocks]
        if any(repair.stands_for(gap) for gap in inside):
            records.append(left_alone(str(span), span.layers[0].path, TAKEN))
            continue
        try:
            seen = _seen(bench, span, inside, repair, form.sinks, axes)
        except UnsupportedModelError as error:
            records.append(left_alone(str(span), span.layers[0].path, error.what))
            continue
        fitted = _fitted(bench, seen, form)
        record = record_of(str(span), seen.gap.path, form, fitted)
        record = record.model_copy(update={"settings": {**record.settings, "stands for": span.numbered}})
        if fitted.error < 1 or bench.force:
            made = replacement(fitted, device_of(bench.model, seen.gap), bench.model.dtype)
            path = seen.gap.path
            repair = replace(
                repair,
                replacements={**repair.replacements, path: made},
                spans={**repair.spans, path: span.blocks},
            )
        else:
            record = record.model_copy(update={"applied": False, "reason": WORSE})
        records.append(record)
    bench.report(len(runs), len(runs), "fitted")
    return repair, (*records, *_others(places, runs, repair))


def _others(places: list[Gap], runs: list[Span], repair: Repair) -> list[GapRecord]:
    """The records of gaps in layers that go on."""
    gone = frozenset[object]().union(*(span.blocks for span in runs))
    return [
        left_alone(str(gap), gap.path, "its layer goes on with other blocks, so it is no span; linear can fill it")
        for gap in places
        if not gap.blocks <= gone and not repair.stands_for(gap)
    ]


def _fitted(bench: Bench, seen: "SpanAt", form: ClosedForm) -> Fitted:
    regressors = regressors_of(form.regressor, bench.model, seen.gap)
    both = [gathered(seen, regressors, examples.batches(BATCH_TOKENS)) for examples in (bench.examples, bench.held_out)]
    found = [chosen((both[0][given], both[1][given]), given, form, str(seen.span)) for given in regressors]
    return min(found, key=lambda fitted: fitted.error)


def _seen(
    bench: Bench, span: Span, inside: list[Gap], repair: Repair, sinks: float, axes: Mapping[str, int]
) -> "SpanAt":
    """The first gap of a span where a map can stand; UnsupportedModelError if there is none."""
    why = ""
    for gap in inside:
        if gap.kept:
            why = why or f"{gap} goes on running, since other blocks use what it makes"
            continue
        seen = SpanAt(bench, span, gap, repair, sinks, axes.get(gap.layer.path, 1))
        if seen.proved(next(iter(bench.examples.batches(1)))):
            return seen
        why = why or f"what is put at {gap.path} does not come out of the layer as it went in"
    raise UnsupportedModelError(why, fix="use linear")


@dataclass
class SpanAt:
    """Reads, micro-batch by micro-batch, what is missing behind a span, for a map in `gap`, a place in it.

    scale: of what is put there, as it arrives in the stream; seen by `proved`.
    """

    bench: Bench
    span: Span
    gap: Gap
    repair: Repair
    sinks: float
    axis: int
    scale: float = 1.0

    def observe(self, batch: Examples) -> Observed:
        """x [tokens, inputs] reaches the gap, y is what brings it to the dense model's stream behind the span."""
        given, stream = self._pruned(batch)
        whole = self._dense(batch).to(stream.device)
        if not torch.isfinite(given).all() or not torch.isfinite(whole).all():
            raise InputError(
                f"the states around {self.span.numbered} are NaN or infinite, so nothing can be fitted to them",
                fix="load the model in float32 or bfloat16, or remove fewer blocks",
            )
        return Observed(flat(given), flat(whole - stream) / self.scale, token_weights(stream, self.axis, self.sinks))

    def proved(self, batch: Examples) -> bool:
        """Whether what is put in the gap is what the layer adds to the stream, but for a scale, which is kept."""

        def look(module: nn.Module, call: Call) -> bool:
            key = self.gap.layer.hidden
            stream = dict(call.inputs())[key].clone()
            generator = torch.Generator().manual_seed(0)
            update = torch.randn(stream.shape, generator=generator).to(stream) * stream.float().std().to(stream)
            attach(self.bench.model, self.gap.path, Giving(update))
            try:
                found = tensor_of(call.again(module, {key: stream.clone()})) - stream
            except RuntimeError:  # of a shape that does not fit there
                return False
            self.scale = float((found * update).double().sum() / update.double().square().sum())
            self.scale = 1.0 if abs(self.scale - 1) < ROUNDED else self.scale
            room = ROUNDING[stream.dtype.itemsize >= 4] * float((stream.abs() + update.abs()).max())
            return abs(self.scale) > ROUNDED and float((found - self.scale * update).abs().max()) <= room

        return self._at(self.gap.layer.path, batch, look)

    def _pruned(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """What reaches the gap in the pruned model, and the stream before its layer."""

        def look(module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
            stream = dict(call.inputs())[self.gap.layer.hidden].clone()
            taking = Taking()
            attach(self.bench.model, self.gap.path, taking)
            with contextlib.suppress(Enough):
                call.again(module, {self.gap.layer.hidden: stream.clone()})
            assert taking.seen is not None  # `proved` has put something there
            return taking.seen, stream

        return self._at(self.gap.layer.path, batch, look)

    def _at(self, path: str, batch: Examples, look: Callable[[nn.Module, Call], T]) -> T:
        bench = self.bench
        with repaired(bench.model, bench.anatomy, bench.mask, self.repair):
            return at_layer(bench.model, path, batch, look)

    def _dense(self, batch: Examples) -> Tensor:
        """The dense model's stream behind the span."""
        last = self.span.layers[-1]

        def look(module: nn.Module, call: Call) -> Tensor:
            stream = dict(call.inputs())[last.hidden]
            return tensor_of(call.again(module, {last.hidden: stream.clone()})).clone()

        return at_layer(self.bench.model, last.path, batch, look)
