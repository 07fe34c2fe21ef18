"""Runs of removed blocks made up for by a linear map and a small gated MLP, fitted to states: no pass goes backward
through the model.

The linear map is in closed form. The MLP is trained on what that leaves, from those neurons of the run's own MLPs that
tell most of it, or from random ones where none are known, and with nothing led out of them. It is trained in
coordinates that all have a spread of one, which are put into its weights at the end. The loss is the mean square of
what is missing of each channel beside the spread of that channel of the stream, for the norm of the next block reads
them all, and a few are hundreds of times as large as the rest.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from blockpruner.blocks import format_mask
from blockpruner.errors import UnsupportedModelError
from blockpruner.loading.models import computation
from blockpruner.repairs.closed_form import (
    TAKEN,
    WORSE,
    ClosedForm,
    best_map,
    left_alone,
    record_of,
    replacement,
)
from blockpruner.repairs.courses import Course, Trace, numbers_in
from blockpruner.repairs.folded_runs import Run
from blockpruner.repairs.neurons import Neurons, joined
from blockpruner.repairs.normal_equations import LinearMap
from blockpruner.repairs.recovery import Bench, GapRecord, Trained
from blockpruner.repairs.run_states import RunStates, Spread, run_states, runs_to_fill, walks_of
from blockpruner.repairs.training import train
from blockpruner.repairs.tuning import told
from blockpruner.repairs.updates import Observed
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import Repair, device_of, gaps
from blockpruner.texts.examples import IGNORED, Examples

SMALL = 0.3  # spread of what a neuron makes at first, beside that of a channel
DEAD = 1e-3  # spread of what a neuron makes, beside the largest, below which it is none
TELLING = 32768  # tokens by which neurons are chosen


def neurons_of(run: Run, asked: int, width: int) -> int:
    """So many as asked for; 0 takes what makes the run cost a full-rank map [width, width] for each of its blocks.

    None for a single block.
    """
    usual = (len(run.blocks) - 1) * width // 3
    return asked or usual if len(run.blocks) > 1 else 0


def fill_runs(bench: Bench, options: Trained, neurons: int) -> tuple[Repair, tuple[GapRecord, ...]]:
    """A replacement for every run that is better off with it; see the recovery `mlp`."""
    repair, records = bench.start, list[GapRecord]()
    places, holes = runs_to_fill(bench.anatomy, bench.mask), gaps(bench.anatomy, bench.mask)
    with walks_of(bench) as walks:
        for run in places:
            if any(repair.stands_for(gap) for gap in holes if gap.blocks <= frozenset(run.blocks)):
                records.append(left_alone(str(run), "", TAKEN))
                continue
            try:
                with run_states(bench, run, repair, walks) as states:
                    count = neurons_of(run, neurons, states.width)
                    repair, record = _filled(bench, repair, run, states, options, count)
            except UnsupportedModelError as error:
                record = left_alone(str(run), "", error.what)
            records.append(record)
    bench.report(len(places), len(places), "fitted")
    return repair, tuple(records)


def _filled(
    bench: Bench, repair: Repair, run: Run, states: RunStates, options: Trained, neurons: int
) -> tuple[Repair, GapRecord]:
    """The repair with what stands for one run, if held-out text is better off with it."""
    gap, form = states.gap, ClosedForm("stream" if neurons else "auto", target="dense")
    fitted = best_map(bench.model, gap, form, str(run), *states.observed)
    made, settings, curve = replacement(fitted, device_of(bench.model, gap), bench.model.dtype), {}, ()
    if neurons:
        mlp = RunMlp(states, fitted.found, neurons, options.seed)
        trace = _train(bench, repair, run, mlp, options)
        helped = bool(trace.best(bench.force))  # if not, its numbers are whatever came last, and the map stands alone
        made = mlp.replacement(made) if helped else made
        settings, curve = {"neurons": neurons * helped, **told(options, trace, bench.force)}, trace.curve
    error = _missing(states, made)
    if not math.isfinite(error):
        return repair, left_alone(str(run), gap.path, f"what would stand there is not finite in {bench.model.dtype}")
    record = record_of(str(run), gap.path, form, replace(fitted, error=error))
    record = record.model_copy(
        update={
            "added_parameters": sum(p.numel() for p in made.parameters()),
            "settings": {**record.settings, **settings},
            "curve": curve,
        }
    )
    if not error < 1 and not bench.force:
        return repair, record.model_copy(update={"applied": False, "reason": WORSE})
    blocks = frozenset(run.blocks)
    spans = {**repair.spans, **({} if blocks == gap.blocks else {gap.path: blocks})}
    return replace(repair, replacements={**repair.replacements, gap.path: made}, spans=spans), record


@torch.no_grad()
def _missing(states: RunStates, made: Replacement) -> float:
    """Of what is missing behind the run on held-out text, the share that still is: mean squares of channels beside
    their spreads, as in the training."""
    left = power = 0.0
    for seen in map(states.piece, states.held_out):
        left += float(((made(seen.x) - seen.y) / states.spread).square().sum())
        power += float((seen.y / states.spread).square().sum())
    return left / power if power else 1.0


def _train(bench: Bench, repair: Repair, run: Run, mlp: "RunMlp", options: Trained) -> Trace:
    """Train the MLP on the pieces of the text to fit on, judged by those of the held-out text."""
    known = (bench.examples.fingerprint, bench.held_out.fingerprint, computation(bench.model), repair.digest())
    return train(
        Course(
            options=options,
            numbers=numbers_in({"mlp": mlp}),
            lesson=mlp,
            judge=lambda part: (mlp.measure(part), mlp.weigh(part)),
            examples=_numbered(mlp.states.fit, bench.examples),
            held_out=_numbered(mlp.states.held_out, bench.examples),
            identity=f"mlp {format_mask(bench.mask)} {run} {' '.join(known)}",
            force=bench.force,
            folder=None if bench.folder is None else bench.folder / f"run-{run.blocks[0]}",
            report=bench.report,
        )
    )


def _numbered(pieces: range, like: Examples) -> Examples:
    """Rows as long as the windows of `like`, which hold nothing but the number of their piece."""
    rows = torch.tensor(pieces)[:, None].expand(-1, like.tokens)
    return Examples("states", {"input_ids": rows}, torch.full((len(rows), 1), IGNORED), (1,) * len(rows))


class RunMlp(nn.Module):
    """What is trained, and the lesson: in coordinates with a spread of one, beside a linear map that stays as it is."""

    def __init__(self, states: RunStates, linear: LinearMap, neurons: int, seed: int) -> None:
        super().__init__()
        self.states, self.linear = states, linear
        self.mean, self.spread = self._norms()
        begun = self._begun(neurons, seed)
        self.activation = begun.activation
        self.gate, self.up = nn.Parameter(begun.gate), nn.Parameter(begun.up)
        self.gate_bias, self.up_bias = nn.Parameter(begun.gate_bias), nn.Parameter(begun.up_bias)
        self.down = nn.Parameter(self.mean.new_zeros(neurons, states.width))
        self.bias = nn.Parameter(self.mean.new_zeros(states.width))

    def forward(self, x: Tensor) -> Tensor:
        """What is to be added to the linear map of x [tokens, inputs], beside the spread of each channel."""
        sides = (self.gate, self.gate_bias, self.up, self.up_bias)
        return Neurons(self.activation, *sides).of(self._given(x)) @ self.down + self.bias

    def _given(self, x: Tensor) -> Tensor:
        return (self.states.normal.of(x) - self.mean) / self.spread

    def _begun(self, count: int, seed: int) -> Neurons:
        """The neurons to begin with: the best that are known, and random ones."""
        known, like, generator = self._best(count), self.mean, torch.Generator().manual_seed(seed % 2**63)
        left = count - sum(map(len, known))
        gate, up = (torch.randn(len(like), left, generator=generator).to(like) / len(like) ** 0.5 for _ in range(2))
        act = known[0].activation if known else "silu"
        return joined([*known, Neurons(act, gate, like.new_zeros(left), up, like.new_zeros(left))], like.device)

    def _best(self, count: int) -> list[Neurons]:
        """So many of the run's own neurons at most: those with the largest correlations, squared and summed, with what
        is missing on about TELLING tokens; at a spread of SMALL each."""
        if not self.states.neurons:
            return []
        found = joined(self.states.neurons, self.mean.device)
        gate, up = found.gate * self.spread[:, None], found.up * self.spread[:, None]
        sides = (gate, found.gate_bias + self.mean @ found.gate, up, found.up_bias + self.mean @ found.up)
        own = Neurons(found.activation, *sides)
        every = max(1, len(self.states.fit) * len(self.states.piece(0).x) // TELLING)
        spread, wanted = Spread(), self.mean.new_zeros(self.states.width)
        products = self.mean.new_zeros(len(own), self.states.width)
        for seen in map(self.states.piece, self.states.fit[::every]):
            made, left = own.of(self._given(seen.x)), self._wanted(seen)
            spread.add(made)
            products, wanted = products + made.T @ left, wanted + left.sum(0)
        covariances = (products - torch.outer(spread.mean().to(wanted), wanted)) / spread.count
        spreads = spread.found().to(wanted)
        alive = spreads > max(DEAD * float(spreads.max()), torch.finfo(spreads.dtype).tiny)  # the least that is found
        told = torch.where(alive, covariances.square().sum(-1) / spreads.square(), -1.0)
        if not alive.any():
            return []
        best = told.topk(min(count, int(alive.sum()))).indices
        size = SMALL / spreads[best]
        kept = own.chosen(best)
        return [replace(kept, up=kept.up * size, up_bias=kept.up_bias * size)]

    def weigh(self, part: Examples) -> float:
        """Pieces."""
        return float(len(part.targets))

    def backward(self, part: Examples, scale: float) -> float:
        with torch.inference_mode(False), torch.enable_grad():
            value = self._missing(part)
            (value * scale).backward()
        return float(value.detach())

    @torch.no_grad()
    def measure(self, part: Examples) -> float:
        """The sum over these pieces of the mean over tokens and channels of what is missing, squared."""
        return float(self._missing(part))

    def _missing(self, part: Examples) -> Tensor:
        seen = [self.states.piece(int(number)) for number in part.inputs["input_ids"][:, 0]]
        values = [(self(each.x) - self._wanted(each)).square().mean() for each in seen]
        return torch.stack(values).sum()

    def _wanted(self, seen: Observed) -> Tensor:
        """What the linear map leaves missing, beside the spread of each channel."""
        mapped = seen.x @ self.linear.weight.to(seen.x) + self.linear.bias.to(seen.x)
        return (seen.y - mapped) / self.states.spread

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of each channel of what the MLP is given."""
        spread = Spread()
        for number in self.states.fit:
            spread.add(self.states.normal.of(self.states.piece(number).x))
        device = self.states.spread.device
        return spread.mean().to(device), spread.found().to(device)

    @torch.no_grad()
    def replacement(self, linear: Replacement) -> Replacement:
        """The same in the coordinates of the states, with the linear map: on its device, in its dtype."""
        out, neurons = self.states.spread, len(self.down)
        gate, up = self.gate / self.spread[:, None], self.up / self.spread[:, None]
        values = {
            "weight": linear.weight,
            "bias": self.linear.bias.to(out) + self.bias * out,
            "gate": gate,
            "gate_bias": self.gate_bias - self.mean @ gate,
            "up": up,
            "up_bias": self.up_bias - self.mean @ up,
            "down": self.down * out,
        }
        normal, sizes = self.states.normal, (linear.inputs, linear.outputs, neurons)
        made = Replacement("mlp", *sizes, normal.norm, normal.eps, self.activation)
        made.to(linear.bias.device, linear.bias.dtype).load_state_dict(values)
        return made.requires_grad_(False)
