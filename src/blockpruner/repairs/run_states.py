"""The states around a run of removed blocks: what reaches its place, and what is missing behind it.

What stands in the first gap of a run that can hold something stands for all of the run, for what is behind it there
hands the stream on. It is given what reaches the gap in the pruned and so far recovered model, and is to add what
brings that model's stream to the dense one's behind the run. So two walks go on through the layers: the dense model's
to the end of the run, the pruned one's to its beginning, where it waits for what is to stand there. Cost for all runs:
a pass of either, see `side_by_side`. Memory: as there, and the states of one run, IN_MEMORY bytes of them in memory,
the rest on disk.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import Call, Enough
from blockpruner.blocks import Block, Mask
from blockpruner.engine.spilling import Spill
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.arrivals import Taking, arrival, parts_behind
from blockpruner.repairs.closed_form import Given, regressors_of
from blockpruner.repairs.folded_runs import Run, runs
from blockpruner.repairs.neurons import Neurons, neurons_in
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.side_by_side import IN_MEMORY, Walk, side_by_side
from blockpruner.repairs.updates import Observed, behind, flat, layer_of, token_weights
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Gap, Repair, attach, gaps
from blockpruner.texts.examples import Examples

T = TypeVar("T")
States = Spill[tuple[str, int]]  # x, y and weights of each piece


@dataclass(frozen=True)
class RunStates:
    """The tokens around one run, in pieces of about as many as a window has, mixed from the windows of a micro-batch.

    gap: the place of what is to stand for the run; normal: what an MLP there is given of the states; neurons: those of
    the run's own MLPs that are known; spread: standard deviation of each channel of the dense model's
    stream behind the run, in the unit of y, [outputs]; fit, held_out: the pieces of either text.
    """

    gap: Gap
    normal: Given
    neurons: tuple[Neurons, ...]
    spread: Tensor
    fit: range
    held_out: range
    states: States

    @property
    def width(self) -> int:
        """Of the stream."""
        return len(self.spread)

    @property
    def observed(self) -> tuple[Iterator[Observed], Iterator[Observed]]:
        """All pieces of the text to fit on, and of the held-out text."""
        return map(self.piece, self.fit), map(self.piece, self.held_out)

    def piece(self, number: int) -> Observed:
        """x reaches the gap, y is to be added there; tokens that weigh nothing are in no piece."""
        x, y, weights = (self.states.get((side, number)).float() for side in "xyw")
        return Observed(x, y, weights)


def runs_to_fill(anatomy: Anatomy, mask: Mask) -> list[Run]:
    """The runs that `mask` makes, in the order in which the model runs, each of which one thing can stand for.

    Where blocks of one layer read the same stream (parallel ones, and whatever is not known to be serial), a run that
    goes on into a layer that keeps a block ends before it: that block would be given what it never reads. Where norms
    stand on the stream, as in BERT, what is gone of a layer that keeps a block is a run of its own.
    """
    alike = {layer.path for stack in anatomy.stacks if not stack.serial for layer in stack.layers}
    found: list[Run] = []
    for run in runs(anatomy, mask):
        pieces, apart = list[list[Block]](), True
        layers = {layer.path: layer for layer in (layer_of(anatomy, block) for block in run.blocks)}
        for layer in layers.values():
            gone = [part.block for part in layer.parts if part.block in run.blocks]
            keeps = len(gone) < len(layer.parts)
            if apart or (keeps and (layer.path in alike or not layer.identity)):
                pieces.append([])
            pieces[-1] += gone
            apart = keeps and not layer.identity
        found += [replace(run, blocks=tuple(blocks)) for blocks in pieces]
    return found


@dataclass(frozen=True)
class Walks:
    """The two walks, over the same micro-batches; see `walks_of`."""

    pruned: Walk
    dense: Walk


@contextmanager
def walks_of(bench: Bench) -> Iterator[Walks]:
    """The walks for all runs of a bench, in order."""
    whole = replace(bench, mask=DENSE, start=UNREPAIRED)
    with side_by_side(bench, dense=False) as pruned, side_by_side(whole, dense=False) as dense:
        yield Walks(pruned, dense)


@contextmanager
def run_states(bench: Bench, run: Run, repair: Repair, walks: Walks, sinks: float = 0.0) -> Iterator[RunStates]:
    """The states around a run of the model with a repair, which is what stands before the run.

    sinks: the weight of the first position of every window, see `UpdatesAt`. UnsupportedModelError where nothing can
    stand for the run; InputError for states that are not finite.
    """
    with States(IN_MEMORY, fix="free some disk space, or fit on less text") as states:
        yield _read(_Around(bench, run, repair, walks, sinks), states)


def _read(around: "_Around", states: States) -> RunStates:
    """Fill `states` from both walks."""
    bench, run, walks = around.bench, around.run, around.walks
    gap, scale = around.place()
    (normal,) = regressors_of("input", bench.model, gap)
    neurons = tuple(around.neurons(normal))
    parts = [*walks.pruned.fit, *walks.pruned.held_out], [*walks.dense.fit, *walks.dense.held_out]
    spread, count, ends, device = Spread(), 0, [0], bench.model.device
    for number, (batch, same) in enumerate(zip(*parts, strict=True)):
        bench.report(number, len(parts[0]), f"reading the states around {run}")
        x, stream, weights = around.before(gap, batch)
        counts, device = weights > 0, x.device
        wanted = around.behind(same).to(stream.device)[counts]
        x, y, weights = x[counts], (wanted - stream[counts]) / scale, weights[counts]
        _check_finite(run, x, y)
        if number < len(walks.pruned.fit):
            spread.add(wanted / scale)
        for rows in _shuffled(len(x), bench.examples.tokens, number):
            states.put(("x", count), x[rows])
            states.put(("y", count), y[rows].to(x))
            states.put(("w", count), weights[rows])
            count += 1
        if number + 1 in (len(walks.pruned.fit), len(parts[0])):
            ends.append(count)
    fit, held_out = range(ends[0], ends[1]), range(ends[1], ends[2])
    if not (fit and held_out):
        raise InputError(f"no token says anything of {run}", fix="give longer windows")
    return RunStates(gap, normal, neurons, spread.found().to(device), fit, held_out, states)


@dataclass(frozen=True)
class _Around:
    """Looks at a run from both ends."""

    bench: Bench
    run: Run
    repair: Repair
    walks: Walks
    sinks: float

    def place(self) -> tuple[Gap, float]:
        """The first gap of the run where something can stand, and what comes of it in the stream, beside what it is."""
        blocks = frozenset(self.run.blocks)
        inside = [gap for gap in gaps(self.bench.anatomy, self.bench.mask) if gap.blocks <= blocks]
        why = ""
        if any(gap.part is not None and not gap.layer.identity for gap in inside):
            why, inside = "norms or scales stand on the stream between its blocks", []
        for gap in inside:
            if gap.kept:
                why = why or f"{gap} goes on running, since other blocks use what it makes"
                continue
            scale = self._pruned(gap, self.walks.pruned.fit[0], functools.partial(arrival, self.bench.model, gap))
            if scale is not None:
                return gap, scale
            why = why or f"what is put at {gap.path} does not come out of the layer as it went in"
        raise UnsupportedModelError(why, fix="use linear")

    def neurons(self, normal: Given) -> Iterator[Neurons]:
        """Those of the run's MLPs that are known, as functions of the normed stream."""
        walk = self.walks.dense
        for block in self.run.blocks:
            layer, part = layer_of(self.bench.anatomy, block), self.bench.anatomy.parts[block]
            walk.lead_to(layer, UNREPAIRED)
            look = functools.partial(neurons_in, self.bench.model, layer, part, normal)
            found = walk.at(layer, walk.fit[0], DENSE, UNREPAIRED, look)
            if found is not None:
                yield found

    def before(self, gap: Gap, batch: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """What reaches the gap in the pruned model, the stream right behind it, and what each token weighs."""

        def look(module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
            attach(self.bench.model, gap.path, None)
            stream = behind(self.bench.model, gap.layer, parts_behind(gap))(module, call)
            attach(self.bench.model, gap.path, taking := Taking())
            with suppress(Enough):
                call.again(module, {gap.layer.hidden: dict(call.inputs())[gap.layer.hidden].clone()})
            assert taking.seen is not None  # `place` has put something there
            return flat(taking.seen), stream

        x, stream = self._pruned(gap, batch, look)
        weights = token_weights(stream, self.walks.pruned.axes.get(gap.layer.path, 1), self.sinks)
        if len(x) != len(weights):
            raise UnsupportedModelError(f"{gap} does not see the tokens that are behind it", fix="use linear")
        return x, flat(stream).float(), weights

    def behind(self, batch: Examples) -> Tensor:
        """The dense model's stream behind the run, [tokens, outputs]."""
        layer, walk = layer_of(self.bench.anatomy, self.run.blocks[-1]), self.walks.dense
        later = layer.parts[[part.block for part in layer.parts].index(self.run.blocks[-1]) + 1 :]
        walk.lead_to(layer, UNREPAIRED)
        return flat(walk.at(layer, batch, DENSE, UNREPAIRED, behind(self.bench.model, layer, later))).float()

    def _pruned(self, gap: Gap, batch: Examples, look: Callable[[nn.Module, Call], T]) -> T:
        self.walks.pruned.lead_to(gap.layer, self.repair)
        return self.walks.pruned.at(gap.layer, batch, self.bench.mask, self.repair, look)


class Spread:
    """Mean and standard deviation of each channel of states [tokens, channels], by sums in float64."""

    def __init__(self) -> None:
        self.count, self.sums = 0, torch.zeros(2, 1)

    def add(self, states: Tensor) -> None:
        home = "cpu" if states.device.type == "mps" else states.device  # it has no float64
        wide = states.to(home, torch.float64)
        self.count += len(wide)
        self.sums = self.sums.to(wide) + torch.stack([wide.sum(0), wide.square().sum(0)])

    def mean(self) -> Tensor:
        return (self.sums[0] / max(1, self.count)).float()

    def found(self) -> Tensor:
        """[channels], each at least a thousandth of the middle one."""
        mean, square = self.sums / max(1, self.count)
        spread = (square - mean.square()).clamp_min(0).sqrt().float()
        return spread.clamp_min(1e-3 * float(spread.median())).clamp_min(torch.finfo(torch.float32).tiny)


def _shuffled(tokens: int, size: int, seed: int) -> list[Tensor]:
    """Tokens in an order drawn by `seed`, in parts of about `size`; where they are few, one part."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return list(order.chunk(max(1, round(tokens / size)))) if tokens else []


def _check_finite(run: Run, *states: Tensor) -> None:
    if not all(bool(torch.isfinite(each).all()) for each in states):
        raise InputError(
            f"the states around {run} are NaN or infinite, so nothing can be fitted to them",
            fix="load the model in float32 or bfloat16, or remove fewer blocks",
        )
