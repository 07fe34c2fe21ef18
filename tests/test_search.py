"""The driver and the searches, on toy objectives whose answers are known by other ways."""

import itertools
import math
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import NOISE, Toy, additive, plan_of, tangled, toy_outline, toy_problem

from blockpruner.artifacts import Estimate, Work
from blockpruner.blocks import Block, Move
from blockpruner.errors import CheckFailedError
from blockpruner.journal import Journal
from blockpruner.plan import Plan
from blockpruner.searches import SEARCHES
from blockpruner.searches.beam import Beam
from blockpruner.searches.enumeration import Enumeration
from blockpruner.searches.evolution import Evolution
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.random import Random
from blockpruner.searches.span import Span
from blockpruner.searches.swap import Swap
from blockpruner.searching.contract import DENSE, Best, Chosen, Problem, Proposals, Stop, lowest
from blockpruner.searching.driver import price, run

IDENTITY = {"model": "toy"}
EVALUATIONS = 1 + 8 + 7 + 6 + 5 + 4  # of the dense model, and of 5 of 8 blocks
NOISE_MEAN = sum(map(sum, NOISE)) / sum(map(len, NOISE))


def taken(result):
    return [str(step.move) for step in result.steps]


# The paper's loop


def papers_loop(rule, depth, count):
    """BlockPruner as its authors wrote it down, on sets of pairs; nothing of this package is used."""
    removed: set[tuple[str, int]] = set()
    order = []
    for _ in range(count):
        best, best_loss = None, math.inf
        for unit in [(kind, layer) for kind in ("attention", "mlp") for layer in range(depth)]:
            if unit in removed:
                continue
            loss = rule(frozenset(removed | {unit}))
            if loss < best_loss:
                best, best_loss = unit, loss
        removed |= {best} if best else set()
        order.append(f"{best[0]}.{best[1]}" if best else None)
    return order


def as_pairs(mask):
    return frozenset((block.kind, block.layer) for block in mask)


@given(depth=st.integers(1, 4), data=st.data())
def test_exhaustive_removes_what_the_papers_loop_removes_ties_and_nan_included(depth, data):
    values = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, math.nan, math.inf])
    table = {}

    def rule(pairs):
        if pairs not in table:
            table[pairs] = data.draw(values) if pairs and len(pairs) < 2 * depth else 1.0
        return table[pairs]

    count = data.draw(st.integers(1, 2 * depth))
    problem, toy = toy_problem(depth, "block", f"blocks={count}"), Toy(lambda mask: rule(as_pairs(mask)))
    expected = papers_loop(rule, depth, count)
    if None in expected:
        with pytest.raises(CheckFailedError):
            run(Exhaustive(), problem, toy)
        return
    result = run(Exhaustive(), problem, toy)
    assert taken(result) == expected


def test_where_blocks_do_not_interact_exhaustive_finds_the_best_of_all_subsets():
    weights = {"attention.2": 0.5, "mlp.0": 1.0, "mlp.3": 1.5, "attention.0": 2.0, "mlp.1": 2.5}
    rule = additive(weights)
    result = run(Exhaustive(), toy_problem(4, "block", "blocks=3"), Toy(rule))
    best = min(itertools.combinations(toy_outline(4).blocks, 3), key=lambda blocks: rule(frozenset(blocks)))
    assert set(taken(result)) == set(map(str, best))
    assert taken(result) == ["attention.2", "mlp.0", "mlp.3"]


def test_with_interactions_each_step_is_the_best_one_on_top_of_those_before():
    result = run(Exhaustive(), toy_problem(4, "block", "blocks=5"), Toy(tangled))
    assert taken(result) == papers_loop(
        lambda pairs: tangled(frozenset(Block(kind, layer) for kind, layer in pairs)), 4, 5
    )


@pytest.mark.parametrize("moves", ["attention", "mlp", "layer", "stock"])
def test_other_moves_follow_the_same_rule(moves):
    problem = toy_problem(4, moves, "params=-8%", protected=[1])
    result = run(Exhaustive(), problem, Toy(tangled))
    mask = DENSE
    for step in result.steps:
        losses = {move: tangled(mask | move.blocks) for move in problem.moves(mask)}
        assert step.move == next(move for move in losses if losses[move] == min(losses.values()))
        assert list(step.scores) == list(losses)
        mask |= step.move.blocks
    assert problem.reached(mask, len(result.steps))


def test_the_first_of_equals_wins_attention_before_mlp():
    result = run(Exhaustive(), toy_problem(3, "block", "blocks=4"), Toy(lambda mask: float(len(mask))))
    assert taken(result) == ["attention.0", "attention.1", "attention.2", "mlp.0"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_a_loss_that_is_no_number_to_average_never_wins_and_is_recorded(bad):
    rule = additive({"attention.0": bad, "mlp.2": 1.0, "mlp.1": 2.0})
    result = run(Exhaustive(), toy_problem(3, "block", "blocks=2"), Toy(rule))
    assert taken(result) == ["mlp.2", "mlp.1"]
    assert result.steps[0].scores[Move.parse("attention.0")] is None
    recorded = plan_of(result, Exhaustive(), toy_problem(3, "block", "blocks=2")).model_dump(mode="json")
    assert recorded["steps"][0]["scores"]["attention.0"] is None


def test_one_bad_window_is_enough_to_fail_a_candidate():
    class OneBadWindow(Toy):
        def batch_losses(self, masks, batch):
            found = super().batch_losses(masks, batch)
            bad = Block("mlp", 0)
            return [
                (math.nan, *losses[1:]) if batch == 1 and bad in mask else losses
                for mask, losses in zip(masks, found, strict=True)
            ]

    result = run(Exhaustive(), toy_problem(2, "block", "blocks=1"), OneBadWindow(additive({"mlp.0": -9.0, "mlp.1": 1})))
    assert taken(result) == ["mlp.1"]


def test_no_finite_candidate_is_a_failed_check_that_names_them():
    toy = Toy(lambda mask: math.nan if mask else 1.0)
    with pytest.raises(CheckFailedError) as error:
        run(Exhaustive(), toy_problem(3, "block", "blocks=1"), toy)
    assert "none of the 6 candidates (attention.0, attention.1, attention.2, ...)" in error.value.what


def test_a_dense_model_without_a_finite_loss_is_not_searched():
    with pytest.raises(CheckFailedError, match="dense"):
        run(Exhaustive(), toy_problem(3, "block", "blocks=1"), Toy(lambda mask: math.nan))


def test_lowest_takes_the_first_of_equals():
    estimates = run(Exhaustive(), toy_problem(2, "block", "blocks=1"), Toy(lambda mask: 1.0)).steps[0].scores
    assert lowest(estimates) == next(iter(estimates))


# What every search must hold

TASKS = [("block", "blocks=4"), ("layer", "layers=2"), ("stock", "params=-20%")]
QUICK = {"evolution": Evolution(offspring=4, initial=6, generations=4)}
EVERY = {name: QUICK.get(name, search()) for name, search in SEARCHES.items()}


def alone(evaluations):
    """Scores moves by the loss with each on top, as a criterion would."""

    def scorer(mask, moves):
        losses = evaluations.losses([mask | move.blocks for move in moves], "ranking")
        return {move: losses[mask | move.blocks] for move in moves}

    return scorer


@pytest.mark.parametrize(("moves", "target"), TASKS)
@pytest.mark.parametrize("search", EVERY.values(), ids=EVERY)
class TestEverySearch:
    def test_reaches_the_target_without_touching_a_protected_layer(self, search, moves, target):
        if isinstance(search, Span) and moves == "stock":
            pytest.skip("protecting layer 2 of 4 leaves no span of that size")
        problem = toy_problem(5, moves, target, protected=[2])
        result = run(search, problem, Toy(tangled), scorer=alone)
        mask = frozenset().union(*(step.move.blocks for step in result.steps))
        assert result.stop_reason is Stop.TARGET
        assert problem.reached(mask, len(result.steps))
        assert all(block.layer != 2 for block in mask)

    def test_is_deterministic_and_says_what_it_is(self, search, moves, target):
        problem = toy_problem(4, moves, target)
        found = run(search, problem, Toy(tangled), scorer=alone)
        assert found == run(search, problem, Toy(tangled), scorer=alone)
        assert search.title
        assert search.source
        if not search.ranks:
            assert found.evaluations <= price(search, problem)

    def test_killed_at_any_record_it_resumes_to_the_same_plan(self, search, moves, target, tmp_path):
        problem = toy_problem(4, moves, target)
        with Journal.open(tmp_path / "whole.jsonl", IDENTITY) as journal:
            whole = run(search, problem, Toy(tangled), journal=journal, scorer=alone)
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        for kept in range(1, len(lines), max(1, len(lines) // 5)):
            (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]))
            with Journal.open(tmp_path / "cut.jsonl", IDENTITY) as journal:
                assert run(search, problem, Toy(tangled), journal=journal, scorer=alone) == whole
            assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines)

    def test_stopped_anywhere_it_leaves_the_best_so_far_as_a_usable_plan_and_resumes_to_the_same(
        self, search, moves, target, tmp_path
    ):
        problem, counted = toy_problem(4, moves, target), Interrupted(tangled, after=-1)
        whole = run(search, problem, counted, scorer=alone)
        for number, sweep in enumerate(range(Toy.batches, counted.sweeps, max(1, counted.sweeps // 4))):
            toy = Interrupted(tangled, after=sweep)
            with Journal.open(tmp_path / f"{number}.jsonl", IDENTITY) as journal:
                part = run(search, problem, toy, journal=journal, scorer=alone)
            assert part.stop_reason is Stop.INTERRUPTED
            check_usable(part, whole, search, problem, tmp_path)
            with Journal.open(tmp_path / f"{number}.jsonl", IDENTITY) as journal:
                assert run(search, problem, Toy(tangled), journal=journal, scorer=alone) == whole
        for budget in range(1, whole.evaluations, max(1, whole.evaluations // 4)):
            part = run(search, problem, Toy(tangled), budget=budget, scorer=alone)
            check_usable(part, whole, search, problem, tmp_path)


def check_usable(part, whole, search, problem, folder):
    """Its first steps if it is nested; else a whole plan that reaches the target, or none."""
    plan_of(part, search, problem).save(folder / "part.json")
    plan = Plan.read(folder / "part.json", problem.outline)
    plan.check(problem.outline, None, "the plan")
    if search.nested:
        assert part.steps == whole.steps[: len(part.steps)]
    elif part.steps:
        assert problem.reached(plan.mask(), len(plan.steps))
    if part.steps and part.steps[-1].loss is not None and part.steps[-1].loss.n == whole.dense.n:
        assert part.steps[-1].loss.value == pytest.approx(tangled(plan.mask()) + NOISE_MEAN)


# The sets that each has by the time when its last mask is evaluated; beam compares only what is all of one size.
LATE = {name: search for name, search in EVERY.items() if not search.nested and name != "beam"}
LONG = {"enumeration": ("block", "blocks=5")}  # of more than one sweep


def known(_):
    """Scores moves by what they would lead to, without an evaluation."""
    return lambda mask, moves: {move: Estimate.of([tangled(mask | move.blocks)], "nats") for move in moves}


@pytest.mark.parametrize("name", LATE)
def test_a_search_that_decides_at_its_end_leaves_its_best_set_when_it_is_stopped_shortly_before(name):
    search, counted = LATE[name], Interrupted(tangled, after=-1)
    problem = toy_problem(5, *LONG.get(name, ("layer", "layers=2")))
    whole = run(search, problem, counted, scorer=known)
    for part in (
        run(search, problem, Interrupted(tangled, after=counted.sweeps - 1), scorer=known),
        run(search, problem, Toy(tangled), budget=whole.evaluations - 1, scorer=known),
    ):
        assert part.stop_reason in (Stop.INTERRUPTED, Stop.BUDGET)
        assert problem.reached(frozenset().union(*(step.move.blocks for step in part.steps)), len(part.steps))


@pytest.mark.parametrize("search", [Enumeration(), Swap()], ids=["enumeration", "swap"])
def test_with_more_budget_the_plan_that_is_left_is_never_worse(search):
    start = tuple(map(Move.parse, ["attention.4", "mlp.4", "attention.3", "mlp.3"]))
    problem = replace(toy_problem(5, "block", "blocks=4"), start=start)
    losses = [math.inf]
    for budget in range(1, price(search, problem), 7):
        steps = run(search, problem, Toy(tangled), budget=budget).steps
        losses.append(tangled(frozenset().union(*(step.move.blocks for step in steps))) if steps else math.inf)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) > 2
    assert losses[-1] == tangled(frozenset().union(*(s.move.blocks for s in run(search, problem, Toy(tangled)).steps)))


def test_beam_leaves_the_best_of_the_masks_that_reached_the_target():
    problem = toy_problem(4, "block", "params=-18.75%")
    stopped = [run(Beam(), problem, Toy(tangled), budget=budget) for budget in range(1, price(Beam(), problem))]
    left = [frozenset().union(*(step.move.blocks for step in each.steps)) for each in stopped if each.steps]
    assert all(problem.reached(mask, 9) for mask in left)
    assert len([each for each in stopped if each.steps and each.stop_reason is Stop.BUDGET]) > 1


class Twice:
    """Finds a set, and then another one."""

    title: ClassVar[str] = "Two sets"
    source: ClassVar[str] = "these tests"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    def __init__(self, *names: str) -> None:
        self.names = names

    def propose(self, problem: Problem) -> Proposals:
        for move in map(Move.parse, self.names):
            yield (move.blocks,)
            yield Best((Chosen(move, {}),))

    def evaluations(self, problem: Problem) -> int:
        return len(self.names)


def test_a_set_whose_loss_is_not_finite_takes_no_ones_place():
    toy = Toy(additive({"mlp.0": 1.0, "mlp.1": math.nan}))
    result = run(Twice("mlp.0", "mlp.1"), toy_problem(2, "block", "blocks=1"), toy)
    assert taken(result) == ["mlp.0"]


@pytest.mark.parametrize(("moves", "target"), TASKS)
@pytest.mark.parametrize("search", [Exhaustive(), Random()], ids=["exhaustive", "random"])
class TestSearchesThatDecideStepByStep:
    def test_asks_for_as_many_masks_as_it_said_or_fewer(self, search, moves, target):
        problem = toy_problem(4, moves, target)
        result = run(search, problem, Toy(tangled))
        assert result.evaluations <= price(search, problem)
        if moves != "stock":
            assert result.evaluations == price(search, problem)

    def test_every_loss_it_reports_is_that_of_the_removals_so_far(self, search, moves, target):
        mask = DENSE
        for step in run(search, toy_problem(4, moves, target), Toy(tangled)).steps:
            mask |= step.move.blocks
            assert step.loss is not None
            assert step.loss.value == pytest.approx(tangled(mask) + NOISE_MEAN)
            assert step.scores[step.move] == step.loss

    def test_interrupted_anywhere_it_leaves_a_usable_plan_and_resumes_to_the_same(
        self, search, moves, target, tmp_path
    ):
        problem, whole = toy_problem(4, moves, target), Toy(tangled)
        reference = plan_of(run(search, problem, whole), search, problem)
        sweeps = len(reference.steps) * Toy.batches
        for sweep in range(sweeps):
            with Journal.open(tmp_path / f"{sweep}.jsonl", IDENTITY) as journal:
                partial = run(search, problem, Interrupted(tangled, after=Toy.batches + sweep), journal=journal)
            assert partial.stop_reason is Stop.INTERRUPTED
            plan_of(partial, search, problem).save(tmp_path / "partial.json")
            assert Plan.read(tmp_path / "partial.json").steps == reference.steps[: len(partial.steps)]
            assert len(partial.steps) == sweep // Toy.batches
            again = Toy(tangled)
            with Journal.open(tmp_path / f"{sweep}.jsonl", IDENTITY) as journal:
                paid = len(journal.records)
                resumed = run(search, problem, again, journal=journal)
            assert plan_of(resumed, search, problem) == reference
            assert paid + len(again.asked) == len(whole.asked)


@dataclass
class Interrupted(Toy):
    """Ctrl-C arrives in the sweep number `after`."""

    after: int = 0
    sweeps: int = 0

    def batch_losses(self, masks, batch):
        if self.sweeps == self.after:
            signal.raise_signal(signal.SIGINT)
        self.sweeps += 1
        return super().batch_losses(masks, batch)


# Random


def test_random_depends_on_its_seed_alone():
    problem = toy_problem(8, "block", "blocks=6")
    orders = [tuple(taken(run(Random(seed), problem, Toy(tangled)))) for seed in range(20)]
    assert orders[3] == tuple(taken(run(Random(3), problem, Toy(additive({})))))
    assert len(set(orders)) == 20


def test_random_takes_every_block_equally_often():
    problem = toy_problem(2, "block", "blocks=1")
    counts = dict.fromkeys(map(str, problem.outline.blocks), 0)
    for seed in range(400):
        counts[taken(run(Random(seed), problem, Toy(additive({}))))[0]] += 1
    assert all(70 < count < 130 for count in counts.values())  # 100 expected, standard deviation 8.7


def test_random_keeps_a_removal_whose_loss_is_not_finite_and_says_so():
    toy = Toy(lambda mask: math.nan if mask else 1.0)
    (step,) = run(Random(), toy_problem(2, "block", "blocks=1"), toy).steps
    assert step.loss is None
    assert step.scores == {step.move: None}


# The driver


def test_the_dense_model_is_evaluated_first():
    toy = Toy(tangled)
    result = run(Exhaustive(), toy_problem(2, "block", "blocks=1"), toy)
    assert toy.asked[: Toy.batches] == [(DENSE, 0), (DENSE, 1)]
    assert (result.dense.value, result.dense.n) == (pytest.approx(NOISE_MEAN), 5)


def test_ctrl_c_is_passed_on_where_there_is_nothing_to_keep():
    toy = Interrupted(tangled, after=Toy.batches + 1)
    with pytest.raises(KeyboardInterrupt):
        run(Exhaustive(), toy_problem(2, "block", "blocks=1"), toy, keep=False)


def test_every_mask_is_paid_for_once_and_work_is_counted_per_sweep():
    class Repeats:
        title: ClassVar[str] = "Asks for what it knows"
        source: ClassVar[str] = "this test"
        nested: ClassVar[bool] = True
        ranks: ClassVar[bool] = False
        starts: ClassVar[bool] = False

        def propose(self, problem: Problem) -> Proposals:
            first, second, *_ = problem.moves(DENSE)
            losses = yield (first.blocks, second.blocks, first.blocks, DENSE)
            assert len(losses) == 3
            again = yield (first.blocks,)
            assert again[first.blocks] == losses[first.blocks]
            yield Chosen(first, {first: losses[first.blocks]})

        def evaluations(self, problem: Problem) -> int:
            return 2

    toy = Toy(tangled)
    result = run(Repeats(), toy_problem(2, "block", "blocks=1"), toy)
    assert len(toy.asked) == len(set(toy.asked)) == 3 * Toy.batches
    assert result.evaluations == 3
    units = sum(map(len, NOISE))
    assert result.work == Work(attention_tokens=21 * units, mlp_tokens=15 * units, head_tokens=3 * Toy.batches)


def test_a_search_that_gives_up_is_said_to_have_run_out_of_moves():
    class GivesUp(Random):
        def propose(self, problem: Problem) -> Proposals:
            yield from ()

    result = run(GivesUp(), toy_problem(2, "block", "blocks=1"), Toy(tangled))
    assert (result.steps, result.stop_reason) == ((), Stop.NO_MOVES)


@pytest.mark.parametrize(
    ("budget", "steps"), [(1, 0), (8, 0), (9, 1), (15, 1), (16, 2), (EVALUATIONS - 1, 4), (EVALUATIONS, 5)]
)
def test_the_budget_is_kept_and_what_was_decided_within_it_stands(budget, steps):
    toy, problem = Toy(tangled), toy_problem(4, "block", "blocks=5")
    result = run(Exhaustive(), problem, toy, budget=budget)
    assert len(set(toy.asked)) <= budget * Toy.batches
    assert taken(result) == taken(run(Exhaustive(), problem, Toy(tangled)))[:steps]
    assert result.stop_reason is (Stop.TARGET if steps == 5 else Stop.BUDGET)


def test_a_run_stopped_by_its_budget_goes_on_from_the_journal_with_a_larger_one(tmp_path):
    problem, toy = toy_problem(4, "block", "blocks=5"), Toy(tangled)
    for budget in (10, 20, None):
        with Journal.open(tmp_path / "journal.jsonl", IDENTITY) as journal:
            result = run(Exhaustive(), problem, toy, journal=journal, budget=budget)
    assert result == run(Exhaustive(), problem, Toy(tangled))
    assert len(toy.asked) == EVALUATIONS * Toy.batches


def test_the_price_of_the_papers_search_is_the_papers_formula():
    depth, count = 32, 17
    formula = count * (2 * depth + 1) - count * (count + 1) // 2
    assert formula == 952
    assert Exhaustive().evaluations(toy_problem(depth, "block", f"blocks={count}")) == formula


def test_progress_counts_from_what_the_journal_knew_to_the_promised_total(tmp_path):
    problem, calls = toy_problem(4, "block", "blocks=5"), []
    with Journal.open(tmp_path / "journal.jsonl", IDENTITY) as journal:
        run(Exhaustive(), problem, Toy(tangled), journal=journal, budget=10)
        known = 9 * Toy.batches
    with Journal.open(tmp_path / "journal.jsonl", IDENTITY) as journal:
        run(Exhaustive(), problem, Toy(tangled), journal=journal, progress=lambda *call: calls.append(call))
    assert calls[0] == (known, EVALUATIONS * Toy.batches, "step 2, 7 masks")
    assert calls[-1] == (EVALUATIONS * Toy.batches, EVALUATIONS * Toy.batches, "step 5, 4 masks")
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})


def test_losses_that_are_not_finite_come_back_from_the_journal_as_they_were(tmp_path):
    rule = additive({"attention.0": math.nan, "attention.1": math.inf, "mlp.0": -math.inf, "mlp.1": 0.1 + 0.2})
    problem, results = toy_problem(2, "block", "blocks=1"), []
    for toy in (Toy(rule), Toy(additive({}))):  # the second is never asked
        with Journal.open(tmp_path / "journal.jsonl", IDENTITY) as journal:
            results.append(run(Exhaustive(), problem, toy, journal=journal))
    assert toy.asked == []
    assert results[0] == results[1]
