"""The one driver that runs every search: it asks for evaluations, and says why it stopped.

A search is deterministic, so a killed run resumes by running again: the journal answers what was already paid for, and
the same decisions follow.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from blockpruner.blocks import Mask
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.journal import Journal
from blockpruner.searching.contract import (
    DENSE,
    Best,
    Chosen,
    Objective,
    Partly,
    Pieces,
    Problem,
    Progress,
    Proposals,
    Ranked,
    Request,
    Scorer,
    Search,
    SearchResult,
    Step,
    Stop,
)
from blockpruner.searching.evaluations import Evaluations


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
    looks: int | None = None,
    scorer: Callable[[Evaluations], Scorer] | None = None,
    keep: bool = True,
) -> SearchResult:
    """Run `search` until it ends, until `budget` evaluations are made, or until Ctrl-C.

    Stopped by either of these it has the decisions of a nested search so far, or the best whole set that another found.
    journal: answers what it holds, and is given the rest as it is known. Its identity must hold all that a loss
    depends on: model, windows, micro-batch size, dtype, versions.
    progress: called with (done, total, message), in masks times micro-batches, before the first evaluation that the
    journal does not answer and after each one; the time since that first call tells the speed. total may be a bound.
    looks: masks times micro-batches that it will take, for progress; if left out, what the price says at most.
    budget: masks to evaluate at most, the dense one included; an ask that would exceed it is not begun.
    scorer: makes what scores moves for searches that ask a criterion; it may evaluate masks, which count as well.
    keep: whether what Ctrl-C leaves is worth something; else it is passed on, as it is before the dense loss is known.
    CheckFailedError if the dense loss is not finite.
    """
    most = objective.batches * (price(search, problem) if budget is None else min(price(search, problem), budget))
    sweeps = Evaluations(objective, journal, progress, most if looks is None else min(looks, most))
    dense = sweeps.losses((DENSE,), "dense model")[DENSE]
    if dense is None:
        raise CheckFailedError("the loss of the dense model is not a finite number", fix="load it with --dtype float32")
    steps: list[Step] = []
    try:
        stop = _follow(search, problem, sweeps, steps, budget, scorer(sweeps) if scorer else None)
    except KeyboardInterrupt:
        if not keep:
            raise
        stop = Stop.INTERRUPTED
    return SearchResult(tuple(steps), dense, stop, sweeps.evaluated(()), sweeps.looks, sweeps.work)


def _follow(
    search: Search,
    problem: Problem,
    sweeps: Evaluations,
    steps: list[Step],
    budget: int | None,
    scorer: Scorer | None,
) -> Stop:
    """Answer the search until it ends; its decisions go into `steps`, where an interrupt does not lose them."""
    answer, rise = None, problem.target.rise
    proposals = search.propose(problem)
    while (request := _tell(proposals, answer)) is not None:
        answer = None
        match request:
            case Chosen(move):
                mask = _gone(steps) | move.blocks
                if rise is not None:
                    if budget is not None and sweeps.evaluated((mask,)) > budget:
                        return Stop.BUDGET
                    if _rise(sweeps, mask) > rise:
                        return Stop.LOSS
                steps.append(_step(request, mask, sweeps))
            case Best(decisions):
                found = _together(decisions, sweeps)
                if _stands(_gone(found), sweeps, rise):
                    steps[:] = found
            case Ranked(gone, moves):
                if scorer is None:
                    raise InputError(f"{search.title} ranks moves by a criterion", fix="name one with --criterion")
                answer = scorer(gone, moves)
            case wanted:
                masks = wanted if isinstance(wanted, tuple) else wanted.masks
                if budget is not None and sweeps.evaluated(masks) > budget:
                    return Stop.BUDGET
                step = f"step {len(steps) + 1}, " if search.nested else ""
                answer = _evaluated(wanted, sweeps, f"{step}{len(masks)} masks")
    if rise is not None and not steps and not search.nested:
        return Stop.LOSS
    return Stop.TARGET if problem.reached(_gone(steps), len(steps)) else Stop.NO_MOVES


def _gone(steps: Sequence[Step]) -> Mask:
    return DENSE.union(*(step.move.blocks for step in steps))


def _step(chosen: Chosen, mask: Mask, sweeps: Evaluations) -> Step:
    """A decision that leads to `mask`, with the loss that is known of that."""
    return Step(chosen.move, sweeps.loss(mask) or chosen.loss, chosen.scores, chosen.ties)


def _together(decisions: Sequence[Chosen], sweeps: Evaluations) -> list[Step]:
    masks = accumulate((chosen.move.blocks for chosen in decisions), frozenset.union)
    return [_step(chosen, mask, sweeps) for chosen, mask in zip(decisions, masks, strict=True)]


def _stands(mask: Mask, sweeps: Evaluations, rise: float | None) -> bool:
    """Whether its loss is finite, as far as that is known, and known to be within the target if that names a loss."""
    if sweeps.loss(mask) is None:
        return rise is None and mask not in sweeps.known
    return rise is None or _rise(sweeps, mask) <= rise


def _rise(sweeps: Evaluations, mask: Mask) -> float:
    """How far the loss is above that of the whole model; infinite where it is not finite."""
    losses = sweeps.losses((DENSE, mask), "is the loss within the target?")
    dense, loss = losses[DENSE], losses[mask]
    return math.inf if dense is None or loss is None else loss.value - dense.value


def _evaluated(wanted: tuple[Mask, ...] | Partly | Pieces, sweeps: Evaluations, message: str) -> Any:
    match wanted:
        case Partly(masks, batches):
            return sweeps.partly(masks, batches, message)
        case Pieces(masks, batches):
            return sweeps.pieces(masks, batches, message)
        case masks:
            return sweeps.losses(masks, message)


def _tell(proposals: Proposals, answer: Any) -> Request | None:
    """Answer the last request and return the next one; None when the search is done."""
    try:
        return next(proposals) if answer is None else proposals.send(answer)
    except StopIteration:
        return None
