"""One-shot, iterative and span: searches that go by the scores of a criterion."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import NOISE, Toy, additive, plan_of, tangled, toy_outline, toy_problem

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Block, Move, Outline
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.journal import Journal
from blockpruner.registry import parse_method
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.iterative import Iterative
from blockpruner.searches.one_shot import OneShot
from blockpruner.searches.span import Span
from blockpruner.searching.contract import DENSE, Problem, Stop
from blockpruner.searching.driver import price, run
from blockpruner.searching.moves import Target
from blockpruner.searching.permutations import number

NOISE_MEAN = sum(map(sum, NOISE)) / sum(map(len, NOISE))


class Scorer:
    """Scores by a rule (mask, move) -> number, not finite: None; `asked` lists what it was asked for."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, sweeps):
        def scores(mask, moves):
            self.asked.append((mask, tuple(moves)))
            return {move: scored(self.rule(mask, move)) for move in moves}

        return scores


def scored(value):
    known = math.isfinite(value)
    return Estimate(value=value, stderr=None, n=0, unit="toy", reason="made up") if known else None


def by_name(**scores):
    """The sum of the scores of the blocks that a move takes; those that are not named count 9."""
    return Scorer(lambda mask, move: sum(scores.get(str(block).replace(".", "_"), 9.0) for block in move.blocks))


def leave_one_out(sweeps):
    return lambda mask, moves: {
        move: sweeps.losses((mask | move.blocks,), "score")[mask | move.blocks] for move in moves
    }


def value(estimate):
    """Of an estimate that must be there."""
    assert estimate is not None
    return estimate.value


def taken(result):
    return [str(step.move) for step in result.steps]


def gone(steps):
    return frozenset().union(*(step.move.blocks for step in steps))


def two_stacks(encoder=3, decoder=4):
    a, b = toy_outline(encoder, stack="encoder"), toy_outline(decoder, stack="decoder")
    both = {**a.parameters, **b.parameters}
    return Outline(a.blocks + b.blocks, both, a.total_parameters + b.total_parameters, a.serial | b.serial)


# One-shot


def test_moves_go_by_rising_score_from_one_ranking_of_all_of_them():
    scorer, problem = by_name(mlp_2=-1.0, attention_1=0.5, mlp_0=2.0), toy_problem(4, "block", "blocks=3")
    result = run(OneShot(), problem, Toy(tangled), scorer=scorer)
    assert taken(result) == ["mlp.2", "attention.1", "mlp.0"]
    assert scorer.asked == [(DENSE, problem.moves(DENSE))]


def test_the_first_in_tie_order_of_equals_goes():
    result = run(OneShot(), toy_problem(3, "block", "blocks=4"), Toy(tangled), scorer=by_name())
    assert taken(result) == ["attention.0", "attention.1", "attention.2", "mlp.0"]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_move_without_a_finite_score_is_not_taken(bad):
    result = run(OneShot(), toy_problem(2, "block", "blocks=2"), Toy(tangled), scorer=by_name(attention_0=bad, mlp_1=1))
    assert taken(result) == ["mlp.1", "attention.1"]
    assert result.steps[0].scores[Move.parse("attention.0")] is None


@pytest.mark.parametrize("search", [OneShot(), Iterative(), Span()])
def test_no_finite_score_at_all_is_a_failed_check(search):
    with pytest.raises(CheckFailedError, match="none of the 3 candidates"):
        run(search, toy_problem(3, "layer", "layers=1"), Toy(tangled), scorer=Scorer(lambda mask, move: math.nan))


def test_every_step_has_its_loss_from_one_sweep_and_the_scores_of_what_it_stood_against():
    problem, toy = toy_problem(3, "block", "blocks=3"), Toy(tangled)
    result = run(OneShot(), problem, toy, scorer=by_name(mlp_0=1.0, mlp_1=2.0, mlp_2=3.0))
    for count, step in enumerate(result.steps, 1):
        mask = gone(result.steps[:count])
        assert value(step.loss) == tangled(mask) + NOISE_MEAN
        assert list(step.scores) == list(problem.moves(gone(result.steps[: count - 1])))
        assert value(step.scores[step.move]) == count
    nested = [gone(result.steps[:count]) for count in range(1, 4)]
    assert toy.asked == [(DENSE, 0), (DENSE, 1), *((mask, 0) for mask in nested), *((mask, 1) for mask in nested)]


@given(weights=st.lists(st.integers(-3, 9), min_size=8, max_size=8), count=st.integers(1, 8))
def test_where_blocks_do_not_interact_ranking_by_single_losses_finds_the_best_of_all_subsets(weights, count):
    blocks = toy_outline(4).blocks
    rule = additive(dict(zip(map(str, blocks), map(float, weights), strict=True)))
    result = run(OneShot(), toy_problem(4, "block", f"blocks={count}"), Toy(rule), scorer=leave_one_out)
    assert rule(gone(result.steps)) == min(rule(frozenset(some)) for some in itertools.combinations(blocks, count))


def test_overlapping_stock_moves_are_passed_over():
    scorer = by_name(mlp_0=1.0, attention_1=0.0, mlp_1=1.5, attention_0=8.0)
    result = run(OneShot(), toy_problem(3, "stock", "layers=2"), Toy(tangled), scorer=scorer)
    assert taken(result) == ["attention.1+mlp.0", "attention.2+mlp.1"]  # and not layer 1, which scores 1.5
    assert len(scorer.asked) == 1


def test_a_list_that_ends_before_the_target_is_made_again_on_top_of_what_is_gone():
    scorer = by_name(mlp_0=0.0, attention_1=0.0)
    result = run(OneShot(), toy_problem(2, "stock", "layers=2"), Toy(tangled), scorer=scorer)
    assert taken(result) == ["attention.1+mlp.0", "attention.0+mlp.1"]
    assert [len(moves) for _, moves in scorer.asked] == [3, 1]
    assert result.stop_reason is Stop.TARGET


def test_parameters_are_removed_until_the_first_mask_that_reaches_the_target():
    problem = toy_problem(4, "block", "params=-12%")  # 3200 in all: an mlp has 300, attention 100
    result = run(OneShot(), problem, Toy(tangled), scorer=by_name(mlp_3=0.0, attention_0=1.0))
    assert taken(result) == ["mlp.3", "attention.0"]
    assert result.evaluations <= price(OneShot(), problem) == 1 + 4


def test_an_earlier_plan_goes_first_and_the_rest_is_scored_on_top_of_it():
    start = (Move.parse("mlp.3"), Move.parse("attention.2"))
    problem, scorer = replace(toy_problem(4, "block", "blocks=3"), start=start), by_name(mlp_1=0.0)
    result = run(OneShot(), problem, Toy(tangled), scorer=scorer)
    assert taken(result) == ["mlp.3", "attention.2", "mlp.1"]
    assert scorer.asked[0][0] == gone(result.steps[:2])
    assert all(
        value(step.loss) == tangled(gone(result.steps[: n + 1])) + NOISE_MEAN for n, step in enumerate(result.steps)
    )


def test_layers_of_an_earlier_plan_go_as_blocks_where_moves_are_blocks_and_no_further_than_the_target():
    start = (Move.parse("attention.3+mlp.3"), Move.parse("attention.1+mlp.1"))
    problem = replace(toy_problem(4, "block", "blocks=3"), start=start)
    assert taken(run(OneShot(), problem, Toy(tangled), scorer=by_name())) == ["attention.3", "mlp.3", "attention.1"]


@pytest.mark.parametrize(("start", "said"), [("mlp.2", "mlp.2"), ("attention.0", "attention.0"), ("mlp.9", "mlp.9")])
def test_an_earlier_plan_that_these_moves_cannot_make_is_refused(start, said):
    problem = replace(toy_problem(4, "layer", "layers=1", protected=[2]), start=(Move.parse(start),))
    with pytest.raises(InputError, match=f"takes {said}, which no 'layer' move"):
        run(OneShot(), problem, Toy(tangled), scorer=by_name())


# Iterative


@given(every=st.integers(1, 7), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_iterative_takes_the_best_of_each_new_ranking(every, count, seed):
    def rule(mask, move):
        return float(number(seed, *sorted(map(str, mask)), "then", move) % 7)

    left, order, problem = list(toy_outline(3).blocks), [], toy_problem(3, "block", f"blocks={count}")
    while len(order) < count:
        mask = frozenset(order)
        ranked = sorted(left, key=lambda block: (rule(mask, Move.of(block)), block.order))
        order += ranked[: min(every, count - len(order))]
        left = [block for block in left if block not in order]
    scorer = Scorer(rule)
    assert taken(run(Iterative(every), problem, Toy(tangled), scorer=scorer)) == list(map(str, order))
    assert len(scorer.asked) == math.ceil(count / every)


def test_iterative_with_single_losses_is_the_greedy_search():
    problem = toy_problem(4, "block", "blocks=5")
    ranked = run(Iterative(), problem, Toy(tangled), scorer=leave_one_out)
    assert ranked.steps == run(Exhaustive(), problem, Toy(tangled)).steps


def test_every_must_be_one_or_more():
    assert parse_method("iterative:every=3", {"iterative": Iterative}, "search") == Iterative(3)
    with pytest.raises(InputError, match="every=0"):
        Iterative(0)


# Span


@given(depth=st.integers(1, 7), data=st.data())
def test_the_span_is_the_first_of_lowest_score_among_all_that_touch_no_protected_layer(depth, data):
    length = data.draw(st.integers(1, depth))
    protected = data.draw(st.sets(st.integers(0, depth - 1), max_size=2))
    height = data.draw(st.lists(st.integers(0, 3), min_size=depth, max_size=depth))
    starts = [s for s in range(depth - length + 1) if protected.isdisjoint(range(s, s + length))]
    scorer = Scorer(lambda mask, move: float(sum(height[block.layer] for block in move.blocks)))
    try:
        result = run(Span(), toy_problem(depth, "layer", f"layers={length}", [*protected]), Toy(tangled), scorer=scorer)
    except InputError:
        assert not starts
        return
    best = min(starts, key=lambda start: sum(height[start : start + length]))
    assert taken(result) == [f"attention.{layer}+mlp.{layer}" for layer in range(best, best + length)]
    assert len(scorer.asked) == 1
    assert result.stop_reason is Stop.TARGET
    assert result.evaluations == price(Span(), toy_problem(depth, "layer", f"layers={length}")) == 2


def test_the_first_layer_may_begin_a_span_and_n_layers_are_scored_as_n():
    scorer = Scorer(lambda mask, move: float(min(block.layer for block in move.blocks)))
    result = run(Span(), toy_problem(5, "layer", "layers=2"), Toy(tangled), scorer=scorer)
    assert taken(result) == ["attention.0+mlp.0", "attention.1+mlp.1"]
    (mask, spans) = scorer.asked[0]
    assert (mask, {len(move.blocks) for move in spans}, len(spans)) == (DENSE, {4}, 4)
    assert list(result.steps[0].scores) == list(spans)
    assert [step.loss and value(step.loss) for step in result.steps] == [None, tangled(gone(result.steps)) + NOISE_MEAN]


@pytest.mark.parametrize(
    ("moves", "target", "layers"), [("block", "blocks=2", 1), ("block", "blocks=4", 2), ("stock", "params=-26%", 3)]
)
def test_for_blocks_and_parameters_the_span_is_the_shortest_that_reaches_them(moves, target, layers):
    result = run(Span(), toy_problem(4, moves, target), Toy(tangled), scorer=by_name())
    assert len(result.steps) == layers
    assert result.stop_reason is Stop.TARGET


def test_a_number_of_blocks_that_no_span_has_is_refused():
    with pytest.raises(InputError, match="blocks=3 cannot be met exactly by a span"):
        price(Span(), toy_problem(4, "block", "blocks=3"))


def test_a_number_that_the_layers_of_one_stack_have_is_met_by_these():
    outline = toy_outline(4, stack="encoder")
    more = [Block(kind, layer, "decoder") for layer in range(4) for kind in ("attention", "cross_attention", "mlp")]
    both = Outline((*outline.blocks, *more), dict.fromkeys((*outline.blocks, *more), 10), 400)
    result = run(Span(), Problem(both, "block", Target.parse("blocks=8")), Toy(tangled), scorer=by_name())
    assert {block.stack for step in result.steps for block in step.move.blocks} == {"encoder"}
    assert len(result.steps) == 4


def test_a_span_lies_in_one_stack():
    problem = Problem(two_stacks(2, 3), "layer", Target.parse("layers=3"))
    result = run(Span(), problem, Toy(tangled), scorer=by_name())
    assert {block.stack for block in gone(result.steps)} == {"decoder"}
    with pytest.raises(InputError, match="at most 3 layers"):
        price(Span(), Problem(two_stacks(2, 3), "layer", Target.parse("layers=4")))


def test_a_span_of_attention_alone_is_refused():
    with pytest.raises(InputError, match="whole layers, and the moves are 'attention'"):
        price(Span(), toy_problem(4, "attention", "blocks=2"))


# All of them

SEARCHES = [OneShot(), Iterative(), Iterative(2), Span()]
TASKS = [("block", "blocks=4"), ("layer", "layers=2"), ("stock", "params=-20%")]


@pytest.mark.parametrize(("moves", "target"), TASKS)
@pytest.mark.parametrize("search", SEARCHES, ids=str)
class TestEverySearchByRank:
    def test_reaches_the_target_touches_nothing_protected_and_asks_for_no_more_than_it_said(
        self, search, moves, target
    ):
        problem = toy_problem(6, moves, target, protected=[1])
        result = run(search, problem, Toy(tangled), scorer=by_name(mlp_1=-5.0, attention_1=-5.0))
        assert result.stop_reason is Stop.TARGET
        assert all(block.layer != 1 for block in gone(result.steps))
        assert result.evaluations <= price(search, problem)
        assert moves == "stock" or result.evaluations == price(search, problem)

    def test_cut_anywhere_and_run_again_it_ends_in_the_same_plan_and_journal(self, search, moves, target, tmp_path):
        problem, path = toy_problem(4, moves, target), tmp_path / "journal.jsonl"

        def go():
            with Journal.open(path, {"model": "toy"}) as journal:
                return plan_of(
                    run(search, problem, Toy(tangled), journal=journal, scorer=leave_one_out), search, problem
                )

        plan, whole = go(), path.read_bytes()
        head = whole.index(b"\n") + 1
        for end in range(head, len(whole), len(whole) // 12):
            path.write_bytes(whole[:end])
            assert go() == plan
            assert path.read_bytes() == whole

    def test_without_a_criterion_it_says_that_one_is_needed(self, search, moves, target):
        with pytest.raises(InputError, match="ranks moves by a criterion"):
            run(search, toy_problem(4, moves, target), Toy(tangled))


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_models_with_several_stacks_and_cross_attention_go_through(search):
    outline = two_stacks()
    cross = tuple(Block("cross_attention", layer, "decoder") for layer in range(4))
    sizes = {**outline.parameters, **dict.fromkeys(cross, 50)}
    whole = Outline((*outline.blocks, *cross), sizes, 9000, frozenset(["encoder"]))
    result = run(search, Problem(whole, "layer", Target.parse("layers=2")), Toy(tangled), scorer=by_name())
    assert result.stop_reason is Stop.TARGET


def test_what_is_decided_before_an_interrupt_is_a_plan():
    toy, problem = Toy(tangled), toy_problem(4, "block", "blocks=4")

    def second_ranking_interrupts(mask, move):
        if len(mask) == 2:
            raise KeyboardInterrupt
        return 0.0

    result = run(Iterative(2), problem, toy, scorer=Scorer(second_ranking_interrupts))
    assert (taken(result), result.stop_reason) == (["attention.0", "attention.1"], Stop.INTERRUPTED)
