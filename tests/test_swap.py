"""Swap, enumeration, and greedy with its ends kept: what greedy walks past, and what is best of all."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import NOISE, Toy, additive, plan_of, tangled, toy_outline, toy_problem

from blockpruner.blocks import Block, Move, Outline
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.journal import Journal
from blockpruner.searches.enumeration import Enumeration
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.swap import Swap
from blockpruner.searching.contract import DENSE, Problem, Stop
from blockpruner.searching.driver import price, run
from blockpruner.searching.moves import Target
from blockpruner.searching.permutations import number

NOISE_MEAN = sum(map(sum, NOISE)) / sum(map(len, NOISE))
CHEAP, DEAR = {Block("attention", 0), Block("attention", 1)}, {Block("mlp", 0), Block("mlp", 1)}
TASKS = [
    ("block", "blocks=4"),
    ("layer", "layers=2"),
    ("stock", "layers=2"),
    ("stock", "params=-20%"),
    ("block", "params=-15%"),
]


def trap(mask):
    """Greedy's: two blocks are cheap alone and dear together, two others dear alone and free together."""
    loss = 9.0 * len(mask - CHEAP - DEAR)
    loss += 10.0 if mask >= CHEAP else 1.0 * len(mask & CHEAP)
    return loss + (0.0 if mask >= DEAR else 3.0 * len(mask & DEAR))


def rugged(seed):
    """A loss without any order in it: a number from 0 to 99 per mask."""
    return lambda mask: float(number(seed, *sorted(map(str, mask))) % 100)


def gone(moves):
    return frozenset().union(*(move.blocks for move in moves))


def value(estimate):
    """Of an estimate that must be there."""
    assert estimate is not None
    return estimate.value


def moves_of(result):
    return tuple(step.move for step in result.steps)


def found(search, problem, rule):
    """The mask that a search ends in, after a look at whether its steps can be made one after the other."""
    result = run(search, problem, Toy(rule))
    for count, move in enumerate(moves_of(result)):
        assert move in problem.moves(gone(moves_of(result)[:count]))
    assert problem.reached(gone(moves_of(result)), len(result.steps))
    return gone(moves_of(result))


def ends_of_walks(problem, mask=DENSE, steps=0):
    """Every mask in which a search by steps may end, by plain recursion."""
    if problem.reached(mask, steps):
        return {mask}
    return set().union(*(ends_of_walks(problem, mask | move.blocks, steps + 1) for move in problem.moves(mask)))


# Greedy's trap


def test_swap_and_enumeration_leave_the_trap_that_greedy_falls_into():
    problem = toy_problem(3, "block", "blocks=2")
    assert trap(found(Exhaustive(), problem, trap)) == 4.0
    assert found(Swap(), problem, trap) == DEAR
    assert found(Enumeration(), problem, trap) == DEAR


def test_swap_improves_the_plan_that_greedy_found():
    problem = toy_problem(3, "block", "blocks=2")
    start = moves_of(run(Exhaustive(), problem, Toy(trap)))
    result = run(Swap(), replace(problem, start=start), Toy(trap))
    assert set(moves_of(result)) == {Move.parse("mlp.0"), Move.parse("mlp.1")}
    assert value(result.steps[-1].loss) == NOISE_MEAN


# Enumeration


@pytest.mark.parametrize(("moves", "target"), TASKS)
def test_every_mask_of_the_size_is_evaluated_once_and_the_best_wins(moves, target):
    problem = toy_problem(4, moves, target, protected=[1])
    masks, toy = ends_of_walks(problem), Toy(tangled)
    result = run(Enumeration(), problem, toy)
    assert {mask for mask, _ in toy.asked} == masks | {DENSE}
    assert len(toy.asked) == Toy.batches * (1 + len(masks))
    assert result.evaluations == price(Enumeration(), problem) == 1 + len(masks)
    assert tangled(found(Enumeration(), problem, tangled)) == min(map(tangled, masks))
    assert result.stop_reason is Stop.TARGET


@given(seed=st.integers(0, 10**6), task=st.sampled_from(TASKS))
def test_no_search_by_steps_finds_a_lower_loss(seed, task):
    problem, rule = toy_problem(3, *task), rugged(seed)
    best = rule(found(Enumeration(), problem, rule))
    assert best <= rule(found(Exhaustive(), problem, rule))
    if problem.target.unit != "params":  # an exchange may remove more parameters than a last step would
        assert best <= rule(found(Swap(), problem, rule))


def test_the_first_of_equals_is_the_first_in_tie_order():
    for moves, target, first in [
        ("block", "blocks=2", ["attention.0", "attention.1"]),
        ("stock", "layers=2", ["attention.0+mlp.0", "attention.1+mlp.1"]),
        ("block", "params=-12%", ["mlp.0"]),
    ]:
        result = run(Enumeration(), toy_problem(3, moves, target), Toy(lambda mask: 1.0))
        assert [str(move) for move in moves_of(result)] == first


def test_too_many_masks_are_refused_with_their_number():
    with pytest.raises(InputError, match="there are 1,677,106,640 masks to evaluate, and limit=5000"):
        price(Enumeration(), toy_problem(24, "block", "blocks=9"))
    with pytest.raises(InputError, match="more than 50 masks"):
        price(Enumeration(limit=50), toy_problem(6, "stock", "layers=3"))
    assert price(Enumeration(limit=28), toy_problem(4, "block", "blocks=6")) == 1 + math.comb(8, 6)
    with pytest.raises(InputError, match="there are 28 masks to evaluate, and limit=27"):
        price(Enumeration(limit=27), toy_problem(4, "block", "blocks=6"))


@pytest.mark.parametrize("search", [Swap(), Enumeration()], ids=str)
def test_a_loss_that_is_not_finite_never_wins(search):
    problem = toy_problem(3, "block", "blocks=2")
    rule = additive({"attention.0": -math.inf, "attention.1": math.nan, "mlp.1": 1.0, "mlp.2": 2.0})
    assert found(search, problem, rule) == {Block("mlp", 1), Block("mlp", 2)}
    with pytest.raises(CheckFailedError, match="none of the"):
        run(search, problem, Toy(lambda mask: math.nan if mask else 0.0))


# Swap


@given(seed=st.integers(0, 10**6), task=st.sampled_from(TASKS))
def test_swap_ends_where_no_single_exchange_helps(seed, task):
    problem, rule = toy_problem(3, *task), rugged(seed)
    result = run(Swap(rounds=99), problem, Toy(rule))
    mask, steps = gone(moves_of(result)), len(result.steps)
    for move in moves_of(result):
        rest = [other for other in moves_of(result) if other != move]
        if not all(other in problem.moves(gone(rest[:place])) for place, other in enumerate(rest)):
            continue  # stock pairs that stand on this one
        assert not problem.reached(gone(rest), steps - 1) or rule(gone(rest)) >= rule(mask)
        for other in problem.moves(gone(rest)):
            new = gone(rest) | other.blocks
            assert not problem.reached(new, steps) or rule(new) >= rule(mask)


def test_swap_takes_the_best_exchange_of_each_round_and_the_first_of_equals():
    start = (Move.parse("attention.0"), Move.parse("attention.1"))
    problem = replace(toy_problem(3, "block", "blocks=2"), start=start)
    rule = additive({"attention.0": 5.0, "attention.1": 5.0, "mlp.0": 2.0, "mlp.1": 2.0, "mlp.2": 1.0})
    toy = Toy(rule)
    one = run(Swap(rounds=1), problem, toy)
    assert [str(move) for move in moves_of(one)] == ["attention.1", "mlp.2"]
    assert len(toy.asked) == Toy.batches * (1 + 1 + 2 * 4)  # dense, start, 2 removed against 4 kept
    assert one.evaluations == 10 <= price(Swap(rounds=1), problem)
    assert found(Swap(), problem, rule) == {Block("mlp", 2), Block("mlp", 0)}


def test_gain_is_what_an_exchange_must_bring():
    start = (Move.parse("attention.0"),)
    problem = replace(toy_problem(2, "block", "blocks=1"), start=start)
    rule = additive({"attention.0": 3.0, "mlp.0": 1.0})
    assert found(Swap(gain=1.5), problem, rule) == {Block("mlp", 0)}
    assert found(Swap(gain=2.0), problem, rule) == {Block("attention", 0)}


def test_a_move_is_put_back_alone_where_the_target_stays_reached():
    start = tuple(
        map(Move.parse, ("attention.0", "attention.1", "mlp.0"))
    )  # the last removes 300 of 2400, enough alone
    problem = replace(toy_problem(3, "block", "params=-12%"), start=start)
    rule = additive({"attention.0": 1.0, "attention.1": 2.0, "mlp.0": 1.0})
    assert found(Swap(), problem, rule) == {Block("mlp", 0)}


def test_an_earlier_plan_that_is_too_short_is_filled_up_and_one_too_long_is_cut():
    long = tuple(map(Move.parse, ("mlp.2", "mlp.1", "mlp.0")))
    cut = replace(toy_problem(3, "block", "blocks=2"), start=long)
    rule = additive({"mlp.2": 0.0, "mlp.1": 0.0, "mlp.0": 0.0, "attention.1": 0.5})
    assert moves_of(run(Swap(), cut, Toy(rule))) == long[:2]
    filled = replace(toy_problem(3, "block", "blocks=4"), start=long)
    assert moves_of(run(Swap(), filled, Toy(rule))) == (*long, Move.parse("attention.1"))


def test_some_tries_per_round_are_drawn_from_seed_and_round_alone():
    problem = toy_problem(4, "block", "blocks=3")
    asked = []
    for seed in (0, 0, 1):
        toy = Toy(tangled)
        result = run(Swap(tries=3, seed=seed, rounds=6), problem, toy)
        assert result.evaluations <= 1 + 8 + 1 + 6 * 3
        asked.append(toy.asked)
    assert asked[0] == asked[1] != asked[2]
    assert tangled(found(Swap(tries=2, rounds=200), problem, tangled)) <= tangled(found(Swap(), problem, tangled))


def test_scores_are_the_losses_with_another_move_in_its_place():
    problem = toy_problem(3, "block", "blocks=2")
    for search in (Swap(), Enumeration()):
        result = run(search, problem, Toy(trap))
        for step in result.steps:
            rest = gone(moves_of(result)) - step.move.blocks
            assert set(step.scores) == set(problem.moves(rest))
            for move, loss in step.scores.items():
                assert value(loss) == trap(rest | move.blocks) + NOISE_MEAN
            assert min(step.scores, key=lambda move: value(step.scores[move])) == step.move


def test_what_does_not_reach_the_target_is_not_among_the_scores():
    problem = toy_problem(3, "block", "params=-12%")  # one mlp is enough, one attention block is not
    (step,) = run(Swap(), problem, Toy(additive({"mlp.1": 0.0}))).steps
    assert {str(move) for move in step.scores} == {"mlp.0", "mlp.1", "mlp.2"}


@pytest.mark.parametrize("wrong", [{"tries": -1}, {"gain": -0.1}, {"rounds": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="out of range"):
        Swap(**wrong)


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 3))
def test_what_swap_makes_of_stock_moves_can_be_made_step_by_step(seed, layers):
    problem = toy_problem(4, "stock", f"layers={layers}")
    assert found(Swap(), problem, rugged(seed)) in ends_of_walks(problem)


# Both


@pytest.mark.parametrize(("moves", "target"), TASKS)
@pytest.mark.parametrize("search", [Swap(), Swap(tries=4), Enumeration()], ids=str)
class TestBoth:
    def test_reaches_the_target_touches_nothing_protected_and_asks_for_no_more_than_it_said(
        self, search, moves, target
    ):
        problem = toy_problem(5, moves, target, protected=[1])
        result = run(search, problem, Toy(tangled))
        assert result.stop_reason is Stop.TARGET
        assert all(block.layer != 1 for block in gone(moves_of(result)))
        assert result.evaluations <= price(search, problem)
        assert value(result.steps[-1].loss) == tangled(gone(moves_of(result))) + NOISE_MEAN
        assert not plan_of(result, search, problem).nested

    def test_cut_anywhere_and_run_again_it_ends_in_the_same_plan_and_journal(self, search, moves, target, tmp_path):
        problem, path = toy_problem(3, moves, target), tmp_path / "journal.jsonl"

        def go(budget=None):
            with Journal.open(path, {"model": "toy"}) as journal:
                return plan_of(run(search, problem, Toy(tangled), journal=journal, budget=budget), search, problem)

        plan, whole = go(), path.read_bytes()
        for end in range(whole.index(b"\n") + 1, len(whole), len(whole) // 12):
            path.write_bytes(whole[:end])
            assert go() == plan
            assert path.read_bytes() == whole
        path.unlink()
        assert not go(budget=2).steps
        assert go() == plan
        assert path.read_bytes() == whole


def test_several_stacks_go_through():
    a, b = toy_outline(3, stack="encoder"), toy_outline(3, stack="decoder")
    sizes = {**a.parameters, **b.parameters}
    outline = Outline(a.blocks + b.blocks, sizes, a.total_parameters + b.total_parameters, a.serial | b.serial)
    for moves, target in TASKS:
        problem = Problem(outline, moves, Target.parse(target))
        assert tangled(found(Swap(), problem, tangled)) >= tangled(found(Enumeration(), problem, tangled))


# Greedy with its ends kept


def sleb(rule, depth, count):
    """SLEB as its authors wrote it down: of the layers that are alive, the first and the last are no candidates."""
    alive = list(range(depth))
    for _ in range(count):
        alive.remove(min(alive[1:-1], key=lambda layer: rule({*range(depth)} - {*alive} | {layer})))
    return {*range(depth)} - {*alive}


@given(seed=st.integers(0, 10**6), depth=st.integers(3, 7), data=st.data())
def test_with_ends_kept_greedy_removes_the_layers_that_sleb_removes(seed, depth, data):
    count = data.draw(st.integers(1, depth - 2))
    rule = rugged(seed)
    mask = found(Exhaustive(ends=True), toy_problem(depth, "layer", f"layers={count}"), rule)
    blocks = toy_outline(depth).blocks
    layers = sleb(lambda layers: rule(frozenset(b for b in blocks if b.layer in layers)), depth, count)
    assert {block.layer for block in mask} == layers


def test_ends_are_those_of_each_stack_and_the_price_knows_them():
    a, b = toy_outline(3, stack="encoder"), toy_outline(3, stack="decoder")
    sizes = {**a.parameters, **b.parameters}
    outline = Outline(a.blocks + b.blocks, sizes, a.total_parameters + b.total_parameters, a.serial | b.serial)
    problem = Problem(outline, "layer", Target.parse("layers=2"))
    assert {(b.stack, b.layer) for b in found(Exhaustive(ends=True), problem, tangled)} == {
        ("encoder", 1),
        ("decoder", 1),
    }
    assert price(Exhaustive(ends=True), problem) == 1 + 2 + 1
    with pytest.raises(InputError, match="layers=3 is more than there is: 'layer' moves reach at most layers=2"):
        price(Exhaustive(ends=True), replace(problem, target=Target.parse("layers=3")))
