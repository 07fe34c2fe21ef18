"""Maps in the gaps of a pruned model, trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from blockpruner.errors import UnsupportedModelError
from blockpruner.repairs.closed_form import MADE_UP, TAKEN, ClosedForm, fill_gaps, left_alone, regressors_of
from blockpruner.repairs.courses import numbers_in
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench, GapRecord, Trained
from blockpruner.repairs.taught import Loss, Taught
from blockpruner.repairs.teaching import check_predicts
from blockpruner.repairs.tuning import UNHELPED, Told, live, still, told, trained
from blockpruner.repairs.updates import UpdatesAt, token_axes
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import Gap, Repair, device_of, gaps
from blockpruner.texts.examples import Examples


def train_adapters(
    bench: Bench,
    options: Trained,
    rank: int,
    init: Literal["linear", "zero"],
    loss: Literal["block"] | Loss,
    temperature: float,
) -> tuple[Repair, tuple[GapRecord, ...]]:
    """A trained map in every gap that can have one, and in those that have one; see the recovery `adapter`."""
    if loss != "block":
        check_predicts(bench.model, bench.examples)
    closed, begun, alone = _begun(bench, options, rank, init, loss)
    maps = {path: live(module, options) for path, module in begun.replacements.items()}
    places = {gap.path: gap for gap in gaps(bench.anatomy, bench.mask) if gap.path in maps}
    if loss == "block":  # what stands for more than its gap has no block of its own to be like
        alone += [left_alone(str(gap), path, TAKEN) for path, gap in places.items() if path in begun.spans]
        places = {path: gap for path, gap in places.items() if path not in begun.spans}
        made_up = {path: gap for path, gap in places.items() if gap.blocks <= begun.made_up}
        alone += [left_alone(str(gap), path, MADE_UP) for path, gap in made_up.items()]
        places = {path: gap for path, gap in places.items() if path not in made_up}
    if not places:
        return bench.start, tuple(alone)
    pupil = Pupil(bench.model, bench.anatomy, bench.mask, replace(begun, replacements=maps))
    numbers = numbers_in({at: maps[at] for at in places})
    if loss == "block":
        updates = Updates(bench, places, pupil.repair)
        trace = trained(bench, options, pupil, numbers, updates, updates.measure)
    else:
        taught = Taught(loss, temperature).lesson(pupil, bench.examples)
        trace = trained(bench, options, pupil, numbers, taught)
    helped = bool(trace.best(bench.force))  # if not, only what has a closed form is worth something
    settings: Told = {"init": init, "loss": loss, **told(options, trace, bench.force)}
    records = [
        GapRecord(
            removed=str(gap),
            place=path,
            added_parameters=sum(p.numel() for p in maps[path].parameters()),
            settings={"rank": maps[path].rank, **settings},
            error=None,
            applied=helped or path in closed.replacements,
            reason="" if helped else UNHELPED,
            curve=trace.curve,
        )
        for path, gap in places.items()
    ]
    if not helped:
        return closed, (*records, *alone)
    made = {path: still(module, bench.model) for path, module in maps.items()}
    return replace(begun, replacements=made), (*records, *alone)


class Updates:
    """What is missing of removed blocks' updates, with the maps in their gaps: |r(x) - y|^2 / |y|^2, mean over gaps.

    x reaches the gap in the pruned model as it is recovered by now, y is what the block would add there; sums are over
    the tokens of a pass, without the first of every row. Summed over windows. Cost: n/2 forward passes for n gaps, and
    nothing goes backward through the model.
    """

    def __init__(self, bench: Bench, places: Mapping[str, Gap], repair: Repair) -> None:
        self.model, self.repair = bench.model, repair
        axes = token_axes(bench.model)
        self.seen = {
            path: UpdatesAt(bench.model, bench.anatomy, bench.mask, gap, repair, sinks=0.0, dense=False, axes=axes)
            for path, gap in places.items()
        }

    def weigh(self, part: Examples) -> float:
        """Windows."""
        return float(len(part.targets))

    def backward(self, part: Examples, scale: float) -> float:
        total = 0.0
        with torch.inference_mode(False), torch.enable_grad():
            for path in self.seen:
                value = self._missing(path, part)
                (value * scale).backward()
                total += float(value.detach())
        return total

    @torch.no_grad()
    def measure(self, part: Examples) -> float:
        """The sum over these windows."""
        return sum(float(self._missing(path, part)) for path in self.seen)

    def _missing(self, path: str, part: Examples) -> Tensor:
        seen = self.seen[path].observe(part)
        error = (self.repair.replacements[path](seen.x) - seen.y).float().square().sum(-1) @ seen.weights
        power = (seen.y.float().square().sum(-1) @ seen.weights).clamp_min(1e-30)
        return self.weigh(part) * error / (power * len(self.seen))


def _begun(bench: Bench, options: Trained, rank: int, init: str, loss: str) -> tuple[Repair, Repair, list[GapRecord]]:
    """What there is without training, what training begins with, and the records of gaps that nothing can be put in."""
    repair, alone = bench.start, list[GapRecord]()
    if init == "linear":
        repair, _ = fill_gaps(bench, ClosedForm("auto", rank))
    closed = repair
    axes = token_axes(bench.model)
    for number, gap in enumerate(gaps(bench.anatomy, bench.mask)):
        if repair.stands_for(gap):
            continue
        if loss == "block" and gap.blocks <= repair.made_up:
            alone.append(left_alone(str(gap), gap.path, MADE_UP))
            continue
        try:
            made = _empty(bench, gap, repair, rank, axes, (options.seed * 1_000_003 + number) % 2**63)
        except UnsupportedModelError as error:
            alone.append(left_alone(str(gap), gap.path, error.what))
        else:
            repair = replace(repair, replacements={**repair.replacements, gap.path: made})
    return closed, repair, alone


def _empty(bench: Bench, gap: Gap, repair: Repair, rank: int, axes: Mapping[str, int], seed: int) -> Replacement:
    """A map of the block's own normed input that gives zeros; UnsupportedModelError where none can stand."""
    if gap.kept:
        raise UnsupportedModelError(f"{gap} goes on running, since other blocks use what it makes", fix="leave it")
    updates = UpdatesAt(*(bench.model, bench.anatomy, bench.mask, gap, repair), sinks=0.0, dense=False, axes=axes)
    seen = updates.observe(next(bench.examples.rows()))
    (given,) = regressors_of("input", bench.model, gap)
    inputs = seen.x.shape[-1]
    made = Replacement("linear", inputs, seen.y.shape[-1], rank, given.norm, given.eps)
    if rank:
        noise = torch.randn(inputs, rank, generator=torch.Generator().manual_seed(seed))
        made.down.data = noise / inputs**0.5
    return made.to(device_of(bench.model, gap), bench.model.dtype).requires_grad_(False)
