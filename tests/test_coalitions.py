"""Differences of means at one coalition size: the released protocol, what it estimates, and its standard error."""

import itertools
import logging
import math
import random
from statistics import fmean, variance
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NOISE, Toy, additive, tangled, toy_outline

from blockpruner.blocks import Move
from blockpruner.criteria import coalitions as module
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab
from blockpruner.journal import Journal
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.permutations import shuffled

Coalitions: Any = module.Coalitions  # so that a score may be read without saying that it is not None
BLOCKS = toy_outline(4).blocks
MOVES = tuple(Move.of(block) for block in BLOCKS)
SIZES = [len(noise) for noise in NOISE]


def lab_of(objective, **options):
    evaluations = objective if isinstance(objective, Evaluations) else Evaluations(objective)
    nothing: Any = None  # neither a model nor its anatomy nor data are looked at
    return Lab(nothing, nothing, nothing, evaluations, **options)


class Wild(Toy):
    """A random loss for each mask and unit, the same whenever it is asked for."""

    def __init__(self, seed):
        super().__init__(lambda mask: 0.0)
        self.seed = seed

    def batch_losses(self, masks, batch):
        self.asked += [(mask, batch) for mask in masks]
        return [tuple(self.loss(mask, batch, unit) for unit in range(SIZES[batch])) for mask in masks]

    def loss(self, mask, batch, unit):
        return len(mask) * unit + random.Random(f"{self.seed} {batch} {unit} {sorted(map(str, mask))}").gauss(0, 3)

    def mean(self, mask):
        return math.fsum(self.loss(mask, b, u) for b, size in enumerate(SIZES) for u in range(size)) / sum(SIZES)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 7), data=st.data())
@settings(max_examples=30)
def test_a_score_is_minus_the_mean_present_minus_the_mean_absent_over_all_units_of_all_draws(seed, size, data):
    absent = {(batch, draw): data.draw(st.permutations(range(8))) for batch in range(len(SIZES)) for draw in range(6)}
    toy = Wild(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "shuffled", lambda n, seed, *key: absent[key])
        scores = Coalitions(size / 8, draws=6).scores(lab_of(toy), MOVES)
    for player, score in enumerate(scores.values()):
        sides = {True: [], False: []}
        for (batch, _), order in absent.items():
            gone = frozenset(BLOCKS[other] for other in order[size:])
            sides[BLOCKS[player] not in gone] += [toy.loss(gone, batch, unit) for unit in range(SIZES[batch])]
        if not all(sides.values()):
            assert score is None
            continue
        phi = fmean(sides[True]) - fmean(sides[False])
        assert score.value == pytest.approx(-phi)
        assert score.n == 12


def test_with_micro_batches_of_one_size_the_error_is_that_of_two_means():
    class Even(Toy):
        def batch_losses(self, masks, batch):
            return [(tangled(mask) + batch, tangled(mask) - 1) for mask in masks]

    draws = [(frozenset(shuffled(8, 5, batch, draw)[4:]), batch) for batch in range(2) for draw in range(10)]
    scores = Coalitions(0.5, seed=5).scores(lab_of(Even(tangled)), MOVES)
    for player, score in enumerate(scores.values()):
        sides = {True: [], False: []}
        for gone, batch in draws:
            sides[player in gone].append(tangled(frozenset(BLOCKS[other] for other in gone)) + (batch - 1) / 2)
        assert score.stderr**2 == pytest.approx(sum(variance(side) / len(side) for side in sides.values()))


@pytest.mark.parametrize(("share", "present"), [(0.9, 7), (0.5, 4), (0.3, 2), (0.13, 1)])
def test_every_set_has_the_published_size(share, present):
    toy = Toy(tangled)
    Coalitions(share).scores(lab_of(toy), MOVES)
    assert {len(mask) for mask, _ in toy.asked} == {8 - present}


def expected(rule, present, players=BLOCKS):
    """The difference of the means over all sets of this size."""
    sets = [frozenset(players) - frozenset(stay) for stay in itertools.combinations(players, present)]
    score = {}
    for player in players:
        absent = [rule(gone) for gone in sets if player in gone]
        there = [rule(gone) for gone in sets if player not in gone]
        score[Move.of(player)] = math.fsum(absent) / len(absent) - math.fsum(there) / len(there)
    return score


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_many_draws_come_as_near_to_the_mean_over_all_sets_as_the_standard_error_says(share):
    toy, inside = Wild(1), []
    exact, lab = expected(toy.mean, int(share * 8)), lab_of(toy)
    for seed in range(100):
        scores = Coalitions(share, draws=100, seed=seed).scores(lab, MOVES)
        assert all(abs(score.value - exact[move]) < 5 * score.stderr for move, score in scores.items())
        inside += [abs(score.value - exact[move]) < 1.96 * score.stderr for move, score in scores.items()]
    assert 0.92 < sum(inside) / len(inside) <= 1


@pytest.mark.parametrize("present", [1, 4, 7])
def test_where_moves_do_not_interact_every_size_gives_the_formula_of_leaving_one_out(present):
    weights = [float(place**2) for place in range(8)]
    rule = additive(dict(zip(map(str, BLOCKS), weights, strict=True)))
    formula = [(8 * weight - sum(weights)) / 7 for weight in weights]
    assert list(expected(rule, present).values()) == pytest.approx(formula)


def test_when_each_move_is_absent_once_it_is_the_released_formula_of_leaving_one_out(monkeypatch):
    monkeypatch.setattr(module, "shuffled", lambda n, seed, batch, draw: [(draw + 1 + i) % n for i in range(n)])
    scores = Coalitions(0.9, draws=8).scores(lab_of(Toy(tangled)), MOVES)
    losses = [tangled(move.blocks) for move in MOVES]
    formula = [(8 * loss - sum(losses)) / 7 for loss in losses]
    assert [score.value for score in scores.values()] == pytest.approx(formula)


def test_scores_are_those_on_top_of_what_is_gone():
    gone, toy = frozenset(BLOCKS[:3]), Toy(tangled)
    scores = Coalitions(0.5, draws=400).scores(lab_of(toy, mask=gone), MOVES[3:])
    exact = expected(lambda mask: tangled(mask | gone), 2, BLOCKS[3:])
    assert all(gone <= mask for mask, _ in toy.asked)
    for move, score in scores.items():
        assert abs(score.value - exact[move]) < 4 * score.stderr


# Where there is no score, or no error


def test_a_move_that_was_never_absent_has_no_score_and_is_named(caplog, monkeypatch):
    monkeypatch.setattr(module, "shuffled", lambda n, *key: range(n))  # the last one is absent in every draw
    with caplog.at_level(logging.WARNING, "blockpruner"):
        scores = Coalitions().scores(lab_of(Toy(tangled)), MOVES)
    assert set(scores.values()) == {None}
    assert "attention.0, mlp.0" in caplog.text


def test_a_move_that_was_absent_once_has_a_score_and_the_reason_why_it_has_no_error(monkeypatch):
    monkeypatch.setattr(module, "shuffled", lambda n, seed, batch, draw: [(4 * batch + draw + i) % n for i in range(n)])
    scores = Coalitions(0.9, draws=4).scores(lab_of(Toy(tangled)), MOVES)
    assert {(score.stderr, score.reason) for score in scores.values()} == {(None, "absent in one draw only")}
    scores = Coalitions(0.2, draws=4).scores(lab_of(Toy(tangled)), MOVES)
    assert {(score.stderr, score.reason) for score in scores.values()} == {(None, "present in one draw only")}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_counts_against_those_that_were_absent(bad):
    culprit, plain = BLOCKS[3], additive({str(block): 1.0 for block in BLOCKS})
    toy = Toy(lambda mask: bad if culprit in mask else plain(mask))
    scores = Coalitions(0.9, draws=60).scores(lab_of(toy), MOVES)
    assert [str(move) for move, score in scores.items() if score is None] == [str(culprit)]


# Options, moves, determinism


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"draws": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="out of range"):
        Coalitions(**options)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"0\.9 of 1 moves is none"):
        Coalitions().scores(lab_of(Toy(tangled)), MOVES[:1])
    assert Coalitions().scores(lab_of(Toy(tangled)), []) == {}


def test_moves_that_share_a_block_are_refused_by_name():
    with pytest.raises(InputError, match=r"mlp\.0 and attention\.0\+mlp\.0 share mlp\.0"):
        Coalitions().scores(lab_of(Toy(tangled)), [MOVES[1], Move.of(*BLOCKS[:2])])


def test_the_same_seed_gives_the_same_scores_and_another_seed_others():
    first, again, other = [Coalitions(0.5, seed=seed).scores(lab_of(Wild(2)), MOVES) for seed in (1, 1, 2)]
    assert first == again
    assert first != other


def test_a_second_run_is_answered_by_the_journal(tmp_path):
    def run(toy):
        with Journal.open(tmp_path / "journal.jsonl", {"model": "toy"}) as journal:
            return Coalitions().scores(lab_of(Evaluations(toy, journal)), MOVES), toy.asked

    first, asked = run(Wild(3))
    assert len(asked) <= Coalitions().cost(lab_of(Wild(3)), MOVES) * len(SIZES)
    assert run(Wild(4)) == (first, [])
