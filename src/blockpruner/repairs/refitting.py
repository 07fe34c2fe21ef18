"""Kept blocks fitted anew: their last projections changed so that the stream behind them is the dense model's again.

Behind the first gap every block is given states that it was not made for, and adds on to what is missing. A block that
is left has features of its own, h, in front of its last projection W: with W + D instead of W it can make up for a part
of that, without a parameter more. D minimises, by least squares over tokens t of weight w,

    sum_t w_t |r_t - g * (h_t D) s_t|^2 / |z_t|^2 + ridge m |D g|^2,

where z is the dense model's stream behind the block, r what brings the pruned model's to it, and m the mean variance of
an entry of h. What stands between projection and stream is a gain per channel, g (a multiplier, a layer's scale), and a
scale per token, s (a norm's, as it was with W), both 1 where nothing does; that there is no more is proved on the first
micro-batch: what the block adds is g * (h W + c) s in every entry, to the rounding of the stream. Behind a norm, those
channels are left as they are whose stream is so large that its rounding hides g, and those that g all but shuts: what
is put into these would be so large that the norm answered to it. Errors count beside |z|, as the next norm divides by
that.

The ridge is the one that leaves least missing on held-out text as the layer then computes it, its norm with it.
Blocks are fitted in the order of depth, each on the model as it is with those before it, so that what one leaves is the
next one's to do. Linear maps that an earlier method put into gaps are fitted anew in their turn, for what reaches them
is another stream by then. Cost per token: about two forward passes of the dense model, three to four of the pruned one,
and inputs^2 + inputs * outputs multiply-adds per block; where layers cannot be led through one by one (`side_by_side`),
two passes for every block. Memory: see `side_by_side`, and the sums of one projection.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Layer, Part
from blockpruner.anatomy.probing import recorded
from blockpruner.blocks import Block, format_mask
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.arrivals import tensor_of
from blockpruner.repairs.closed_form import (
    WORSE,
    ClosedForm,
    Ridge,
    fitted_at,
    left_alone,
    record_of,
    replacement,
    ridges,
)
from blockpruner.repairs.folding import Projection, projection
from blockpruner.repairs.normal_equations import LinearMap, NormalEquations, ridge_map
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.side_by_side import Walk, side_by_side
from blockpruner.repairs.updates import behind, flat, token_weights
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Gap, Repair, device_of, gaps
from blockpruner.texts.examples import Examples

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # with less, changes are many times as large as what they change
ROUNDS = 20  # of finding gain and scale, each from the other
NEAR, STEPS = 1e-4, 8  # what a block adds is proved to so much of itself, and so many steps of the stream's rounding
HEARD = 100  # power of what is added in a channel, beside that of the rounding there, from which on its gain is known
CLOSED = 1e-2  # gain beside the largest, below which a channel of a norm is as good as shut
NOTHING = "nothing is missing behind it"
FOLDED = "a recovery before this one made it make up for the gap behind it"


def refit_kept(bench: Bench, ridge: Ridge, sinks: float) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New last projections for the blocks that are left behind the first gap, and what became of each of them.

    InputError, with the first reason, if none can be fitted and nothing has been recovered before either.
    """
    repair, records = bench.start, list[GapRecord]()
    with side_by_side(bench, dense=True) as walk:
        parts = [(layer, part) for layer in walk.layers for part in layer.parts]
        maps = maps_in(bench)
        first = next((n for n, (_, part) in enumerate(parts) if part.block in bench.mask), len(parts))
        for number, (layer, part) in enumerate(parts):
            bench.report(number, len(parts), f"fitting {part.block}")
            gap = maps.get(part.block)
            if number < first or (part.block in bench.mask and gap is None):
                continue
            walk.lead_to(layer, repair)
            if gap is not None:
                if repair.weights is not bench.start.weights:  # else it stands as it was fitted
                    repair, record = _refilled(walk, gap, repair, ridge, sinks)
                    records.append(record)
                continue
            after = parts[number + 1][1].block if number + 1 < len(parts) else None
            repair, record = _refitted(walk, layer, part, repair, ridge, sinks, gap_follows=after in bench.mask)
            records.append(record)
    bench.report(len(parts), len(parts), "fitted")
    if not records:
        records.append(left_alone("", "", f"no block is left behind {format_mask(bench.mask)}"))
    if all(record.error is None for record in records) and bench.start is UNREPAIRED:
        where = f"{records[0].place}: " if records[0].place else ""
        raise InputError(f"no block can be fitted anew: {where}{records[0].reason}", fix="use linear, or distill")
    return repair, tuple(records)


def _refitted(
    walk: Walk, layer: Layer, part: Part, repair: Repair, ridge: Ridge, sinks: float, gap_follows: bool
) -> tuple[Repair, GapRecord]:
    """The repair with a new last projection for one block, if held-out text is better off with it."""
    place = projection(walk.bench.model, part)
    if isinstance(place, str):
        return repair, left_alone("", part.path, place)
    if not layer.identity:
        return repair, left_alone("", place.weight, "norms or scales stand on the stream behind it")
    if gap_follows and place.weight in walk.bench.start.weights:
        return repair, left_alone("", place.weight, FOLDED)
    look, bias = _Look(walk, layer, part, place, repair, sinks), place.bias is not None
    try:
        sums, before = look.sums(), look.missing(repair)
        tries = ridges(ridge, RIDGES)
        maps = [(ridge_map(sums, str(part.block), ridge=r, constant=bias, alike=True), r) for r in tries]
        tried = [(look.with_map(each), r) for each, r in maps]
    except InputError as error:
        return repair, left_alone("", place.weight, error.what)
    if not before:
        return repair, left_alone("", place.weight, NOTHING)
    error, used, made = min(((look.missing(made) / before, r, made) for made, r in tried), key=lambda each: each[:2])
    settings: dict[str, str | int | float] = {"ridge": used, "sinks": sinks}
    record = GapRecord(
        removed="", place=place.weight, added_parameters=0, settings=settings, error=error, applied=error < 1
    )
    return (made, record) if error < 1 else (repair, record.model_copy(update={"reason": WORSE}))


def maps_in(bench: Bench) -> dict[Block, Gap]:
    """The gaps in which a linear map stands by now for what was in them and no more, by the first block of each."""
    held = {path: each for path, each in bench.start.replacements.items() if path not in bench.start.spans}
    found = [gap for gap in gaps(bench.anatomy, bench.mask) if gap.path in held and held[gap.path].kind == "linear"]
    return {gap.part.block if gap.part else gap.layer.parts[0].block: gap for gap in found}


def _refilled(walk: Walk, gap: Gap, repair: Repair, ridge: Ridge, sinks: float) -> tuple[Repair, GapRecord]:
    """The repair with a new map of the same form in a gap, if held-out text is better off with it than with the old."""
    old = repair.replacements[gap.path]
    form = ClosedForm("stream" if old.norm == "none" else "input", old.rank, ridge, sinks, target="dense")
    empty = replace(repair, replacements={path: r for path, r in repair.replacements.items() if path != gap.path})
    try:
        fitted = fitted_at(walk, gap, form, empty)
    except InputError as error:
        return repair, left_alone(str(gap), gap.path, error.what)
    new = replacement(fitted, device_of(walk.bench.model, gap), walk.bench.model.dtype)
    made = replace(repair, replacements={**repair.replacements, gap.path: new})
    later = () if gap.part is None else gap.layer.parts[gap.layer.parts.index(gap.part) + 1 :]
    before, after = (missing(walk, gap.layer, later, each, sinks) for each in (repair, made))
    error = after / before if before else 1.0
    record = record_of(str(gap), gap.path, form, fitted)
    record = record.model_copy(update={"added_parameters": 0, "error": error, "applied": error < 1})
    return (made, record) if error < 1 else (repair, record.model_copy(update={"reason": WORSE}))


def missing(walk: Walk, layer: Layer, silent: Iterable[Part], repair: Repair, sinks: float) -> float:
    """The sum of w |r|^2 / |z|^2 over the held-out tokens behind a layer without some of its blocks."""
    total = 0.0
    for batch in walk.held_out:
        look, mask = behind(walk.bench.model, layer, silent), walk.bench.mask
        wanted = walk.at(layer, batch, DENSE, UNREPAIRED, look).float()
        stream = walk.at(layer, batch, mask, repair, look).float()
        apart = flat(wanted - stream).square().sum(-1) / flat(wanted).square().sum(-1)
        total += float((apart * token_weights(stream, walk.axes.get(layer.path, 1), sinks)).sum())
    return total


@dataclass
class _Look:
    """What the last projection of a block is given, and what is missing behind the block, token by token.

    gain: of each channel, between projection and stream, 0 where it is not known; scaled: whether tokens have scales.
    Both are known from the first micro-batch on.
    """

    walk: Walk
    layer: Layer
    part: Part
    place: Projection
    repair: Repair
    sinks: float
    gain: Tensor | None = field(default=None, init=False)
    scaled: bool = field(default=False, init=False)

    def sums(self) -> NormalEquations:
        """Of h, and of what is missing divided by the scale, over the text to fit on."""
        return NormalEquations.of(map(self._tokens, self.walk.fit))

    def missing(self, repair: Repair) -> float:
        """What is missing behind the block on held-out text, with this repair as it is."""
        return missing(self.walk, self.layer, self._later, repair, self.sinks)

    def _tokens(self, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """h [tokens, inputs], what is missing beside the scale [tokens, outputs], and the weights [tokens]."""
        owner = self.place.weight.rpartition(".")[0]
        wanted = self._stream(batch, self._later, dense=True)
        with recorded({owner: self.model.get_submodule(owner)}) as calls:
            stream = self._stream(batch, self._later)
        without = self._stream(batch, (self.part, *self._later))
        made = calls.get(owner, ())
        if len(made) != 1:
            raise UnsupportedModelError(f"{owner} is called {len(made)} times", fix="leave it as it is")
        h, given = flat(next(value for _, value in made[0].inputs())), flat(tensor_of(made[0].output)).float()
        update = flat(stream - without)
        if given.shape != update.shape:
            raise UnsupportedModelError(f"{owner} is not given each token once", fix="leave it as it is")
        if self.gain is None:
            rounding = torch.finfo(self.model.dtype).eps * flat(stream.abs() + without.abs())
            self.gain, self.scaled = between(update, given, rounding)
        scale = scale_of(update, given, self.gain) if self.scaled else torch.ones_like(update[:, 0])
        weights = self._weights(stream) * scale.square() / flat(wanted).square().mean(-1)
        return h, flat(wanted - stream) / torch.where(scale == 0, torch.inf, scale)[:, None], weights

    def _weights(self, stream: Tensor) -> Tensor:
        return token_weights(stream, self.walk.axes.get(self.layer.path, 1), self.sinks)

    def _stream(self, batch: Examples, silent: Iterable[Part], dense: bool = False) -> Tensor:
        """Behind the layer, without what some of its blocks add, in float32."""
        mask, made = (DENSE, UNREPAIRED) if dense else (self.walk.bench.mask, self.repair)
        return self.walk.at(self.layer, batch, mask, made, behind(self.model, self.layer, silent)).float()

    @property
    def _later(self) -> tuple[Part, ...]:
        return self.layer.parts[self.layer.parts.index(self.part) + 1 :]

    @property
    def model(self) -> PreTrainedModel:
        return self.walk.bench.model

    def with_map(self, found: LinearMap) -> Repair:
        """The repair with the map in the parameters of the projection."""
        assert self.gain is not None  # `sums` has seen it
        behind_it = torch.where(self.gain == 0, 0.0, 1 / self.gain).to(found.weight)
        more = found.weight * behind_it
        made = {self.place.weight: more.T if self.place.turned else more}
        if self.place.bias is not None:
            made[self.place.bias] = found.bias * behind_it
        held = {name: self.repair.weights.get(name, self.model.get_parameter(name).data) for name in made}
        weights = {name: (held[name].to(delta) + delta).to(held[name]).contiguous() for name, delta in made.items()}
        return replace(self.repair, weights={**self.repair.weights, **weights}, made_up=self.walk.bench.mask)


def between(update: Tensor, given: Tensor, rounding: Tensor) -> tuple[Tensor, bool]:
    """The gain per channel in update = gain * given * scale, and whether tokens have a scale; the simplest that holds.

    All [tokens, outputs]; rounding: of each entry of the stream. Nothing (1, 1), one gain for all, then both, where the
    gain is 0 in channels whose rounding hides it or that are all but shut, and tokens count alike.
    UnsupportedModelError if none holds in every entry.
    """
    ones, tiny = torch.ones_like(update[0]), torch.finfo(update.dtype).tiny
    alike = ones * (update * given).sum() / given.square().sum().clamp_min(tiny)
    for gain in (ones, alike):
        if _holds(update, given * gain, rounding):
            return gain, False
    heard = update.square().sum(0) > HEARD * rounding.square().sum(0)
    one, other = (each / each.norm(dim=-1, keepdim=True).clamp_min(tiny) for each in (update * heard, given * heard))
    gain = heard.to(update)
    for turn in range(ROUNDS):
        scale = scale_of(one, other, gain) if turn else torch.ones_like(update[:, 0])
        gain = torch.where(heard, scale_of(one.T, other.T, scale), 0.0)
    found = given * gain * scale_of(update, given, gain)[:, None]
    if not bool(heard.any()) or not _holds(update[:, heard], found[:, heard], rounding[:, heard]):
        reason = "more than a gain and a scale stand between its last projection and the stream"
        raise UnsupportedModelError(reason, fix="leave it as it is")
    return torch.where(gain.abs() < CLOSED * gain.abs().max(), 0.0, gain), True


def _holds(update: Tensor, found: Tensor, rounding: Tensor) -> bool:
    near = NEAR * update.abs().amax(dim=-1, keepdim=True)  # of each token: some are a thousand times others
    return bool(((update - found).abs() <= near + STEPS * rounding).all())


def scale_of(update: Tensor, given: Tensor, gain: Tensor) -> Tensor:
    """s [tokens] of update = gain * given * s, by least squares over channels with a gain; 0 where there is nothing."""
    basis = given * gain
    return (update * basis).sum(-1) / basis.square().sum(-1).clamp_min(torch.finfo(basis.dtype).tiny)
