"""Races and the greedy search that is made of them: against exact means, at the promised rate of errors."""

import dataclasses
import functools
import math
import random
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import plan_of, tangled, toy_problem

from blockpruner.artifacts import Work
from blockpruner.blocks import Block
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.journal import Journal
from blockpruner.searches.beam import Beam
from blockpruner.searches.evolution import Evolution
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import Greedy
from blockpruner.searching.contract import DENSE, BatchByBatch, Pieces
from blockpruner.searching.driver import run
from blockpruner.searching.permutations import shuffled
from blockpruner.searching.racing import FEWEST, Race, difference

PIECES = 4  # per micro-batch


@functools.cache
def normal(key):
    return random.Random(key).gauss(0, 1)


class Noisy(BatchByBatch):
    """rule(mask) plus noise that each mask has of its own on every piece; like a real text, pieces differ most."""

    unit = "nats per token"

    def __init__(self, rule, batches=16, noise=0.05, seed=0):
        self.rule, self.batches, self.noise, self.seed = rule, batches, noise, seed
        self.asked = []

    def value(self, mask, piece):
        own = sum(normal(f"{self.seed} {block} {piece}") for block in mask)
        return self.rule(mask) + normal(f"{self.seed} {piece}") + self.noise * own

    def batch_losses(self, masks, batch):
        self.asked += [(mask, batch) for mask in masks]
        return [tuple(self.value(mask, PIECES * batch + k) for k in range(PIECES)) for mask in masks]

    def work(self, masks, batch):
        return Work(head_tokens=len(masks))

    def mean(self, mask):
        return statistics.fmean(self.value(mask, piece) for piece in range(PIECES * self.batches))


def noisy_problem(depth, moves, target, objective):
    return dataclasses.replace(toy_problem(depth, moves, target), sizes=(PIECES,) * objective.batches)


def raced(race, problem, objective, masks, keep=1, before=(), heard=None):
    """The outcome of a race, answered by an objective; `heard` is filled with the requests."""
    talk, answer = race.run(problem, masks, keep, before), None
    while True:
        try:
            request = talk.send(answer)
        except StopIteration as end:
            return end.value
        assert isinstance(request, Pieces)
        if heard is not None:
            heard.append(request)
        found = {
            (mask, batch): values
            for batch, mask, values in objective.losses(dict.fromkeys(request.batches, request.masks))
        }
        answer = {m: tuple(v for b in request.batches for v in found[m, b]) for m in request.masks}


def ladder(step):
    """Single blocks, each `step` worse than the one before."""
    return lambda mask: sum(step * (2 * block.layer + (block.kind == "mlp")) for block in mask)


def singles(depth):
    return [frozenset([Block(kind, layer)]) for layer in range(depth) for kind in ("attention", "mlp")]


class TestDifference:
    def test_it_is_the_plain_paired_estimate_with_the_factor_of_a_finite_population(self):
        one, other = (1.0, 4.0, 2.0, 7.0), (0.5, 3.0, 2.5, 4.0)
        apart = [a - b for a, b in zip(one, other, strict=True)]
        found = difference([(one, other)], 10)
        assert found.value == pytest.approx(statistics.fmean(apart))
        assert found.stderr == pytest.approx(statistics.stdev(apart) / 2 * math.sqrt(1 - 4 / 10))
        assert found.freedom == 3

    def test_what_was_seen_on_everything_is_known(self):
        found = difference([((1.0, 4.0), (0.5, 3.0))], 2)
        assert (found.stderr, found.margin(1e-9)) == (0.0, 0.0)

    def test_the_longer_of_two_is_cut_to_what_both_were_seen_on(self):
        pair = ((1.0, 2.0), (0.0, 0.0))
        assert difference([((1.0, 2.0, 9.0), (0.0, 0.0))], 9) == difference([pair], 9)

    def test_an_earlier_difference_of_the_same_shape_tells_all(self):
        """Where the difference is a line of the earlier one (nearly), few pieces of now say as much as all of then."""
        then = tuple(float(np.sin(k)) for k in range(40))
        now = tuple(2 * x + 0.25 + 1e-9 * math.cos(7 * k) for k, x in enumerate(then[:8]))
        found = difference([(now, (0.0,) * 8), (then, (0.0,) * 40)], 40)
        assert found.value == pytest.approx(2 * statistics.fmean(then) + 0.25)
        assert found.stderr < 1e-7

    def test_its_intervals_cover_the_truth_as_often_as_they_say(self):
        """Two-phase estimates of planted finite populations, at 10 % on either side."""
        rng, cases, outside = np.random.default_rng(0), 1500, 0
        for _ in range(cases):
            then = rng.normal(size=96)
            now = 0.8 * then + 0.6 * rng.normal(size=96) + 0.3
            zeros = (0.0,) * 96
            found = difference([(tuple(now[:12]), zeros[:12]), (tuple(then[:48]), zeros[:48])], 96, alpha=0.1)
            outside += abs(found.value - now.mean()) > found.margin(0.1)
        assert outside / cases == pytest.approx(0.2, abs=0.03)

    def test_an_earlier_step_makes_the_error_smaller_by_what_it_explains(self):
        rng = np.random.default_rng(1)
        then = rng.normal(size=64)
        now = 0.9 * then + 0.1 * rng.normal(size=64)
        zeros = (0.0,) * 64
        alone = difference([(tuple(now[:16]), zeros[:16])], 64)
        helped = difference([(tuple(now[:16]), zeros[:16]), (tuple(then), zeros)], 64)
        assert helped.stderr < alone.stderr / 4


class TestRace:
    def test_what_is_far_behind_is_seen_on_few_pieces_alone(self):
        objective = Noisy(ladder(1.0), batches=32)
        problem = noisy_problem(4, "block", "blocks=1", objective)
        outcome = raced(Race(), problem, objective, singles(4))
        assert outcome.kept == (frozenset([Block("attention", 0)]),)
        assert {len(values) for values in outcome.values.values()} == {FEWEST}
        assert outcome.ties == ()

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_equals_are_seen_on_everything_and_then_known(self, keep):
        objective = Noisy(lambda mask: 0.0, batches=8)
        problem = noisy_problem(3, "block", "blocks=1", objective)
        outcome = raced(Race(epsilon=0.0, delta=1e-9), problem, objective, singles(3), keep)
        best = sorted(singles(3), key=objective.mean)[:keep]
        assert list(outcome.kept) == best
        for mask in best:
            assert outcome.estimates[mask].value == pytest.approx(objective.mean(mask))

    def test_within_epsilon_it_does_not_matter_and_is_written_down(self):
        objective = Noisy(ladder(0.01), batches=32, noise=0.001)
        problem = noisy_problem(2, "block", "blocks=1", objective)
        outcome = raced(Race(epsilon=0.5), problem, objective, singles(2))
        assert {len(values) for values in outcome.values.values()} == {FEWEST}
        near = Noisy(lambda mask: 0.0, batches=32, noise=0.01)
        outcome = raced(Race(epsilon=0.5), problem, near, singles(2))
        assert len(outcome.ties) == 3

    def test_a_mask_without_a_finite_loss_is_out_at_once(self):
        broken = singles(2)[0]
        objective = Noisy(lambda mask: math.nan if mask == broken else 1.0)
        problem = noisy_problem(2, "block", "blocks=1", objective)
        outcome = raced(Race(), problem, objective, singles(2))
        assert broken not in outcome.kept
        assert outcome.estimates[broken] is None

    def test_pieces_that_do_not_differ_prove_nothing(self):
        """Whether an item is right or wrong: the first look shows no difference, and all of them together do."""
        best, other = singles(1)

        class Items(Noisy):
            def value(self, mask, piece):
                return float(mask == other and piece >= PIECES * self.batches - 6)

        objective = Items(lambda mask: 0.0, batches=32)
        problem = noisy_problem(1, "block", "blocks=1", objective)
        for masks in ([best, other], [other, best]):
            assert raced(Race(), problem, objective, masks).kept == (best,)

    def test_a_loss_that_was_not_finite_a_step_before_tells_nothing_now(self):
        objective = Noisy(ladder(0.05), batches=16)
        problem = noisy_problem(2, "block", "blocks=1", objective)
        broken = dict.fromkeys(singles(2), (math.nan, -math.inf, math.inf, 1.0) * 16)
        found, plain = (raced(Race(), problem, objective, singles(2), before=[b] if b else ()) for b in (broken, None))
        assert found == plain

    def test_of_several_to_keep_a_noisy_one_does_not_hide_behind_the_last(self):
        """The middle one is surely worse than the best, and better than the noisy one, which is lucky at first."""
        best, middle, noisy, *_ = singles(2)
        wrong = 0
        for seed in range(60):

            class Lucky(Noisy):
                def value(self, mask, piece):
                    if mask == noisy:
                        return 0.3 + 0.5 * normal(f"{self.seed} {piece}")
                    return 0.0 if mask == best else 0.1 + 0.01 * normal(f"x {self.seed} {piece}")

            objective = Lucky(lambda mask: 0.0, batches=32, seed=seed)
            problem = noisy_problem(2, "block", "blocks=1", objective)
            wrong += noisy in raced(Race(seed=seed), problem, objective, [best, middle, noisy], keep=2).kept
        assert wrong <= 6

    def test_what_it_estimates_does_not_depend_on_which_pieces_it_looked_at(self):
        """Pieces differ by 1, blocks by 0.05 on each: means over a quarter of the pieces would be off by some 0.2."""
        off, told = [], []
        for seed in range(40):
            objective = Noisy(ladder(0.3), batches=16, seed=seed)
            problem = noisy_problem(2, "block", "blocks=1", objective)
            outcome = raced(Race(seed=seed), problem, objective, singles(2))
            assert len(outcome.values[outcome.kept[0]]) == FEWEST
            for mask, found in outcome.estimates.items():
                off.append(found.value - objective.mean(mask))
                told.append(found.stderr)
        assert math.sqrt(statistics.fmean(x * x for x in off)) < 0.03
        assert min(told) > 0.08, "of a text of so many pieces, the error is that of the whole model at the least"

    @pytest.mark.parametrize("seed", range(5))
    def test_more_growth_makes_fewer_looks_at_more_pieces_and_the_same_winner(self, seed):
        problem = noisy_problem(6, "block", "blocks=1", Noisy(tangled, batches=64))
        found = {}
        for growth in (1.25, 4.0):
            objective, requests = Noisy(tangled, batches=64), []
            outcome = raced(Race(epsilon=0.0, seed=seed, growth=growth), problem, objective, singles(6), heard=requests)
            found[growth] = (len(requests), len(objective.asked), outcome.kept)
        assert found[4.0][0] < found[1.25][0]
        assert found[4.0][1] >= found[1.25][1]
        assert found[4.0][2] == found[1.25][2]

    def test_if_none_is_finite_none_is_kept(self):
        objective = Noisy(lambda mask: math.inf)
        problem = noisy_problem(2, "block", "blocks=1", objective)
        outcome = raced(Race(), problem, objective, singles(2))
        assert outcome.kept == ()
        assert set(outcome.estimates.values()) == {None}

    def test_it_errs_no_more_often_than_it_says(self):
        """Candidates a little more than epsilon apart, in noise that drowns them."""
        delta, wrong, cases, cost = 0.2, 0, 300, 0
        for seed in range(cases):
            objective = Noisy(ladder(0.012), batches=16, noise=0.03, seed=seed)
            problem = noisy_problem(3, "block", "blocks=1", objective)
            outcome = raced(Race(epsilon=0.01, delta=delta, seed=seed), problem, objective, singles(3))
            best = min(map(objective.mean, singles(3)))
            wrong += objective.mean(outcome.kept[0]) > best + 0.01
            cost += len(objective.asked)
        assert wrong / cases <= delta
        assert cost < 0.8 * cases * 6 * 16, "and it is cheaper than to look at everything"

    def test_earlier_steps_make_it_cheaper_and_change_nothing_else(self):
        now, then = Noisy(ladder(0.02), batches=32, noise=0.05), Noisy(ladder(0.02), batches=32, noise=0.05)
        problem = noisy_problem(3, "block", "blocks=1", now)
        earlier = {mask: tuple(then.value(mask, k) * 0.9 for k in range(PIECES * 32)) for mask in singles(3)}
        order = raced(Race(epsilon=0.0), problem, then, singles(3)).values
        assert order
        # The pieces come in the order of the race, so the earlier values do too.
        asked = [batch for mask, batch in then.asked if mask == singles(3)[0]]
        shuffle = [*asked, *(batch for batch in range(32) if batch not in asked)]
        earlier = {
            mask: tuple(values[PIECES * b + k] for b in shuffle for k in range(PIECES))
            for mask, values in earlier.items()
        }
        plain = raced(Race(), problem, now, singles(3))
        cost, now.asked = len(now.asked), []
        helped = raced(Race(), problem, now, singles(3), before=[earlier])
        assert helped.kept == plain.kept
        assert len(now.asked) < cost


class TestGreedy:
    @given(depth=st.integers(1, 3), moves=st.sampled_from(["block", "layer", "stock"]), share=st.integers(1, 40))
    @settings(max_examples=25, deadline=None)
    def test_without_noise_it_is_the_exhaustive_search(self, depth, moves, share):
        objective = Noisy(tangled, batches=6, noise=0.0)
        problem = noisy_problem(depth, moves, f"params=-{share}%", objective)
        fast, slow = run(Greedy(), problem, objective), run(Exhaustive(), problem, objective)
        assert [step.move for step in fast.steps] == [step.move for step in slow.steps]
        assert fast.stop_reason == slow.stop_reason
        assert fast.steps[-1].loss == slow.steps[-1].loss, "the last mask is evaluated on everything"

    def test_its_moves_are_the_exhaustive_ones_for_less(self):
        objective = Noisy(tangled, batches=32)
        problem = noisy_problem(6, "block", "blocks=5", objective)
        fast, slow = run(Greedy(), problem, objective), run(Exhaustive(), problem, objective)
        assert [step.move for step in fast.steps] == [step.move for step in slow.steps]
        assert fast.work.head_tokens < slow.work.head_tokens / 5
        assert fast.evaluations == slow.evaluations

    def test_killed_and_resumed_it_ends_in_the_same_plan(self, tmp_path):
        problem = noisy_problem(3, "block", "blocks=3", Noisy(tangled))
        with Journal.open(tmp_path / "whole.jsonl", {"model": "toy"}) as journal:
            whole = plan_of(run(Greedy(), problem, Noisy(tangled), journal=journal), Greedy(), problem)
        lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        for kept in range(1, len(lines), 7):
            path = tmp_path / f"{kept}.jsonl"
            path.write_text("".join(lines[:kept]))
            with Journal.open(path, {"model": "toy"}) as journal:
                assert plan_of(run(Greedy(), problem, Noisy(tangled), journal=journal), Greedy(), problem) == whole
            assert path.read_text() == "".join(lines)

    def test_the_plan_says_on_how_much_each_move_was_seen_and_what_tied(self):
        objective = Noisy(lambda mask: 0.0, batches=32, noise=0.002)
        problem = noisy_problem(2, "block", "blocks=2", objective)
        plan: Any = plan_of(run(Greedy(epsilon=0.1), problem, objective), Greedy(epsilon=0.1), problem)
        first, last = plan.steps
        assert {score.n for score in first.scores.values()} == {FEWEST}
        assert len(first.ties) == 3
        assert first.loss.n == FEWEST
        assert last.loss.n == PIECES * 32, "the last mask is evaluated on everything"
        assert plan.method.search == "greedy:epsilon=0.1,delta=0.05,seed=0,growth=1.25"

    def test_it_stops_when_no_loss_is_finite(self):
        objective = Noisy(lambda mask: math.nan if mask != DENSE else 0.0)
        with pytest.raises(CheckFailedError, match="has a finite loss"):
            run(Greedy(), noisy_problem(2, "block", "blocks=1", objective), objective)

    def test_a_winner_that_breaks_on_later_data_is_no_plan(self):
        def rule(mask):
            return 0.0 if not mask or Block("attention", 0) in mask else 5.0

        class Late(Noisy):
            poison = PIECES * shuffled(16, 0, "race")[-1]

            def value(self, mask, piece):
                return math.nan if mask and piece == self.poison else super().value(mask, piece)

        objective = Late(rule, batches=16)
        with pytest.raises(CheckFailedError, match="has a finite loss"):
            run(Greedy(), noisy_problem(2, "block", "blocks=1", objective), objective)

    @pytest.mark.parametrize("search", [Beam(width=3), Evolution(offspring=6, initial=8, generations=5)])
    def test_other_searches_race_to_a_plan_as_good_for_less(self, search):
        objective = Noisy(tangled, batches=32)
        problem = noisy_problem(5, "block", "blocks=4", objective)
        fast: Any = run(dataclasses.replace(search, race=True), problem, objective)
        slow: Any = run(search, problem, objective)
        assert fast.steps[-1].loss.n == PIECES * 32, "the winner is evaluated on everything"
        assert fast.steps[-1].loss.value <= slow.steps[-1].loss.value + 0.01
        if isinstance(search, Beam):
            assert fast.work.head_tokens < slow.work.head_tokens / 3

    @pytest.mark.parametrize("options", [{"epsilon": -0.1}, {"delta": 0.0}, {"delta": 1.0}, {"epsilon": math.nan}])
    def test_options_out_of_range_are_refused(self, options):
        with pytest.raises(InputError, match="out of range"):
            Greedy(**options)
