"""What a search will cost, said before it starts, and what it did cost beside that."""

import time
from pathlib import Path
from typing import ClassVar

from blockpruner.artifacts import Artifact, Record, Traffic, Work
from blockpruner.engine.hands import Crew
from blockpruner.evaluation.peaks import peak_memory
from blockpruner.plan import Plan
from blockpruner.planning import Task, find_plan
from blockpruner.searching.contract import DENSE, Progress

NAME = "price.json"
LOOK_EVERY = 0.05  # seconds between two looks at the memory of a search


class Price(Record):
    """What a search costs.

    evaluations: masks; work: counted tokens of those, and of drawing a part of the vocabulary; passes: forward passes
    over all data that its criterion, and the fits of a recovery inside it, take beside them; traffic: bytes of weights
    and states (of the criterion's passes they are not counted); memory: bytes, of weights, states and logits; seconds:
    on this machine. None: not known.

    Before a search all are those of a rehearsal, and seconds go by what one micro-batch took in this process: workers
    on devices of their own share them. How the work divides between kinds of blocks depends on which go, so that true
    counts of a kind differ by more than their sum does (growth.json has both); those of races by some more. Where a
    rise of the loss ends a search, all are upper bounds. True memory has what a layer makes for itself.
    """

    evaluations: int
    work: Work
    passes: float | None
    traffic: Traffic
    memory: int | None
    seconds: float


class Receipt(Artifact):
    """What was said of a search, and what it took: price.json in its run folder.

    Sessions of one run folder are added up. resumed: one before the first of them was killed, and left no figures of
    its traffic and seconds.
    """

    FORMAT: ClassVar[str] = "blockpruner.price"
    VERSION: ClassVar[int] = 1

    said: Price
    spent: Price
    resumed: bool


def quote(task: Task) -> Price:
    """The price of a search, said before it starts. Cost: two timed passes over one micro-batch."""
    found, objective = task.rehearsed, task.objective
    passes, streams = found.passes, 0
    if task.replacing is not None:
        streams = task.replacing.held_bytes
        passes += task.replacing.passes(task.problem.moves(DENSE), len(found.result.steps))
    draw, drawn = objective.drawing()
    work, moved = found.result.work + draw, found.moved + drawn
    return Price(
        evaluations=found.result.evaluations,
        work=work,
        passes=passes,
        traffic=moved,
        memory=objective.held_bytes(moved) + streams,
        seconds=objective.seconds(work, moved) + passes * objective.seconds_of_pass(),
    )


def search_for(
    task: Task,
    said: Price,
    run: Path,
    progress: Progress | None = None,
    budget: int | None = None,
    crew: Crew | None = None,
) -> tuple[Plan, Receipt]:
    """The plan of `find_plan`, and what it took, beside what was `said`; price.json in the run folder holds both.

    Memory is that of this process; what workers hold, move and count is theirs.
    """
    objective, start = task.objective, time.perf_counter()
    earlier = Receipt.load(run / NAME) if (run / NAME).exists() else None
    resumed = earlier.resumed if earlier else (run / "journal.jsonl").exists()
    objective.moved = earlier.spent.traffic if earlier else Traffic()
    with peak_memory(objective.model.device, every=LOOK_EVERY) as taken:
        plan = find_plan(task, run, progress, budget, crew)
    spent = Price(
        evaluations=plan.evaluations or 0,
        work=plan.work or Work(),
        passes=said.passes if said.passes == 0 else None,
        traffic=objective.moved,
        memory=None if taken.peak is None else objective.weight_bytes + taken.peak,
        seconds=time.perf_counter() - start,
    )
    if earlier:
        seconds, most = spent.seconds + earlier.spent.seconds, max(spent.memory or 0, earlier.spent.memory or 0)
        spent = spent.model_copy(update={"seconds": seconds, "memory": most or None})
    receipt = Receipt(format=Receipt.FORMAT, version=Receipt.VERSION, said=said, spent=spent, resumed=resumed)
    receipt.save(run / NAME)
    return plan, receipt
