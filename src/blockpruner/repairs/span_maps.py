"""Spans: a run of removed layers made up for by one linear map of the stream, in closed form.

The map takes the stream as it reaches the run in the pruned and so far recovered model to the dense model's stream
behind the run. It stands in the first gap of the run that can hold one: what is behind it in the run hands the stream
on, so that all gaps are worth the same, and a pipeline that leaves the layers behind out finds it where the run began.
Cost and memory: see `run_states`.
"""

from dataclasses import replace

from blockpruner.blocks import Block
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.closed_form import TAKEN, WORSE, ClosedForm, best_map, left_alone, record_of, replacement
from blockpruner.repairs.folded_runs import Run
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.run_states import Walks, run_states, walks_of
from blockpruner.repairs.spans import Span, spans
from blockpruner.surgery.gaps import Gap, Repair, device_of, gaps


def fill_spans(bench: Bench, form: ClosedForm) -> tuple[Repair, tuple[GapRecord, ...]]:
    """One map for every run of layers that is better off with it. InputError if no whole layer is gone."""
    runs = spans(bench.anatomy, bench.mask)
    if not runs:
        raise InputError(
            "no layer has lost all its blocks, so there is no span", fix="use linear, or search with --moves layer"
        )
    places = gaps(bench.anatomy, bench.mask)
    repair, records = bench.start, list[GapRecord]()
    with walks_of(bench) as walks:
        for span in runs:
            if any(repair.stands_for(gap) for gap in places if gap.blocks <= span.blocks):
                records.append(left_alone(str(span), span.layers[0].path, TAKEN))
                continue
            repair, record = _filled(bench, span, repair, walks, form)
            records.append(record)
    bench.report(len(runs), len(runs), "fitted")
    return repair, (*records, *_others(places, runs, repair))


def _filled(bench: Bench, span: Span, repair: Repair, walks: Walks, form: ClosedForm) -> tuple[Repair, GapRecord]:
    """The repair with a map for one span, if held-out text is better off with it."""
    run = Run(tuple(part.block for layer in span.layers for part in layer.parts), None)
    try:
        with run_states(bench, run, repair, walks, form.sinks) as states:
            gap = states.gap
            fitted = best_map(bench.model, gap, form, str(span), *states.observed)
    except UnsupportedModelError as error:
        return repair, left_alone(str(span), span.layers[0].path, error.what)
    record = record_of(str(span), gap.path, form, fitted)
    record = record.model_copy(update={"settings": {**record.settings, "stands for": span.numbered}})
    if not fitted.error < 1 and not bench.force:
        return repair, record.model_copy(update={"applied": False, "reason": WORSE})
    made = replacement(fitted, device_of(bench.model, gap), bench.model.dtype)
    replacements = {**repair.replacements, gap.path: made}
    return replace(repair, replacements=replacements, spans={**repair.spans, gap.path: span.blocks}), record


def _others(places: list[Gap], runs: list[Span], repair: Repair) -> list[GapRecord]:
    """The records of gaps in layers that go on."""
    gone = frozenset[Block]().union(*(span.blocks for span in runs))
    return [
        left_alone(str(gap), gap.path, "its layer goes on with other blocks, so it is no span; linear can fill it")
        for gap in places
        if not gap.blocks <= gone and not repair.stands_for(gap)
    ]
