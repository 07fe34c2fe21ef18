"""Speed and memory of contestants side by side, interleaved in one run, and the ideal that speed is held to.

Machines warm up, throttle and serve others meanwhile: what is compared is timed in turns (forwards in one round,
backwards in the next), and compared round by round. A contestant is a model, or a model without the blocks of a plan,
several of which share one set of weights.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from blockpruner.artifacts import Artifact, Record
from blockpruner.blocks import Mask
from blockpruner.engine.limits import context
from blockpruner.evaluation.compute import prefill_flops
from blockpruner.evaluation.memory import Ledger, filled_cache, held_bytes, random_inputs, read_ledger
from blockpruner.evaluation.peaks import peak_memory
from blockpruner.evaluation.quality import removed_from
from blockpruner.evaluation.timing import Protocol, Run, SpeedUp, Timing, clock_of, inputs_for, timed
from blockpruner.searching.contract import Progress
from blockpruner.subject import Subject
from blockpruner.surgery.removal import skipped

MOST_COUNTED = 4096  # tokens of the pass whose operations are counted


@dataclass(frozen=True)
class Contestant:
    """A model as it is, or without the blocks of `mask`."""

    name: str
    subject: Subject
    mask: Mask = frozenset()

    def present(self) -> AbstractContextManager[object]:
        """While it is open, the subject's model is this contestant."""
        if not self.mask:
            return contextlib.nullcontext()
        return skipped(self.subject.model, self.mask, anatomy=self.subject.anatomy)


class Figures(Record):
    """One contestant. removed: as text, of its model; decode: seconds per token; ..._speedup: over the first one.

    ideal_speedup: prefill, were the time that of the counted operations alone (see `compute`): operations of the first
    / operations of this one; of_ideal: measured / ideal. weights_bytes; cache_bytes: at the end, counted;
    cache_bytes_measured: in the cache after a prefill of `context` tokens, and cache_bytes_counted for the same;
    peak_bytes: what a run took beside what was held before it, None with a reason where that is not known.
    largest_batch, largest_context: within the limit that was given; null without one, or where nothing bounds it. No
    context is beyond longest_context, that which the model can read, null where it does not say.
    """

    name: str
    removed: str
    weights_bytes: int
    prefill: Timing
    decode: Timing | None
    prefill_speedup: SpeedUp
    decode_speedup: SpeedUp | None
    ideal_speedup: float | None
    of_ideal: float | None
    cache_bytes: int
    cache_bytes_counted: int
    cache_bytes_measured: int | None
    peak_bytes: int | None
    peak_reason: str | None
    largest_batch: int | None
    largest_context: int | None
    longest_context: int | None = None


class Cell(Record):
    """One batch size and length, all contestants."""

    batch: int
    context: int
    new: int
    rounds: int
    warm_up: int
    sample: bool
    contestants: tuple[Figures, ...]


class Benchmark(Artifact):
    """Speed and memory, measured on one device in one run. limit: of memory, in bytes."""

    FORMAT: ClassVar[str] = "blockpruner.benchmark"
    VERSION: ClassVar[int] = 1

    protocol: str
    source: str
    device: str
    dtype: str
    threads: int
    clock: str
    torch: str
    limit: int | None
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, protocol: Protocol, subject: Subject, cells: Sequence[Cell], limit: int | None = None) -> Self:
        device = subject.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(
            format=cls.FORMAT,
            version=cls.VERSION,
            protocol=type(protocol).__name__,
            source=protocol.source,
            device=name,
            dtype=subject.dtype,
            threads=torch.get_num_threads(),
            clock=clock_of(device),
            torch=torch.__version__,
            limit=limit,
            cells=tuple(cells),
        )


def interleaved(
    contestants: Sequence[Contestant], protocol: Protocol, progress: Progress | None = None
) -> list[list[Run]]:
    """The runs of each contestant, round by round, all in one run of this process.

    Round by round the order turns round, so that what drifts slowly takes the same from each.
    """
    inputs = {id(one.subject): inputs_for(one.subject.model, protocol) for one in contestants}
    runs: list[list[Run]] = [[] for _ in contestants]
    total = (protocol.warm_up + protocol.rounds) * len(contestants)
    for number, (round_, place) in enumerate(_turns(protocol, len(contestants))):
        one = contestants[place]
        with one.present():
            run = timed(one.subject.model, protocol, inputs[id(one.subject)])
        if round_ >= protocol.warm_up:
            runs[place].append(run)
        if progress is not None:
            progress(number + 1, total, "timing")
    return runs


def _turns(protocol: Protocol, contestants: int) -> Iterator[tuple[int, int]]:
    for round_ in range(protocol.warm_up + protocol.rounds):
        order = range(contestants)
        yield from ((round_, place) for place in (order if round_ % 2 == 0 else reversed(order)))


def measure(
    contestants: Sequence[Contestant],
    protocol: Protocol,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Cell:
    """Speed and memory of all `contestants` under `protocol`; ratios are to the first. limit: of memory, in bytes.

    Cost: rounds + warm_up + 3 runs of each.
    """
    ledgers = {id(one.subject): read_ledger(one.subject.model, one.subject.anatomy) for one in contestants}
    operations = [_operations(one, protocol) for one in contestants]
    runs = interleaved(contestants, protocol, progress)
    speeds = [
        _speed(one, protocol, ledgers[id(one.subject)], (runs[0], mine), (operations[0], count), limit)
        for one, mine, count in zip(contestants, runs, operations, strict=True)
    ]
    return Cell(
        batch=protocol.batch,
        context=protocol.context,
        new=protocol.new,
        rounds=protocol.rounds,
        warm_up=protocol.warm_up,
        sample=protocol.sample,
        contestants=tuple(speeds),
    )


def _operations(one: Contestant, protocol: Protocol) -> int | None:
    if protocol.context > MOST_COUNTED:
        return None
    with one.present():
        return prefill_flops(one.subject.model, protocol.context)


def _speed(
    one: Contestant,
    protocol: Protocol,
    ledger: Ledger,
    runs: tuple[Sequence[Run], Sequence[Run]],
    operations: tuple[int | None, int | None],
    limit: int | None,
) -> Figures:
    (first, mine), (all_of_it, left) = runs, operations
    prefill = SpeedUp.of([run.prefill for run in first], [run.prefill for run in mine])
    decodes = [[run.decode for run in some if run.decode is not None] for some in runs]
    both = len(decodes[0]) == len(decodes[1]) > 0
    ideal = all_of_it / left if all_of_it and left else None
    feet = ledger.footprint(one.mask)
    model, needed = one.subject.model, protocol.context + protocol.new
    longest = context(model)
    needed = needed if longest is None else min(needed, longest)
    with one.present():
        held = filled_cache(model, random_inputs(model, protocol.batch, protocol.context))
        measured = None if held is None else held_bytes(held)
        del held
        with peak_memory(model.device) as taken:
            timed(model, replace(protocol, new=min(protocol.new, 2)), inputs_for(model, protocol))
    return Figures(
        name=one.name,
        removed=removed_from(one.subject.model, one.mask),
        weights_bytes=feet.weights,
        prefill=Timing.of([run.prefill for run in mine]),
        decode=Timing.of(decodes[1]) if decodes[1] else None,
        prefill_speedup=prefill,
        decode_speedup=SpeedUp.of(*decodes) if both else None,
        ideal_speedup=ideal,
        of_ideal=None if ideal is None else prefill.median / ideal,
        cache_bytes=feet.cache(needed, protocol.batch),
        cache_bytes_counted=feet.cache(protocol.context, protocol.batch),
        cache_bytes_measured=measured,
        peak_bytes=taken.peak,
        peak_reason=taken.reason,
        largest_batch=None if limit is None else feet.largest_batch(limit, needed),
        largest_context=None if limit is None else feet.largest_context(limit, protocol.batch, longest),
        longest_context=longest,
    )
