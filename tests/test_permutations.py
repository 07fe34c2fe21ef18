"""Orders from a key, walks along them, and rank correlation."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.importance.ranking import spearman
from blockpruner.searching.permutations import Walk, shuffled

FINITE = st.floats(-1e6, 1e6)


@given(count=st.integers(0, 20), seed=st.integers(), draw=st.integers())
def test_an_order_has_each_number_once_and_depends_on_its_key_alone(count, seed, draw):
    order = shuffled(count, seed, draw)
    assert sorted(order) == list(range(count))
    assert order == shuffled(count, seed, draw)


def test_an_order_is_the_same_on_every_machine():
    assert shuffled(8, 0, 0) == (7, 3, 6, 2, 4, 0, 1, 5)


def test_all_orders_are_equally_likely():
    draws = 6000
    counts = Counter(shuffled(3, 7, draw) for draw in range(draws))
    assert set(counts) == set(itertools.permutations(range(3)))
    chi_squared = sum((count - draws / 6) ** 2 / (draws / 6) for count in counts.values())
    assert chi_squared < 20.5  # 5 degrees of freedom: 0.1 % of honest shuffles are above


def walked(order, losses, near=0.0, steps=1):
    """A walk to its end, on the losses at places 0 to m; with the places that it asked for."""
    walk, asked = Walk(order, [losses[0]], losses[-1], near), []
    while wanted := walk.ahead(steps):
        asked += map(len, wanted)
        walk.extend([losses[len(gone)] for gone in wanted])
    return walk.marginals(), asked


@given(losses=st.lists(FINITE, min_size=2, max_size=9), near=st.floats(0, 1e6), data=st.data())
def test_the_rises_on_a_walk_add_up_to_the_whole_rise_however_early_it_ends(losses, near, data):
    order = data.draw(st.permutations(range(len(losses) - 1)))
    rises, _ = walked(tuple(order), losses, near)
    assert list(rises) == order
    assert math.fsum(rises.values()) == pytest.approx(losses[-1] - losses[0], abs=1e-6)


@given(losses=st.lists(FINITE, min_size=2, max_size=9), near=st.floats(0, 1e6), steps=st.integers(1, 9))
def test_how_many_places_are_asked_for_at_once_changes_nothing(losses, near, steps):
    order = tuple(range(len(losses) - 1))
    assert walked(order, losses, near, steps)[0] == walked(order, losses, near)[0]


def test_a_whole_walk_gives_each_player_the_rise_at_its_place():
    rises, asked = walked((2, 0, 1), [1.0, 4.0, 3.0, 3.0])
    assert rises == {2: 3.0, 0: -1.0, 1: 0.0}
    assert asked == [1, 2]


def test_a_walk_that_ends_early_spreads_the_rest_evenly():
    rises, asked = walked((0, 1, 2, 3), [0.0, 5.0, 9.5, 2.0, 10.0], near=1.0)
    assert rises == {0: 5.0, 1: 4.5, 2: 0.25, 3: 0.25}
    assert asked == [1, 2]


def test_a_loss_that_equals_the_last_one_does_not_end_a_whole_walk():
    rises, asked = walked((0, 1, 2), [0.0, 4.0, 1.0, 4.0])
    assert rises == {0: 4.0, 1: -3.0, 2: 3.0}
    assert asked == [1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_after_a_loss_that_is_not_finite_nothing_is_said_until_it_is_finite_again(bad):
    rises, _ = walked((0, 1, 2, 3), [0.0, 1.0, bad, 2.0, 5.0])
    assert (rises[0], rises[1], rises[3]) == (1.0, math.inf, 3.0)
    assert math.isnan(rises[2])


def plain_ranks(values):
    """1 + how many are smaller + half of how many others are equal."""
    return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_spearman_is_the_correlation_of_ranks(pairs):
    first, second = map(plain_ranks, zip(*pairs, strict=True))
    mean = (len(pairs) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    expected = covariance / spread if spread else float(first == second)
    assert spearman(*zip(*pairs, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_spearman_ranks_infinities_above_all_numbers():
    assert spearman([1.0, 2.0, math.inf], [5.0, 6.0, 7.0]) == 1.0
    assert spearman([math.inf, 2.0, 1.0], [5.0, 6.0, 7.0]) == -1.0
