"""Kept blocks fitted anew: their last projections changed so that the stream behind them is the dense model's again.

Behind the first gap every block is given states that it was not made for, and adds on to what is missing. A block that
is left has features of its own, h, in front of its last projection W: with W + D instead of W it can make up for a part
of that, without a parameter more. D minimises, by least squares over tokens t of weight w,

    sum_t w_t |r_t - g * (h_t D) s_t|^2 / |z_t|^2 + ridge m |D g|^2,

where z is the dense model's stream behind the block, r what brings the pruned model's to it, and m the mean variance of
an entry of h. What stands between projection and stream is a gain per channel, g (a multiplier, a layer's scale), and a
scale per token, s (a norm's, as it was with W), both 1 where nothing does; that there is no more is proved on the first
micro-batch: what the block adds is g * (h W + c) s in every entry. Errors count beside |z|, since the next norm divides
by that.

Blocks are fitted in the order of depth, each on the model as it is with those before it, so that what one leaves is the
next one's to do. Cost per token: about two forward passes of the dense model, three to four of the pruned one, and
inputs^2 + inputs * outputs multiply-adds per block. Memory: see `side_by_side`, and the sums of one projection.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Layer, Part
from blockpruner.anatomy.probing import recorded
from blockpruner.errors import UnsupportedModelError
from blockpruner.repairs.closed_form import WORSE, Ridge, Sums, left_alone, ridges
from blockpruner.repairs.folding import Projection, projection
from blockpruner.repairs.normal_equations import LinearMap, NormalEquations, ridge_map
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.side_by_side import Walk, side_by_side
from blockpruner.repairs.updates import behind, flat, tensor_of, token_weights
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Repair
from blockpruner.texts.examples import Examples

ROUNDS = 20  # of finding gain and scale, each from the other
SMALLEST = 1e-6  # gain beside the largest one that is worth anything


def refit_kept(bench: Bench, ridge: Ridge, sinks: float) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New last projections for the blocks that are left behind the first gap, and what became of each of them.

    UnsupportedModelError, with the first reason, if none of them can be fitted.
    """
    repair, records, differ = bench.start, list[GapRecord](), bool(bench.start.weights)
    with side_by_side(bench, dense=True) as walk:
        for number, layer in enumerate(walk.layers):
            bench.report(number, len(walk.layers), f"fitting {layer.path}")
            for part in layer.parts:
                if part.block in bench.mask:
                    differ = True
                elif differ:
                    walk.lead_to(layer, repair)
                    repair, record = _refitted(walk, layer, part, repair, ridge, sinks)
                    records.append(record)
    bench.report(len(walk.layers), len(walk.layers), "fitted")
    if records and all(record.error is None for record in records):
        raise UnsupportedModelError(
            f"no block that is left can be fitted anew: {records[0].place}: {records[0].reason}", fix="use linear"
        )
    return repair, tuple(records)


def _refitted(
    walk: Walk, layer: Layer, part: Part, repair: Repair, ridge: Ridge, sinks: float
) -> tuple[Repair, GapRecord]:
    """The repair with a new last projection for one block, if held-out text is better off with it."""
    place = projection(walk.bench.model, part)
    if isinstance(place, str):
        return repair, left_alone("", part.path, place)
    if not layer.identity:
        return repair, left_alone("", place.weight, "norms or scales stand on the stream behind it")
    look = _Look(walk, layer, part, place, repair, sinks)
    try:
        sums = look.sums(walk.fit), look.sums(walk.held_out)
    except UnsupportedModelError as error:
        return repair, left_alone("", place.weight, error.what)
    found, used, error = _chosen(sums, ridge, str(part.block), constant=place.bias is not None)
    record = GapRecord(
        removed="",
        place=place.weight,
        added_parameters=0,
        settings={"ridge": used, "sinks": sinks},
        error=error,
        applied=error < 1,
        reason="" if error < 1 else WORSE,
    )
    if not record.applied and not walk.bench.force:
        return repair, record
    weights = {**repair.weights, **look.added(found)}
    return replace(repair, weights=weights, made_up=walk.bench.mask), record


def _chosen(sums: Sums, ridge: Ridge, what: str, constant: bool) -> tuple[LinearMap, str, float]:
    """The map, each of whose outputs has the ridge that leaves it the least error on held-out text, or nothing.

    Outputs do not depend on each other, and some have a thousand times the power of others: these would choose for all.
    Also the ridges in use, and the share of the error that is left.
    """
    fit, held_out = sums
    held_out.check(f"{what} in the held-out text")
    nothing = LinearMap(torch.zeros_like(fit.products()[1]), None, torch.zeros_like(fit.means[1]))
    before = held_out.errors(nothing)
    least, weight, bias, used = before.clone(), nothing.down, nothing.bias, torch.full_like(before, torch.inf)
    for each in ridges(ridge):
        found = ridge_map(fit, what, ridge=each, constant=constant)
        errors = held_out.errors(found)
        better = errors < least
        least, used = torch.where(better, errors, least), torch.where(better, each, used)
        weight, bias = torch.where(better, found.weight, weight), torch.where(better, found.bias, bias)
    spent = used[used.isfinite()].tolist()
    said = f"{min(spent):g} to {max(spent):g}, {len(spent)} of {len(used)} outputs" if spent else "none"
    return LinearMap(weight, None, bias), said, float(least.sum() / before.sum()) if float(before.sum()) else 1.0


@dataclass
class _Look:
    """What the last projection of a block is given, and what is missing behind the block, token by token.

    gain: of each channel, between projection and stream; known from the first micro-batch on.
    """

    walk: Walk
    layer: Layer
    part: Part
    place: Projection
    repair: Repair
    sinks: float
    gain: Tensor | None = field(default=None, init=False)

    def sums(self, batches: Sequence[Examples]) -> NormalEquations:
        """Of h, and of what is missing divided by the scale."""
        found: NormalEquations | None = None
        for batch in batches:
            h, missing, weights = self._tokens(batch)
            found = found or NormalEquations(h.shape[-1], missing.shape[-1], h.device)
            found.add(h, missing, weights)
        assert found is not None  # a text has a window
        return found

    def _tokens(self, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """h [tokens, inputs], what is missing beside the scale [tokens, outputs], and the weights [tokens]."""
        later = self.layer.parts[self.layer.parts.index(self.part) + 1 :]
        owner = self.place.weight.rpartition(".")[0]
        wanted = self._stream(batch, later, dense=True).float()
        with recorded({owner: self.model.get_submodule(owner)}) as calls:
            stream = self._stream(batch, later)
        update = flat((stream - self._stream(batch, (self.part, *later))).float())
        made = calls.get(owner, ())
        if len(made) != 1:
            raise UnsupportedModelError(f"{owner} is called {len(made)} times", fix="leave it as it is")
        h, given = flat(next(value for _, value in made[0].inputs())), flat(tensor_of(made[0].output)).float()
        if given.shape != update.shape:
            raise UnsupportedModelError(f"{owner} is not given each token once", fix="leave it as it is")
        if self.gain is None:
            self.gain = gain_of(update, given)
            self._prove(update, given, stream)
        scale = scale_of(update, given, self.gain)
        weights = token_weights(stream, self.walk.axes.get(self.layer.path, 1), self.sinks).to(scale)
        weights = weights * scale.square() / flat(wanted).square().mean(-1)
        return h, flat(wanted - stream) / torch.where(scale == 0, torch.inf, scale)[:, None], weights

    def _stream(self, batch: Examples, silent: Iterable[Part], dense: bool = False) -> Tensor:
        """Behind the layer, without what some of its blocks add."""
        mask, repair = (DENSE, UNREPAIRED) if dense else (self.walk.bench.mask, self.repair)
        return self.walk.at(self.layer, batch, mask, repair, behind(self.model, self.layer, silent))

    @property
    def model(self) -> PreTrainedModel:
        return self.walk.bench.model

    def _prove(self, update: Tensor, given: Tensor, stream: Tensor) -> None:
        """UnsupportedModelError if the block adds something else than gain * what it projects * scale."""
        assert self.gain is not None
        off = update - given * self.gain * scale_of(update, given, self.gain)[:, None]
        near, far = (1e-4, 1e-5) if stream.dtype.itemsize >= 4 else (5e-2, 2e-2)
        room = near * float(update.abs().max()) + far * float(stream.abs().max())
        if not float(off.abs().max()) <= room:
            raise UnsupportedModelError(
                "more than a gain and a scale stand between its last projection and the stream", fix="leave it as it is"
            )

    def added(self, found: LinearMap) -> dict[str, Tensor]:
        """The parameters of the projection with the map in them."""
        assert self.gain is not None  # `sums` has seen it
        gain = self.gain.to(found.weight)
        behind = torch.where(gain.abs() > SMALLEST * gain.abs().max(), 1 / gain, 0.0)
        more = found.weight * behind
        made = {self.place.weight: more.T if self.place.turned else more}
        if self.place.bias is not None:
            made[self.place.bias] = found.bias * behind
        now = self.repair.weights
        held = {name: now.get(name, self.model.get_parameter(name).data) for name in made}
        return {name: (held[name].to(delta) + delta).to(held[name]).contiguous() for name, delta in made.items()}


def gain_of(update: Tensor, given: Tensor) -> Tensor:
    """g [outputs] of update = g * given * s, [tokens, outputs] with s a scale per token; by least squares in turn."""
    gain = torch.ones_like(update[0])
    for turn in range(ROUNDS):
        scale = scale_of(update, given, gain) if turn else torch.ones_like(update[:, 0])
        gain = scale_of(update.T, given.T, scale)
    return gain


def scale_of(update: Tensor, given: Tensor, gain: Tensor) -> Tensor:
    """s [tokens] of update = gain * given * s, by least squares; 0 where there is nothing."""
    basis = given * gain
    return (update * basis).sum(-1) / basis.square().sum(-1).clamp_min(torch.finfo(basis.dtype).tiny)
