"""What each block costs in the workload of a target: counted bytes, seconds measured here, or computed for a card."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from scipy.special import erfcx

from blockpruner.blocks import Block
from blockpruner.errors import InputError
from blockpruner.evaluation.compute import on_card
from blockpruner.evaluation.memory import Ledger, read_ledger
from blockpruner.evaluation.speed import Contestant, interleaved
from blockpruner.evaluation.timing import Protocol, Run
from blockpruner.searching.contract import Progress
from blockpruner.searching.costs import Card, Costs, CostTable
from blockpruner.searching.moves import Target
from blockpruner.searching.targets import Goals, Memory, Speed
from blockpruner.subject import Subject

ROUNDS, NEW = 7, 8
TICK = 1e-9  # seconds; no clock is finer
MEASURED = "measured on this"  # how the source of such costs begins; what is computed for a card is not kept


def bound(
    target: Target | Goals,
    subject: Subject,
    *,
    card: Card | None = None,
    table: Path | None = None,
    progress: Progress | None = None,
) -> Target | Goals:
    """`target` with the costs of all that it asks for, so that a search can tell when it is reached.

    card: of a speed target that is meant for a device which is not here; table: a file with costs that were measured
    before, of the same model, dtype and device, if it is there. What is in neither is measured now. Bytes, and what is
    computed from them, are those of the dtype in the model's files, which a pruned checkpoint keeps.
    """
    if isinstance(target, Target):
        return target
    known = {} if table is None or card is not None or not table.is_file() else _read(table, subject)
    ledger = read_ledger(subject.model, subject.anatomy, subject.stored) if target.limits else None
    costs: dict[str, Costs] = {}
    for limit in target.limits:
        assert ledger is not None
        if isinstance(limit, Memory):
            costs[limit.workload] = ledger.costs(limit.context, limit.batch)
        elif limit.workload in known:
            costs[limit.workload] = known[limit.workload]
        else:
            _check_in_memory(subject)
            costs[limit.workload] = on_card(ledger, card, limit) if card else measured(subject, limit, ledger, progress)
    return target.bound(costs)


def table_of(target: Target | Goals, subject: Subject) -> CostTable | None:
    """The costs in time that were measured for a bound target, for the run folder; None if there are none."""
    if isinstance(target, Target):
        return None
    named = {limit.workload: target.costs[limit.workload] for limit in target.limits if isinstance(limit, Speed)}
    costs = {workload: one for workload, one in named.items() if one.source.startswith(MEASURED)}
    device = str(subject.model.device)
    return CostTable.of(subject.identity.fingerprint, subject.dtype, device, costs) if costs else None


def measured(subject: Subject, speed: Speed, ledger: Ledger, progress: Progress | None = None) -> Costs:
    """Seconds of the workload of `speed` on this machine, and of each block in it.

    Blocks of one kind and size are taken for equal. Of each such class every second block is left out at once, in turns
    with the whole model; cost of a block = what `saving` makes of (whole - without) by rounds / number left out, all
    together no more than the whole. So no block costs nothing or less, which no search could reckon with; the source
    names classes that are not told from nothing (below two standard errors). Encoders do not run while a decoder
    writes: there their blocks cost a tick.
    """
    decoding = speed.phase == "decode" and subject.model.config.is_encoder_decoder
    idle, classes = list[list[Block]](), list[list[Block]]()
    for blocks in alike(ledger):
        (idle if decoding and blocks[0].stack.startswith("encoder") else classes).append(blocks)
    named = {f"without {len(some)} x {some[0]}": some for blocks in classes for some in [blocks[::2]]}
    contestants = [Contestant("whole", subject), *(Contestant(n, subject, frozenset(b)) for n, b in named.items())]
    protocol = Protocol(speed.batch, speed.context, NEW if speed.phase == "decode" else 1, ROUNDS)
    whole, *without = (_seconds(runs, speed) for runs in interleaved(contestants, protocol, progress))
    each: dict[Block, float] = dict.fromkeys(chain(*idle), TICK)
    unclear: list[str] = []
    for blocks, some, times in zip(classes, named.values(), without, strict=True):
        saved, clear = saving([a - b for a, b in zip(whole, times, strict=True)])
        each |= dict.fromkeys(blocks, saved / len(some))
        unclear += [] if clear else [f"{blocks[0]} and its like" if len(blocks) > 1 else str(blocks[0])]
    most = median(whole) / max(median(whole), math.fsum(each.values()))
    source = f"{MEASURED} {subject.model.device.type}, {ROUNDS} rounds"
    source += f"; not told from nothing: {', '.join(unclear)}" if unclear else ""
    return Costs(median(whole), {block: most * cost for block, cost in each.items()}, {}, "seconds", source)


def saving(gaps: Sequence[float]) -> tuple[float, bool]:
    """What is saved, from differences of seconds by rounds, above 0; and whether it is told from nothing.

    x = median of the gaps, s = its standard error, 1.2533 * 1.4826 * median |gap - x| / sqrt(rounds), which an outlier
    does not move, and no less than a tick of the clock. What is saved is above 0 and otherwise unknown before, so the
    mean of a normal distribution at x with that s, cut off at 0: s (z + phi(z) / Phi(z)), z = x / s. That is x where x
    is clear, 0.8 s where x is 0, and less below; z under -3 is taken for -3, so that it is never nothing.
    """
    x = median(gaps)
    s = max(TICK, 1.2533 * 1.4826 * median(abs(gap - x) for gap in gaps) / math.sqrt(len(gaps)))
    z = max(x / s, -3.0)
    return s * (z + math.sqrt(2 / math.pi) / float(erfcx(-z / math.sqrt(2)))), z > 2


def alike(ledger: Ledger) -> list[list[Block]]:
    """Blocks that should take the same time: of one stack, kind and size, with as much in the cache."""
    parts = ledger.anatomy.parts
    classes: dict[Any, list[Block]] = defaultdict(list)
    for block, part in parts.items():
        if not part.kept:
            classes[block.stack, block.kind, part.parameters, ledger.held(block)].append(block)
    return list(classes.values())


def _seconds(runs: Iterable[Run], speed: Speed) -> list[float]:
    found: Sequence[float | None] = [run.decode if speed.phase == "decode" else run.prefill for run in runs]
    known = [seconds for seconds in found if seconds is not None]
    if not known:
        raise InputError("this model writes no text, so it has no speed of decoding", fix="use speed=1.3x:prefill")
    return known


def _read(path: Path, subject: Subject) -> Mapping[str, Costs]:
    table = CostTable.load(path)
    here = (subject.identity.fingerprint, subject.dtype, str(subject.model.device))
    if (table.model, table.dtype, table.device) != here:
        raise InputError(
            f"{path} has costs of another model, dtype or device ({table.dtype}, {table.device})",
            fix="remove that file to measure again, or use another run folder",
        )
    costs = {workload: record.costs() for workload, record in table.workloads.items()}
    for one in costs.values():
        subject.anatomy.outline.check(one.each, str(path))
    return costs


def _check_in_memory(subject: Subject) -> None:
    if subject.memory is not None:
        raise InputError(
            "a model whose weights are streamed has no speed of its own",
            fix="leave out --stream, or the speed target",
        )
