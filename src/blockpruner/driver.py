"""The one driver that runs every search: it asks for evaluations, and says why it stopped.

A search is deterministic, so a killed run resumes by running again: the journal answers what was already paid for, and
the same decisions follow.
"""

import math
from collections.abc import Callable
from typing import Any

from blockpruner.blocks import Mask
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.evaluations import Evaluations
from blockpruner.journal import Journal
from blockpruner.searching import (
    DENSE,
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
) -> SearchResult:
    """Run `search` until it ends, until `budget` evaluations are made, or until Ctrl-C.

    journal: answers what it holds, and is given the rest as it is known. Its identity must hold all that a loss
    depends on: model, windows, micro-batch size, dtype, versions.
    progress: called with (done, total, message), in masks times micro-batches, before the first evaluation that the
    journal does not answer and after each one; the time since that first call tells the speed. total may be a bound.
    looks: masks times micro-batches that it will take, for progress; if left out, what the price says at most.
    budget: masks to evaluate at most, the dense one included; an ask that would exceed it is not begun.
    scorer: makes what scores moves for searches that ask a criterion; it may evaluate masks, which count as well.
    CheckFailedError if the dense loss is not finite. Ctrl-C before the dense loss is known is passed on.
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
    mask, answer = DENSE, None
    proposals = search.propose(problem)
    while (request := _tell(proposals, answer)) is not None:
        message = f"step {len(steps) + 1}"
        match request:
            case Chosen(move, scores, ties, loss):
                mask, answer = mask | move.blocks, None
                if problem.target.rise is not None and (search.nested or problem.reached(mask, len(steps) + 1)):
                    if budget is not None and sweeps.evaluated((mask,)) > budget:
                        return Stop.BUDGET
                    if _rise(sweeps, mask) > problem.target.rise:
                        del steps[0 if not search.nested else len(steps) :]  # chosen only together, or one by one
                        return Stop.LOSS
                steps.append(Step(move, sweeps.loss(mask) or loss, scores, ties))
            case Ranked(gone, moves):
                if scorer is None:
                    raise InputError(f"{search.title} ranks moves by a criterion", fix="name one with --criterion")
                answer = scorer(gone, moves)
            case wanted:
                masks = wanted if isinstance(wanted, tuple) else wanted.masks
                if budget is not None and sweeps.evaluated(masks) > budget:
                    return Stop.BUDGET
                answer = _evaluated(wanted, sweeps, f"{message}, {len(masks)} masks")
    return Stop.TARGET if problem.reached(mask, len(steps)) else Stop.NO_MOVES


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
