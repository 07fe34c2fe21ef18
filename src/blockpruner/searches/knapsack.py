"""The cheapest moves by their scores that meet the target, found by integer programming, and checked by real losses."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any, ClassVar

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searches.enumeration import in_place
from blockpruner.searches.one_shot import gone
from blockpruner.searching.contract import DENSE, Problem, Proposals, Ranked, Scores, lowest
from blockpruner.searching.targets import Goals

EVEN = 1e-9  # of the largest score, for each move: of equally good sets the smaller one


@dataclass(frozen=True)
class Knapsack:
    """Score every move by the criterion of the run, and take the set of lowest summed score that meets the target.

    minimise sum_m max(score_m, 0) x_m, x_m in {0, 1}, such that the blocks that go save what each target asks for;
    blocks and layers are met exactly. The `tries` best sets, none of which contains another, are evaluated, and the
    one of lowest loss is the plan: sums of scores know nothing of interactions. Sensible with scores that add up, as
    `leave-one-out`, and with targets of memory, speed or parameters, where blocks differ in what they save. A move
    without a finite score is not taken; of moves that overlap (stock) those on offer at the start, one per block.

    Puzzle assembles a model in this way from scored alternatives for each block; ours has one alternative, nothing.

    Cost: that of the criterion, and `tries`. What is stopped before these are evaluated leaves the first of them.
    """

    tries: int = 8

    title: ClassVar[str] = "Knapsack by integer programming"
    source: ClassVar[str] = "Bercovich et al. 2024, arXiv 2411.19146 (Puzzle), with removal as the only alternative"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"knapsack: tries={self.tries} evaluates nothing", fix="give 1 or more")

    def propose(self, problem: Problem) -> Proposals:
        _check(problem)
        answer: Scores = yield Ranked(DENSE, problem.offered(DENSE))
        lowest(answer)  # fails if none is finite
        scores = {move: score.value for move, score in answer.items() if score is not None}
        losses: dict[Mask, Estimate | None] = {}
        sets = {gone(taken): taken for taken in islice(cheapest(problem, scores), self.tries)}
        if not sets:
            raise InputError(
                f"no set of {problem.granularity!r} moves with finite scores meets {problem.target}",
                fix="use another criterion or other moves, or a target without a number of blocks or layers",
            )
        yield in_place(problem, next(iter(sets.values())), losses)
        losses |= yield tuple(sets)
        best = lowest({Move(mask): losses[mask] for mask in sets}).blocks
        yield in_place(problem, sets[best], losses)

    def evaluations(self, problem: Problem) -> int:
        """An upper bound; those of the criterion are extra."""
        _check(problem)
        return self.tries


def cheapest(problem: Problem, scores: Mapping[Move, float]) -> Iterator[tuple[Move, ...]]:
    """Sets of moves that meet the target, by rising summed score, none with another one in it; moves by their score."""
    import numpy

    scipy: Any = importlib.import_module("scipy.optimize")  # late: few runs need it

    moves = sorted(scores, key=scores.__getitem__)
    rows = _rows(problem, moves)
    width = len(moves) + len(problem.outline.layers())
    price = numpy.array([max(scores[move], 0.0) for move in moves])
    price = numpy.concatenate([price + EVEN * max(price.max(initial=0.0), 1e-30), numpy.zeros(width - len(moves))])
    while True:
        matrix = numpy.array([[row.get(place, 0.0) for place in range(width)] for row, _, _ in rows])
        limits = scipy.LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
        found = scipy.milp(
            price, integrality=1, bounds=scipy.Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0}
        )
        if found.x is None:
            return
        chosen = [place for place in range(len(moves)) if found.x[place] > 0.5]
        taken = tuple(moves[place] for place in chosen)
        if problem.reached(gone(taken), len(taken)):  # the solver's rows hold up to a rounding error
            yield taken
        rows.append((dict.fromkeys(chosen, 1.0), -inf, len(chosen) - 1.0))


Row = tuple[dict[int, float], float, float]


def _rows(problem: Problem, moves: Sequence[Move]) -> list[Row]:
    """Constraints low <= row . x <= high: the targets, and that a layer is empty if all its blocks are gone.

    Behind the moves, x has one entry per layer that tells whether it is empty.
    """
    outline, target = problem.outline, problem.target
    takers = {b: [place for place, move in enumerate(moves) if b in move.blocks] for b in outline.blocks}
    rows: list[Row] = [(dict.fromkeys(places, 1.0), -inf, 1.0) for places in takers.values() if len(places) > 1]
    empty = {key: len(moves) + place for place, key in enumerate(outline.layers())}
    for key, blocks in outline.layers().items():
        rows += [({empty[key]: 1.0, **dict.fromkeys(takers[block], -1.0)}, -inf, 0.0) for block in blocks]
    goals = target if isinstance(target, Goals) else Goals((target,))
    for count in goals.exact:
        sizes = {place: float(len(m.blocks)) if count.unit == "blocks" else 1.0 for place, m in enumerate(moves)}
        rows.append((sizes, float(count.amount), float(count.amount)))
    for bound in goals.bounds(outline):
        costs, needed = bound.costs, bound.needed
        if needed <= 0:
            continue  # the whole model meets it
        row = {place: sum(costs.each.get(b, 0.0) for b in move.blocks) for place, move in enumerate(moves)}
        row |= {empty[key]: value for key, value in costs.shared.items()}
        rows.append(({place: value / needed for place, value in row.items()}, 1.0, inf))
    return rows


def _check(problem: Problem) -> None:
    if problem.target.endless:
        raise InputError(f"{problem.target} does not say how much to remove", fix="add a target of size or speed")
