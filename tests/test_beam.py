"""Beam search: against the greedy search it widens, and against all subsets."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NOISE, Toy, additive, plan_of, tangled, toy_problem

from blockpruner.blocks import Block, format_mask
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.journal import Journal
from blockpruner.searches.beam import Beam
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searching.contract import DENSE, Stop
from blockpruner.searching.driver import price, run
from blockpruner.searching.permutations import number

IDENTITY = {"model": "toy"}
NOISE_MEAN = sum(map(sum, NOISE)) / sum(map(len, NOISE))
TASKS = [("block", "blocks=5"), ("layer", "layers=2"), ("stock", "layers=2"), ("block", "params=-12%")]


def taken(result):
    return [str(step.move) for step in result.steps]


def gone(result):
    return frozenset(block for step in result.steps for block in step.move.blocks)


def trap(mask):
    """Two blocks cheap alone and dear together; two others dear alone and free together."""
    cheap = sum(str(block) in ("attention.0", "mlp.0") for block in mask)
    paired = sum(str(block) in ("attention.2", "mlp.3") for block in mask)
    return 0.1 * cheap + 4.9 * (cheap == 2) + 1.0 * (paired == 1) + 2.0 * (len(mask) - cheap - paired)


def plain_beam(rule, problem, width):
    """The loss of the best mask, by a plain beam search for a number of moves; ties are not looked at."""
    beams, steps = {DENSE}, 0
    while not problem.reached(next(iter(beams)), steps):
        grown = {mask | move.blocks for mask in beams for move in problem.moves(mask)}
        beams, steps = set(sorted(grown, key=rule)[:width]), steps + 1
    return min(map(rule, beams))


@given(depth=st.integers(1, 3), granularity=st.sampled_from(["block", "layer", "stock"]), data=st.data())
@settings(max_examples=60)
def test_of_width_1_it_is_the_exhaustive_search_step_by_step(depth, granularity, data):
    values, table = st.sampled_from([0.0, 1.0, 1.0, 2.0, math.nan]), {}

    def rule(mask):
        if mask not in table:
            table[mask] = data.draw(values) if mask else 1.0
        return table[mask]

    problem = toy_problem(depth, granularity, f"params=-{data.draw(st.integers(1, 50))}%")
    try:
        expected = run(Exhaustive(), problem, Toy(rule))
    except CheckFailedError:
        with pytest.raises(CheckFailedError):
            run(Beam(width=1), problem, Toy(rule))
        return
    assert run(Beam(width=1), problem, Toy(rule)) == expected
    assert price(Beam(width=1), problem) == price(Exhaustive(), problem)


@given(seed=st.integers(0, 10**6), width=st.integers(2, 6), count=st.integers(1, 6))
@settings(max_examples=40)
def test_wide_it_finds_what_a_plain_beam_search_finds(seed, width, count):
    def rule(mask):  # no two masks alike
        return float(number(seed, format_mask(mask)) % 2**20)

    problem = toy_problem(3, "block", f"blocks={count}")
    assert rule(gone(run(Beam(width), problem, Toy(rule)))) == plain_beam(rule, problem, width)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_beam_that_holds_everything_finds_the_best_of_all_subsets(count):
    problem = toy_problem(4, "block", f"blocks={count}")
    best = min(tangled(frozenset(blocks)) for blocks in itertools.combinations(problem.outline.blocks, count))
    assert tangled(gone(run(Beam(width=100), problem, Toy(tangled)))) == best


@pytest.mark.parametrize("width", [3, 4, 8])
def test_it_gets_out_of_the_trap_in_which_greedy_ends(width):
    problem = toy_problem(5, "block", "blocks=2")
    assert trap(gone(run(Exhaustive(), problem, Toy(trap)))) == pytest.approx(1.1)
    assert taken(run(Beam(width), problem, Toy(trap))) == ["attention.2", "mlp.3"]


def test_of_equals_the_way_that_arose_first_is_kept():
    result = run(Beam(), toy_problem(3, "block", "blocks=4"), Toy(lambda mask: float(len(mask))))
    assert taken(result) == ["attention.0", "attention.1", "attention.2", "mlp.0"]


def test_every_mask_is_asked_for_once_and_no_step_begins_before_the_last_is_known():
    toy = Toy(tangled)
    run(Beam(), toy_problem(4, "block", "blocks=4"), toy)
    assert len(toy.asked) == len(set(toy.asked))
    sizes = [len(mask) for mask, _ in toy.asked]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("moves", "target"), TASKS)
@pytest.mark.parametrize("width", [1, 3, 9])
class TestEveryTask:
    def test_reaches_the_target_without_a_protected_layer_for_the_price_it_said(self, width, moves, target):
        problem = toy_problem(5, moves, target, protected=[2])
        result = run(Beam(width), problem, Toy(tangled))
        assert result.stop_reason is Stop.TARGET
        assert problem.reached(gone(result), len(result.steps))
        assert not problem.reached(gone(result) - result.steps[-1].move.blocks, len(result.steps) - 1)
        assert all(block.layer != 2 for block in gone(result))
        assert result.evaluations <= price(Beam(width), problem)

    def test_every_step_has_its_loss_and_those_of_the_moves_beside_it(self, width, moves, target):
        mask, problem = DENSE, toy_problem(5, moves, target)
        for step in run(Beam(width), problem, Toy(tangled)).steps:
            assert tuple(step.scores) == problem.moves(mask)
            for move, score in step.scores.items():
                assert score is not None
                assert score.value == pytest.approx(tangled(mask | move.blocks) + NOISE_MEAN)
            mask |= step.move.blocks
            assert step.loss == step.scores[step.move]

    def test_cut_anywhere_it_goes_on_to_the_same_plan_and_journal(self, width, moves, target, tmp_path):
        problem, path = toy_problem(3, moves, target), tmp_path / "journal.jsonl"
        with Journal.open(path, IDENTITY) as journal:
            whole = plan_of(run(Beam(width), problem, Toy(tangled), journal=journal), Beam(width), problem)
        data = path.read_bytes()
        for size in range(data.index(b"\n") + 1, len(data), len(data) // 7):
            path.write_bytes(data[:size])
            with Journal.open(path, IDENTITY) as journal:
                result = run(Beam(width), problem, Toy(tangled), journal=journal)
            assert plan_of(result, Beam(width), problem) == whole
            assert path.read_bytes() == data


def test_the_cost_in_its_description_is_what_it_says():
    for width, count, depth in itertools.product((2, 4), (2, 3, 5), (4, 8)):
        moves = 2 * depth
        formula = moves + width * (count - 1) * (moves - count / 2)
        assert Beam(width).evaluations(toy_problem(depth, "block", f"blocks={count}")) == formula
    assert Beam(width=100).evaluations(toy_problem(2, "block", "blocks=2")) == 4 + 4 * 3


def test_masks_that_reach_a_params_target_early_wait_for_the_rest_of_the_beam():
    weights = {"mlp.0": 3.0, "attention.0": 1.0, "attention.1": 1.0, "attention.2": 0.5}

    def rule(mask):
        return additive(weights)(mask)

    # of 2400 parameters an mlp removes 300, an attention block 100: 12.5% is one mlp or three attention blocks
    problem = toy_problem(3, "attention", "params=-12.5%")
    assert len(run(Beam(), problem, Toy(rule)).steps) == 3
    problem = toy_problem(3, "block", "params=-12.5%")
    assert taken(run(Beam(width=6), problem, Toy(rule))) == ["attention.2", "attention.0", "attention.1"]
    weights["mlp.0"] = 2.4
    assert taken(run(Beam(width=6), problem, Toy(rule))) == ["mlp.0"]
    weights["mlp.0"] = 2.5  # of equals the one that was there first
    assert taken(run(Beam(width=6), problem, Toy(rule))) == ["mlp.0"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_wins(bad):
    def rule(mask):
        return bad if Block("attention", 0) in mask else tangled(mask)

    problem = toy_problem(3, "block", "blocks=3")
    assert Block("attention", 0) not in gone(run(Beam(), problem, Toy(rule)))


def test_no_finite_mask_is_a_failed_check_unless_another_one_has_ended():
    problem = toy_problem(3, "block", "params=-12.5%")
    with pytest.raises(CheckFailedError, match="none of the 15 candidates"):
        run(Beam(width=9), toy_problem(3, "block", "blocks=2"), Toy(lambda mask: 1.0 if len(mask) < 2 else math.nan))
    result = run(Beam(width=9), problem, Toy(lambda mask: 1.0 if len(mask) < 2 else math.nan))
    assert taken(result) == ["mlp.0"]


def test_stopped_before_its_end_it_has_decided_nothing():
    result = run(Beam(), toy_problem(4, "block", "blocks=4"), Toy(tangled), budget=30)
    assert (result.steps, result.stop_reason) == ((), Stop.BUDGET)


def test_a_width_of_nothing_is_an_input_error():
    with pytest.raises(InputError, match="width=0"):
        Beam(width=0)
