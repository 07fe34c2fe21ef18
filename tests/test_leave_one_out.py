"""Leave-one-out: the loss increase, its ranking in both papers' forms, paired errors."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import Toy, additive, tangled, toy_outline

from blockpruner.blocks import Move
from blockpruner.criteria.leave_one_out import LeaveOneOut
from blockpruner.importance.criterion import Lab
from blockpruner.journal import Journal
from blockpruner.searching.evaluations import Evaluations

BLOCKS = toy_outline(4).blocks
MOVES = tuple(Move.of(block) for block in BLOCKS)
WEIGHTS = st.lists(st.integers(-1000, 1000), min_size=8, max_size=8)


def lab_of(evaluations, **options):
    nothing: Any = None  # neither a model nor its anatomy nor data are looked at
    return Lab(nothing, nothing, nothing, evaluations, **options)


def scores_of(objective, moves=MOVES, **options) -> Any:
    return LeaveOneOut().scores(lab_of(Evaluations(objective), **options), moves)


def ranking(values):
    """Places in ascending order, ties in the order given, as both papers sort."""
    return sorted(range(len(values)), key=lambda place: values[place])


@given(WEIGHTS)
def test_a_score_is_by_how_much_the_loss_rises(weights):
    rule = additive({str(block): weight / 8 for block, weight in zip(BLOCKS, weights, strict=True)})
    scores = scores_of(Toy(rule))
    assert [score.value for score in scores.values()] == [weight / 8 for weight in weights]


@given(WEIGHTS)
def test_it_ranks_as_the_perplexity_without_the_layer(weights):
    rule = additive({str(block): 3 + weight / 1024 for block, weight in zip(BLOCKS, weights, strict=True)})
    toy = Toy(rule)
    perplexities = [math.exp(3 + weight / 1024) for weight in weights]
    assert ranking([score.value for score in scores_of(toy).values()]) == ranking(perplexities)


def released_influences(losses):
    """The deeper look's estimator when every sequence is run once without each unit: minus (present - absent)."""
    influences = []
    for unit in range(len(losses)):
        absent = [losses[unit]]
        present = [loss for other, loss in enumerate(losses) if other != unit]
        influences.append(math.fsum(absent) / len(absent) - math.fsum(present) / len(present))
    return influences


@given(WEIGHTS)
def test_it_ranks_as_the_released_loss_shapley_which_rises_strictly_with_the_loss(weights):
    n, total = len(weights), sum(weights)
    influences = released_influences(weights)
    assert influences == pytest.approx([(n * weight - total) / (n - 1) for weight in weights])
    rule = additive({str(block): float(weight) for block, weight in zip(BLOCKS, weights, strict=True)})
    exact = [n * weight - total for weight in weights]
    assert ranking([score.value for score in scores_of(Toy(rule)).values()]) == ranking(exact)


def test_scores_are_those_on_top_of_what_is_gone():
    gone = frozenset(BLOCKS[:3])
    scores = scores_of(Toy(tangled), MOVES[3:], mask=gone)
    assert list(scores) == list(MOVES[3:])
    for move, score in scores.items():
        assert score.value == tangled(gone | move.blocks) - tangled(gone)


def test_the_error_is_that_of_paired_differences_so_that_what_all_models_find_hard_is_not_in_it():
    scores = scores_of(Toy(tangled))
    assert all((score.stderr, score.n, score.unit) == (0.0, 5, "nats per token") for score in scores.values())

    class Uneven(Toy):
        """Without a block, unit number u of a micro-batch loses u more."""

        def batch_losses(self, masks, batch):
            found = zip(masks, super().batch_losses(masks, batch), strict=True)
            return [tuple(loss + len(mask) * unit for unit, loss in enumerate(losses)) for mask, losses in found]

    rises = [0.0, 1.0, 0.0, 1.0, 2.0]  # over micro-batches of two and three units
    spread = math.sqrt(sum((rise - 0.8) ** 2 for rise in rises) / 4 / 5)
    for score in scores_of(Uneven(lambda mask: 0.0)).values():
        assert score.value == pytest.approx(0.8)
        assert score.stderr == pytest.approx(spread)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_move_without_which_the_loss_is_not_finite_has_no_score(bad):
    scores = scores_of(Toy(additive({"attention.1": bad})))
    assert [str(move) for move, score in scores.items() if score is None] == ["attention.1"]


def test_moves_that_overlap_are_scored_each_by_itself():
    moves = [Move.parse("mlp.0+attention.1"), Move.parse("attention.1+mlp.1"), Move.parse("attention.1")]
    assert [score.value for score in scores_of(Toy(tangled), moves).values()] == [
        tangled(move.blocks) - tangled(frozenset()) for move in moves
    ]


def test_each_mask_is_evaluated_once_and_the_cost_is_their_number():
    toy = Toy(tangled)
    lab = lab_of(Evaluations(toy))
    LeaveOneOut().scores(lab, MOVES)
    assert len(toy.asked) == len(set(toy.asked)) == LeaveOneOut().cost(lab, MOVES) * toy.batches


def test_a_second_run_is_answered_by_the_journal(tmp_path):
    def run(rule):
        with Journal.open(tmp_path / "journal.jsonl", {"model": "toy"}) as journal:
            toy = Toy(rule)
            return LeaveOneOut().scores(lab_of(Evaluations(toy, journal)), MOVES), toy.asked

    first, _ = run(tangled)
    assert run(additive({})) == (first, [])
