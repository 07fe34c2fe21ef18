"""EvoPress's search: change a whole set of removals a little, and keep the better set."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Best, Chosen, Losses, Partly, Problem, Proposals, lowest
from blockpruner.searching.permutations import number, shuffled
from blockpruner.searching.racing import Race

State = tuple[Move, ...]  # in an order in which they can be taken
SURVIVORS = 2  # of the first look at a generation
TRIES = 8  # draws per offspring, since some are the parent or each other


@dataclass(frozen=True)
class Evolution:
    """A (1 + offspring) evolutionary search over sets of moves that just reach the target; the best one never dies.

    The first parent is the best of `initial` random sets. An offspring is the parent after min(a, b) exchanges, a and
    b uniform in 1..3; each puts one move back and takes another. In every generation all are looked at on `first`
    micro-batches, then the best 2 and the parent on `second` others (0, or more than there are: on all); the best is
    the next parent, an offspring before a parent that it equals. Which micro-batches is drawn from (seed, generation).
    The last parent is evaluated on all; the plan is its moves in tie order, of which only the last has a loss.

    equal: as many mlps as other blocks, always. generations: 0 stands for n (m - n) / 1.5 with n of m moves taken,
    where `equal` those of one kind. A params target is just reached by a set that falls short with any move put back:
    random moves are taken until it is reached, and those not needed then are put back, in random order.

    Cost: at most initial + generations * offspring masks; in masks times micro-batches, initial * first +
    generations * (offspring * first + 3 * second) + all. What is stopped earlier leaves the parent of then, with its
    loss on the micro-batches that it was last seen on.

    race: offspring and parent race (see `racing`) instead of these two looks; the parent then gives way to an offspring
    that is worse by epsilon at the most. epsilon, delta, growth: of races, as in `greedy`.

    EvoPress is `equal=True` with the KL objective; micro-batches are of about 512 tokens, or one window where that is
    longer. Ours: free counts, other moves, params targets, the evaluation at the end, and that the second look avoids
    the data of the first if it can.
    """

    seed: int = 0
    equal: bool = False
    offspring: int = 32
    initial: int = 64
    generations: int = 0
    first: int = 4
    second: int = 64
    race: bool = False
    epsilon: float = 0.003
    delta: float = 0.05
    growth: float = 1.25

    title: ClassVar[str] = "Evolutionary (EvoPress)"
    source: ClassVar[str] = "Sieberling et al. 2024, arXiv 2410.14649"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.offspring, self.initial, self.first) < 1 or min(self.generations, self.second) < 0:
            fix = "give offspring, initial and first of 1 or more, generations and second of 0 or more"
            raise InputError(f"{self} is out of range", fix=fix)
        Race(self.epsilon, self.delta, self.seed, self.growth)

    def propose(self, problem: Problem) -> Proposals:
        random = [self._filled(problem, (), None, "initial", index) for index in range(self.initial)]
        states = {_gone(state): state for state in random}
        losses = yield Partly(tuple(states), self._batches(problem, 0)[: self.first])
        parent = states[lowest({Move(mask): losses[mask] for mask in states}).blocks]
        of_all = False  # whether losses are estimates of those on all data
        for generation in range(1, 1 + self._generations(problem)):
            yield _decided(problem, parent, losses, of_all)
            batches = self._batches(problem, generation)
            children = self._children(problem, parent, generation)
            if children and self.race:
                race = Race(self.epsilon, self.delta, number(self.seed, "race", generation), self.growth)
                outcome = yield from race.run(problem, (*children, _gone(parent)))
                parent = children.get(outcome.kept[0], parent) if outcome.kept else parent
                losses, of_all = outcome.estimates, True
            elif children:
                losses = yield Partly(tuple(children), batches[: self.first])
                states = {mask: children[mask] for mask in _best(losses)[:SURVIVORS]} | {_gone(parent): parent}
                losses = yield Partly(tuple(states), batches[-self.second :])  # from -0 on: all
                parent = next((states[mask] for mask in _best(losses)), parent)
        yield _decided(problem, parent, losses, of_all)
        losses = yield (mask := _gone(parent),)
        lowest({Move(mask): losses[mask]})  # fails if it is not finite
        yield _decided(problem, parent, losses, of_all=True)

    def evaluations(self, problem: Problem) -> int:
        """An upper bound: sets come up again; most are evaluated on `first` micro-batches only."""
        return self.initial + self._generations(problem) * self.offspring

    def _generations(self, problem: Problem) -> int:
        self._check(problem)
        taken, moves = len(self._filled(problem, (), None, "initial", 0)), len(problem.moves(DENSE))
        return self.generations or math.ceil(taken * (moves - taken) / 1.5 / (4 if self.equal else 1))

    def _check(self, problem: Problem) -> None:
        moves, target = problem.moves(DENSE), problem.target
        mlps = sum(map(_is_mlp, moves))
        single = target.unit == "blocks" and all(len(move.blocks) == 1 for move in moves)
        if self.equal and not (single and target.amount % 2 == 0 and target.amount / 2 <= min(mlps, len(moves) - mlps)):
            raise InputError(
                f"{target} of {problem.granularity!r} moves, {mlps} of which are mlps, cannot be half mlps",
                fix="use --moves block and an even target blocks=N, or leave out equal=True",
            )

    def _batches(self, problem: Problem, generation: int) -> tuple[int, ...]:
        return shuffled(problem.batches, self.seed, "batches", generation)

    def _children(self, problem: Problem, parent: State, generation: int) -> dict[Mask, State]:
        """Different offspring, none of them the parent; fewer than asked for where so many are not found."""
        found: dict[Mask, State] = {}
        for attempt in range(TRIES * self.offspring):
            child = self._mutated(problem, parent, generation, attempt)
            if _gone(child) != _gone(parent):
                found.setdefault(_gone(child), child)
            if len(found) == self.offspring:
                break
        return found

    def _mutated(self, problem: Problem, state: State, *key: object) -> State:
        for exchange in range(min(1 + number(self.seed, *key, die) % 3 for die in ("a", "b"))):
            back = state[number(self.seed, *key, exchange, "back") % len(state)]
            kept = _path(problem, (move for move in state if move != back))
            state = self._filled(problem, kept, back, *key, exchange)
        return state

    def _filled(self, problem: Problem, state: State, back: Move | None, *key: object) -> State:
        """`state` with random moves until it just reaches the target; with `back` only if there is no other."""
        while not problem.reached(_gone(state), len(state)):
            offered = [move for move in problem.moves(_gone(state)) if self._fits(problem, state, move)]
            others = [move for move in offered if move != back] or offered
            state = (*state, others[number(self.seed, *key, len(state), "take") % len(others)])
        order = shuffled(len(state), self.seed, *key, "needed")
        for move in [state[place] for place in order]:
            fewer = tuple(other for other in state if other != move)
            if problem.reached(_gone(fewer), len(fewer)) and len(path := _path(problem, fewer)) == len(fewer):
                state = path
        return state

    def _fits(self, problem: Problem, state: State, move: Move) -> bool:
        """Whether there is room for one more move of this kind."""
        return not self.equal or sum(_is_mlp(move) == _is_mlp(other) for other in state) < problem.target.amount / 2


def _is_mlp(move: Move) -> bool:
    return all(block.kind == "mlp" for block in move.blocks)


def _gone(state: Iterable[Move]) -> Mask:
    return frozenset(block for move in state for block in move.blocks)


def _decided(problem: Problem, state: State, losses: Losses, of_all: bool) -> Best:
    *moves, last = _path(problem, state)
    loss = losses[_gone(state)]
    return Best((*(Chosen(move, {}) for move in moves), Chosen(last, {last: loss}, loss=loss if of_all else None)))


def _best(losses: Losses) -> list[Mask]:
    """Masks by loss, the first of equals first, without those whose loss is not finite."""
    finite = {mask: loss.value for mask, loss in losses.items() if loss is not None}
    return sorted(finite, key=finite.__getitem__)


def _path(problem: Problem, moves: Iterable[Move]) -> State:
    """Those of `moves` that can be taken, in tie order, those that must wait for others after these."""
    path, wanted = (), frozenset(moves)
    while new := tuple(move for move in problem.offered(_gone(path)) if move in wanted):
        path += new
    return path
