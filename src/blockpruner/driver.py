"""The one driver that runs every search: it evaluates, remembers, writes the journal, counts, and says why it stopped.

A search is deterministic, so a killed run resumes by running again: the journal answers what was already paid for, and
the same decisions follow.
"""

import math
from collections.abc import Iterable, Sequence

from blockpruner.artifacts import Estimate, Work
from blockpruner.blocks import Mask, format_mask, parse_mask
from blockpruner.errors import CheckFailedError
from blockpruner.journal import Journal
from blockpruner.searching import (
    DENSE,
    Chosen,
    Losses,
    Objective,
    Problem,
    Progress,
    Proposals,
    Search,
    SearchResult,
    Step,
    Stop,
)


def price(search: Search, problem: Problem) -> int:
    """Number of masks that `run` will evaluate, the dense one included: what `search` says, plus one."""
    return 1 + search.evaluations(problem)


def run(
    search: Search,
    problem: Problem,
    objective: Objective,
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
    budget: int | None = None,
) -> SearchResult:
    """Run `search` until it ends, until `budget` evaluations are made, or until Ctrl-C.

    journal: answers what it holds, and is given the rest as it is known. Its identity must hold all that a loss
    depends on: model, windows, micro-batch size, dtype, versions.
    progress: called with (done, total, message), in masks times micro-batches, before the first evaluation that the
    journal does not answer and after each one; the time since that first call tells the speed. total may be a bound.
    budget: masks to evaluate at most, the dense one included; an ask that would exceed it is not begun.
    CheckFailedError if the dense loss is not finite. Ctrl-C before the dense loss is known is passed on.
    """
    total = price(search, problem) if budget is None else min(price(search, problem), budget)
    sweeps = _Sweeps(objective, journal, progress, total * objective.batches)
    dense = sweeps.losses((DENSE,), "dense model")[DENSE]
    if dense is None:
        raise CheckFailedError("the loss of the dense model is not a finite number", fix="load it with --dtype float32")
    steps: list[Step] = []
    try:
        stop = _follow(search, problem, sweeps, steps, budget)
    except KeyboardInterrupt:
        stop = Stop.INTERRUPTED
    return SearchResult(tuple(steps), dense, stop, len(sweeps.known), sweeps.work)


def _follow(search: Search, problem: Problem, sweeps: "_Sweeps", steps: list[Step], budget: int | None) -> Stop:
    """Answer the search until it ends; its decisions go into `steps`, where an interrupt does not lose them."""
    mask, answer = DENSE, None
    proposals = search.propose(problem)
    while (request := _tell(proposals, answer)) is not None:
        if isinstance(request, Chosen):
            mask, answer = mask | request.move.blocks, None
            steps.append(Step(request.move, sweeps.known.get(mask), request.scores))
        elif budget is not None and len({*sweeps.known, *request}) > budget:
            return Stop.BUDGET
        else:
            answer = sweeps.losses(request, f"step {len(steps) + 1}, {len(request)} masks")
    return Stop.TARGET if problem.reached(mask, len(steps)) else Stop.NO_MOVES


def _tell(proposals: Proposals, answer: Losses | None) -> tuple[Mask, ...] | Chosen | None:
    """Answer the last request and return the next one; None when the search is done."""
    try:
        return next(proposals) if answer is None else proposals.send(answer)
    except StopIteration:
        return None


class _Sweeps:
    """Evaluates every mask once, from the journal where that knows it; remembers and counts."""

    def __init__(self, objective: Objective, journal: Journal | None, progress: Progress | None, total: int) -> None:
        self.known: dict[Mask, Estimate | None] = {}
        self.work = Work()
        self._objective = objective
        self._journal = journal
        self._memo = {} if journal is None else _recall(journal)
        self._progress = progress
        self._announced = False
        self._done, self._total = 0, total

    def losses(self, masks: Iterable[Mask], message: str) -> Losses:
        """The mean loss of each mask over all windows, with its standard error; None if any window's is not finite."""
        masks = tuple(dict.fromkeys(masks))
        fresh = [mask for mask in masks if mask not in self.known]
        for batch in range(self._objective.batches):
            self._sweep(fresh, batch, message)
        if fresh:
            # Counted as if nothing had been remembered: the plan of a resumed run is the plan of an undisturbed one.
            self.work += self._objective.work(fresh)
        self.known |= {mask: self._estimate(mask) for mask in fresh}
        return {mask: self.known[mask] for mask in masks}

    def _sweep(self, masks: Sequence[Mask], batch: int, message: str) -> None:
        missing = [mask for mask in masks if (mask, batch) not in self._memo]
        self._done += len(masks) - len(missing)
        if missing:
            self._report(message, first=True)
        for mask, losses in zip(missing, self._objective.losses(missing, batch) if missing else (), strict=True):
            found = tuple(map(float, losses))
            if self._journal is not None:
                self._journal.append([_record(mask, batch, found)])
            self._memo[mask, batch] = found
            self._done += 1
            self._report(message)

    def _report(self, message: str, *, first: bool = False) -> None:
        if self._progress is not None and not (first and self._announced):
            self._progress(self._done, self._total, message)
            self._announced = True

    def _estimate(self, mask: Mask) -> Estimate | None:
        losses = [loss for batch in range(self._objective.batches) for loss in self._memo[mask, batch]]
        if not all(map(math.isfinite, losses)):
            return None
        try:
            return Estimate.of(losses, self._objective.unit)
        except OverflowError:  # finite, but their squares are not
            return None


def _record(mask: Mask, batch: int, losses: Sequence[float]) -> dict[str, object]:
    """The journal's record of one mask on one micro-batch; strict JSON has no NaN, so such a loss becomes text."""
    return {
        "mask": format_mask(mask),
        "batch": batch,
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
    }


def _recall(journal: Journal) -> dict[tuple[Mask, int], tuple[float, ...]]:
    return {
        (parse_mask(record["mask"]), record["batch"]): tuple(map(float, record["losses"])) for record in journal.records
    }
