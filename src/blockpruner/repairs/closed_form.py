"""Replacements without training: what each gap misses, as a constant or a linear map of what reaches it.

Gaps are filled in the order of depth, each on the states of the pruned and so far recovered model, so that a map also
makes up for what earlier ones leave. Cost: one forward pass over all text up to the last gap, one of the dense model
for the target `dense`, and three or four calls of each layer that has a gap; such a pass for every gap where layers
cannot be led through one by one. Memory: see `side_by_side`, and the sums of one gap, see `normal_equations`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.normal_equations import LinearMap, NormalEquations, mean_map, ridge_map
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.side_by_side import Walk, side_by_side
from blockpruner.repairs.updates import Observed, UpdatesAt
from blockpruner.standin import Replacement, normed
from blockpruner.surgery.gaps import Gap, Repair, device_of, gaps

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # those that held-out text chooses from, see `ridge_map`

WORSE = "held-out text is better off without it"
TAKEN = "something stands there already; put first the method that is to fill it"
MADE_UP = "other weights make up for it already; linear with target=dense fits what is still missing"

Regressor = Literal["auto", "input", "stream", "nothing"]
Target = Literal["block", "dense"]
Ridge = float | Literal["auto"]


@dataclass(frozen=True)
class ClosedForm:
    """How gaps are filled.

    regressor: what is mapped; rank: of the map, 0 for full; ridge: "auto" lets held-out text choose; sinks, target: see
    `UpdatesAt`.
    """

    regressor: Regressor
    rank: int = 0
    ridge: Ridge = "auto"
    sinks: float = 0.0
    target: Target = "block"

    def __post_init__(self) -> None:
        if self.rank < 0 or min(ridges(self.ridge)) < 0 or not 0 <= self.sinks <= 1:
            raise InputError(
                f"no linear map has rank={self.rank}, ridge={self.ridge} and sinks={self.sinks}",
                fix="give a rank and a ridge of 0 or more, and sinks of 0 to 1",
            )


@dataclass(frozen=True)
class Given:
    """What a map is given of what reaches the gap: nothing, or that, through a norm without gain."""

    norm: Literal["nothing", "none", "rms", "layer"]
    eps: float = 1e-6

    def of(self, states: Tensor) -> Tensor:
        return states[..., :0] if self.norm == "nothing" else normed(states, self.norm, self.eps)


@dataclass(frozen=True)
class Fitted:
    """A map for one gap, and the share of what was missing on held-out text that is still missing with it."""

    found: LinearMap
    given: Given
    ridge: float
    error: float


Sums = tuple[NormalEquations, NormalEquations]  # of the examples, and of what is held out


def fill_gaps(bench: Bench, form: ClosedForm) -> tuple[Repair, tuple[GapRecord, ...]]:
    """A replacement for every gap that can have one and is better off with it; the others are said, with the reason.

    Gaps that something stands in, or for, already are left as they are. So are those that new values of parameters
    make up for, if what the block would add is to be mapped: it would be added twice.
    """
    with side_by_side(bench, dense=form.target == "dense") as walk:
        return fill_along(walk, form)


def fill_along(walk: Walk, form: ClosedForm) -> tuple[Repair, tuple[GapRecord, ...]]:
    """The same on a walk that stands before the first of the gaps, or has not come there."""
    bench = walk.bench
    repair, records = bench.start, list[GapRecord]()
    places = gaps(bench.anatomy, bench.mask)
    for number, gap in enumerate(places):
        bench.report(number, len(places), f"fitting {gap}")
        walk.lead_to(gap.layer, repair)
        repair, record = _filled(walk, gap, form, repair)
        records.append(record)
    bench.report(len(places), len(places), "fitted")
    return repair, tuple(records)


def _filled(walk: Walk, gap: Gap, form: ClosedForm, repair: Repair) -> tuple[Repair, GapRecord]:
    """The repair with a map for one gap, if held-out text is better off with it."""
    bench = walk.bench
    if repair.stands_for(gap):
        return repair, left_alone(str(gap), gap.path, TAKEN)
    if form.target == "block" and gap.blocks <= repair.made_up:
        return repair, left_alone(str(gap), gap.path, MADE_UP)
    try:
        fitted = fitted_at(walk, gap, form, repair)
    except UnsupportedModelError as error:
        return repair, left_alone(str(gap), gap.path, error.what)
    record = record_of(str(gap), gap.path, form, fitted)
    if not fitted.error < 1 and not bench.force:
        return repair, record.model_copy(update={"applied": False, "reason": WORSE})
    made = replacement(fitted, device_of(bench.model, gap), bench.model.dtype)
    return replace(repair, replacements={**repair.replacements, gap.path: made}), record


def fitted_at(walk: Walk, gap: Gap, form: ClosedForm, repair: Repair) -> Fitted:
    """The best map for one gap, its ridge and regressor chosen on held-out text.

    UnsupportedModelError if there can be none.
    """
    if gap.kept:
        raise UnsupportedModelError(
            f"{gap} goes on running, since other blocks use what it makes", fix="leave it in the model"
        )
    bench = walk.bench
    updates = UpdatesAt(
        *(bench.model, bench.anatomy, bench.mask, gap, repair),
        sinks=form.sinks,
        dense=form.target == "dense",
        axes=walk.axes,
        reach=walk,
    )
    seen = (map(updates.observe, batches) for batches in (walk.fit, walk.held_out))
    return best_map(bench.model, gap, form, str(gap), *seen)


def best_map(
    model: PreTrainedModel,
    gap: Gap,
    form: ClosedForm,
    what: str,
    fit: Iterable[Observed],
    held_out: Iterable[Observed],
) -> Fitted:
    """The best map from what was observed at a gap, its ridge and regressor chosen by what was held out."""
    regressors = regressors_of(form.regressor, model, gap)
    both = gathered(fit, regressors), gathered(held_out, regressors)
    found = [chosen((both[0][given], both[1][given]), given, form, what) for given in regressors]
    return min(found, key=lambda fitted: fitted.error)


def gathered(observed: Iterable[Observed], regressors: Sequence[Given]) -> dict[Given, NormalEquations]:
    """The sums of all that is observed for each regressor, from one walk over it."""
    sums: dict[Given, NormalEquations] = {}
    for seen in observed:
        for given in regressors:
            x = given.of(seen.x)
            if given not in sums:
                sums[given] = NormalEquations(x.shape[-1], seen.y.shape[-1], x.device)
            sums[given].add(x, seen.y, seen.weights)
    return sums


def regressors_of(regressor: Regressor, model: PreTrainedModel, gap: Gap) -> tuple[Given, ...]:
    """The regressors to try.

    The block's own normed input is a linear map of the stream at root mean square one (its mean taken off where the
    norm is a LayerNorm), for gain and bias are linear: so no norm has to stay for it.
    """
    inside = list(model.get_submodule(gap.layer.path).modules())
    own = "layer" if any(isinstance(module, nn.LayerNorm) for module in inside) else "rms"
    said = [getattr(module, name, None) for module in inside for name in ("eps", "variance_epsilon")]
    stream, normal = Given("none"), Given(own, next((eps for eps in said if isinstance(eps, float)), Given.eps))
    return {"auto": (stream, normal), "input": (normal,), "stream": (stream,), "nothing": (Given("nothing"),)}[
        regressor
    ]


def ridges(ridge: Ridge, known: tuple[float, ...] = RIDGES) -> tuple[float, ...]:
    """Those to try."""
    return known if ridge == "auto" else (float(ridge),)


def chosen(sums: Sums, given: Given, form: ClosedForm, what: str) -> Fitted:
    """The map for one regressor, with the ridge that leaves the smallest error on held-out text."""
    fit, held_out = sums
    held_out.check(f"{what} in the held-out text")
    power = held_out.power()
    if given.norm == "nothing":
        found = [(mean_map(fit, what), 0.0)]
    else:
        found = [(ridge_map(fit, what, ridge=ridge, rank=form.rank), ridge) for ridge in ridges(form.ridge)]
    tried = [Fitted(each, given, ridge, held_out.error(each) / power if power else 1.0) for each, ridge in found]
    return min(tried, key=lambda fitted: fitted.error)


def replacement(fitted: Fitted, device: torch.device, dtype: torch.dtype) -> Replacement:
    """The module that computes a fitted map."""
    found, given = fitted.found, fitted.given
    inputs, outputs = found.down.shape[0], found.bias.shape[0]
    if given.norm == "nothing":
        made, values = Replacement("bias", inputs, outputs), {"bias": found.bias}
    elif found.up is None:
        made = Replacement("linear", inputs, outputs, 0, given.norm, given.eps)
        values = {"bias": found.bias, "weight": found.down}
    else:
        made = Replacement("linear", inputs, outputs, len(found.up), given.norm, given.eps)
        values = {"bias": found.bias, "down": found.down, "up": found.up}
    made.to(device, dtype).load_state_dict(values)
    return made.requires_grad_(False)


def record_of(removed: str, place: str, form: ClosedForm, fitted: Fitted) -> GapRecord:
    """What a map does for the blocks of `removed`."""
    found, norm = fitted.found, fitted.given.norm
    settings: dict[str, str | int | float] = {"target": form.target, "sinks": form.sinks}
    if norm != "nothing":
        settings |= {"regressor": "stream" if norm == "none" else f"input ({norm})"}
        settings |= {"rank": form.rank, "ridge": fitted.ridge}
    return GapRecord(
        removed=removed,
        place=place,
        added_parameters=sum(part.numel() for part in (found.down, found.up, found.bias) if part is not None),
        settings=settings,
        error=fitted.error,
        applied=True,
    )


def left_alone(removed: str, place: str, reason: str) -> GapRecord:
    """The record of a gap that nothing is done about."""
    return GapRecord(
        removed=removed, place=place, added_parameters=0, settings={}, error=None, applied=False, reason=reason
    )
