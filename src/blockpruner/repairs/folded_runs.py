"""ReplaceMe for any plan: each run of removed blocks made up for by a map folded into the block before it.

Runs are folded in the order of depth, on the states of the pruned and so far recovered model. What is mapped is what
the block before the run adds to the stream; what is missing is what the run would add to the same stream, or what
brings it to the dense model's. Cost per run: four forward passes of the model up to it, over all text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from blockpruner.anatomy.parts import Anatomy
from blockpruner.blocks import Block, Mask, format_mask
from blockpruner.errors import InputError
from blockpruner.repairs.closed_form import MADE_UP, TAKEN, WORSE, Ridge, Target, left_alone, ridges
from blockpruner.repairs.folding import Projection, foldable, projection
from blockpruner.repairs.normal_equations import LinearMap, NormalEquations, ridge_map
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.repairs.side_by_side import BATCH_TOKENS
from blockpruner.repairs.updates import contribution, flat, layer_of, stream_after, token_axes, token_weights
from blockpruner.surgery.gaps import Repair, gaps, reweighted
from blockpruner.texts.examples import Examples


@dataclass(frozen=True)
class Run:
    """Removed blocks that follow each other, and the block that is left before them; None at the beginning."""

    blocks: tuple[Block, ...]
    before: Block | None

    def __str__(self) -> str:
        return format_mask(self.blocks)


def runs(anatomy: Anatomy, mask: Mask) -> list[Run]:
    """The runs that `mask` makes, in the order in which the model runs."""
    found: list[Run] = []
    for stack in anatomy.stacks:
        before: Block | None = None
        run: list[Block] = []
        for block in [part.block for layer in stack.layers for part in layer.parts]:
            if block in mask:
                run.append(block)
                continue
            if run:
                found.append(Run(tuple(run), before))
            before, run = block, []
        if run:
            found.append(Run(tuple(run), before))
    return found


def fold_runs(bench: Bench, ridge: Ridge, sinks: float, target: Target) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New last projections for the blocks before the runs. InputError, with the reasons, if no run can be folded."""
    repair, records, axes = bench.start, list[GapRecord](), token_axes(bench.model)
    reasons, places = foldable(bench.model, bench.anatomy), runs(bench.anatomy, bench.mask)
    done = [gap.blocks for gap in gaps(bench.anatomy, bench.mask) if bench.start.stands_for(gap)]
    for number, run in enumerate(places):
        bench.report(number, len(places), f"fitting {run}")
        if any(blocks <= set(run.blocks) for blocks in done):
            records.append(left_alone(str(run), "", TAKEN))
            continue
        if target == "block" and bench.start.made_up.intersection(run.blocks):
            records.append(left_alone(str(run), "", MADE_UP))
            continue
        if obstacle := _obstacle(bench.anatomy, run, reasons):
            records.append(left_alone(str(run), "", obstacle))
            continue
        fit = _Fit(bench, run, repair, sinks, target, axes)
        repair, record = fit.folded(ridge)
        records.append(record)
    if records and all(record.error is None and record.reason not in (MADE_UP, TAKEN) for record in records):
        why = "; ".join(f"{record.removed}: {record.reason}" for record in records[:3])
        raise InputError(f"nothing can be folded here: {why}", fix="use linear, which adds a map in the blocks' place")
    return repair, tuple(records)


def _obstacle(anatomy: Anatomy, run: Run, reasons: Mapping[str, str]) -> str:
    if run.before is None:
        return "no block is left before it"
    if reason := reasons[str(run.before)]:
        return f"{run.before} cannot take a map: {reason}"
    if any(not layer_of(anatomy, block).identity for block in run.blocks):
        return "norms or scales stand on the stream between its blocks"
    return ""


@dataclass(frozen=True)
class _Fit:
    """One run that can be folded, on the model as repaired before it."""

    bench: Bench
    run: Run
    repair: Repair
    sinks: float
    target: Target
    axes: Mapping[str, int]

    @property
    def before(self) -> Block:
        assert self.run.before is not None  # else there is an obstacle
        return self.run.before

    def folded(self, ridge: Ridge) -> tuple[Repair, GapRecord]:
        """The repair with this run's map, if held-out text is better off with it, and the record of it."""
        place = projection(self.bench.model, self.bench.anatomy.parts[self.before])
        assert isinstance(place, Projection)
        found, used, error = self._chosen(ridge, constant=place.bias is not None)
        record = GapRecord(
            removed=str(self.run),
            place=place.weight,
            added_parameters=0,
            settings={"folded into": str(self.before), "ridge": used, "target": self.target, "sinks": self.sinks},
            error=error,
            applied=True,
        )
        if not error < 1 and not self.bench.force:
            return self.repair, record.model_copy(update={"applied": False, "reason": WORSE})
        with reweighted(self.bench.model, self.repair.weights):
            weights = place.folded(self.bench.model, found.weight, found.bias)
        assert weights is not None  # there is a constant only where the projection has a bias
        made_up = self.repair.made_up.union(self.run.blocks)
        return replace(self.repair, weights={**self.repair.weights, **weights}, made_up=made_up), record

    def _chosen(self, ridge: Ridge, constant: bool) -> tuple[LinearMap, float, float]:
        """The map, its ridge, and the share of what was missing on held-out text that is still missing with it."""
        what = str(self.run)
        fit, held_out = (self._gathered(examples) for examples in (self.bench.examples, self.bench.held_out))
        held_out.check(f"{what} in the held-out text")
        power = held_out.power()
        maps = [(ridge_map(fit, what, ridge=value, constant=constant), value) for value in ridges(ridge)]
        tried = [(found, value, held_out.error(found) / power if power else 1.0) for found, value in maps]
        return min(tried, key=lambda one: one[2])

    def _gathered(self, examples: Examples) -> NormalEquations:
        """Sums of what the block before the run adds, and of what is missing behind the run."""
        return NormalEquations.of(map(self._observed, examples.batches(BATCH_TOKENS)))

    def _observed(self, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        model, anatomy, mask, repair = self.bench.model, self.bench.anatomy, self.bench.mask, self.repair
        behind, added = contribution(model, anatomy, self.before, mask, batch, repair)
        if self.target == "dense":
            wanted = stream_after(model, anatomy, self.run.blocks[-1], frozenset(), batch)
        else:
            left = mask - frozenset(self.run.blocks)
            wanted = stream_after(model, anatomy, self.run.blocks[-1], left, batch, repair)
        axis = self.axes[layer_of(anatomy, self.before).path]
        return flat(added), flat(wanted - behind.to(wanted.device)), token_weights(behind, axis, self.sinks)
