"""Paired comparisons against plain computations, written out here, and against what the methods promise."""

import itertools
import math
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.evaluation.paired import compare, holm, mcnemar, together

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def coin(gained, lost):
    """The two-sided exact p-value by counting: outcomes of the tosses that are at most as likely as what was seen."""
    tosses = gained + lost
    ways = [math.comb(tosses, heads) for heads in range(tosses + 1)]
    return sum(way for way in ways if way <= ways[gained]) / 2**tosses


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_counts_the_tosses_of_a_fair_coin(gained, lost):
    assert mcnemar(gained, lost) == pytest.approx(coin(gained, lost))


@given(answers)
def test_right_and_wrong_answers_are_compared_by_the_items_on_which_they_differ(pairs):
    reference, contestant = ([float(side) for side in column] for column in zip(*pairs, strict=True))
    found = compare(reference, contestant)
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    assert (found.test, found.n, found.gained, found.lost) == ("mcnemar", len(pairs), gained, lost)
    assert found.p == pytest.approx(coin(gained, lost))
    assert found.difference == pytest.approx(fmean(contestant) - fmean(reference))
    assert -1 <= found.low <= found.difference + 0.5 / len(pairs) + 1e-9
    assert found.low < found.high <= 1


def test_the_standard_error_is_that_of_the_differences():
    reference, contestant = [0.1, 0.5, 0.2, 0.9], [0.3, 0.4, 0.6, 0.95]
    gaps = [b - a for a, b in zip(reference, contestant, strict=True)]
    found = compare(reference, contestant)
    assert found.difference == pytest.approx(fmean(gaps))
    assert found.stderr == pytest.approx(stdev(gaps) / 2)
    assert compare([0.5], [0.7]).stderr is None


def test_sign_flips_estimate_the_share_of_all_flips_that_are_as_far_out():
    gaps = [0.3, -0.1, 0.4, 0.05, 0.8, 0.2, -0.02, 0.5]
    flips = [sum(s * g for s, g in zip(signs, gaps, strict=True)) for signs in itertools.product((1, -1), repeat=8)]
    exact = sum(abs(flip) >= abs(sum(gaps)) - 1e-12 for flip in flips) / len(flips)
    found = compare([0.0] * 8, gaps)
    assert found.test == "sign flips"
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.low < found.difference < found.high


def test_models_that_agree_on_every_item_are_not_told_apart():
    for values in ([0.0, 1.0, 1.0], [0.25, 0.5, 0.75]):
        found = compare(values, values)
        assert (found.difference, found.p, found.gained, found.lost) == (0, 1, 0, 0)
        assert found.low <= 0 <= found.high


def test_a_comparison_turned_around_is_the_same_with_other_signs():
    one, other = [0.0] * 30 + [1.0] * 10, [1.0] * 12 + [0.0] * 20 + [1.0] * 8
    there, back = compare(one, other), compare(other, one)
    assert there.p == pytest.approx(back.p)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))


@pytest.mark.parametrize("high", [1.0, 0.75])
def test_where_lower_is_better_items_are_gained_by_going_down(high):
    one, other = [0.0, high, high, high], [high, 0.0, 0.0, high]
    up, down = compare(one, other), compare(one, other, higher_is_better=False)
    assert (up.gained, up.lost, up.word) == (1, 2, "worse")
    assert (down.gained, down.lost, down.word) == (2, 1, "better")
    assert (up.difference, up.low, up.high, up.p) == (down.difference, down.low, down.high, down.p)
    assert compare(one, other, higher_is_better=None).word == "different"
    assert compare(one, one).word == "the same"


def test_the_same_seed_gives_the_same_p_value():
    gaps = [0.1 * (i % 7) - 0.25 for i in range(50)]
    assert compare([0.0] * 50, gaps) == compare([0.0] * 50, gaps)


def test_columns_of_two_lengths_are_no_pairs():
    for columns in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(ValueError, match="no pairs"):
            compare(*columns)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_as_the_step_down_procedure_does(values):
    adjusted = holm(values)
    assert list(adjusted) == list(values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
            if values[name] * (len(values) - rank) > level:
                break
            rejected.add(name)
        assert {name for name, p in adjusted.items() if p <= level} == rejected


def test_tasks_compared_together_carry_the_adjusted_value():
    sure, unsure = compare([0.0] * 20, [1.0] * 20), compare([0.0, 1.0], [1.0, 0.0])
    found = together({"sure": sure, "unsure": unsure})
    assert found["sure"].adjusted == pytest.approx(2 * sure.p)
    assert found["unsure"].adjusted == 1
