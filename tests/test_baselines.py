"""The two baselines of every table: at random, and the last layers first."""

from types import SimpleNamespace
from typing import Any

import pytest
from toys import toy_outline

from blockpruner.blocks import Block, Move, Outline
from blockpruner.criteria.deepest import Deepest
from blockpruner.criteria.random import Random
from blockpruner.importance.criterion import Lab
from blockpruner.searching.moves import GRANULARITIES


def lab_of(outline, **options):
    """Without a model, data or losses: baselines need none."""
    anatomy: Any = SimpleNamespace(outline=outline)
    nothing: Any = None
    return Lab(nothing, anatomy, nothing, nothing, **options)


def values(criterion, outline, moves):
    scores = criterion.scores(lab_of(outline), moves)
    assert list(scores) == list(moves)
    assert all(score.stderr is None and score.reason for score in scores.values())
    assert criterion.cost(lab_of(outline), moves) == 0
    return {str(move): score.value for move, score in scores.items()}


def removal_order(criterion, outline, moves):
    found = values(criterion, outline, moves)
    return sorted(found, key=found.__getitem__)


@pytest.mark.parametrize("kind", ["attention", "block", "layer", "mlp", "stock"])
@pytest.mark.parametrize("depth", [1, 5])
def test_for_every_kind_of_move_the_last_ones_go_first(kind, depth):
    outline = toy_outline(depth)
    places = {block: place for place, block in enumerate(outline.blocks)}
    moves = GRANULARITIES[kind](outline, frozenset())
    last_first = sorted(moves, key=lambda move: -max(places[block] for block in move.blocks))
    if kind != "stock":  # a layer and a stock pair may end in the same block
        assert removal_order(Deepest(), outline, moves) == list(map(str, last_first))
    assert all(0 < value < 1 for value in values(Deepest(), outline, moves).values())


def test_in_a_layer_the_last_block_goes_first():
    outline = toy_outline(2)
    moves = [Move.of(block) for block in outline.blocks]
    assert removal_order(Deepest(), outline, moves) == ["mlp.1", "attention.1", "mlp.0", "attention.0"]


def test_two_stacks_shrink_at_the_same_pace_each_from_its_end():
    encoder = [Block(kind, layer, "encoder") for layer in range(2) for kind in ("attention", "mlp")]
    kinds = ("attention", "cross_attention", "mlp")
    decoder = [Block(kind, layer, "decoder") for layer in range(4) for kind in kinds]
    outline = Outline((*encoder, *decoder), {}, 0)
    layers = [Move(frozenset(blocks)) for blocks in outline.layers().values()]
    found = values(Deepest(), outline, layers)
    assert list(found.values()) == pytest.approx([3 / 4, 1 / 4, 7 / 8, 5 / 8, 3 / 8, 1 / 8])


def test_depth_is_that_in_the_whole_model_whatever_is_gone():
    outline = toy_outline(4)
    gone = frozenset(outline.blocks[-3:])
    moves = [Move.of(block) for block in outline.blocks if block not in gone]
    assert Deepest().scores(lab_of(outline, mask=gone), moves) == Deepest().scores(lab_of(outline), moves)


def test_random_scores_depend_on_the_seed_and_the_move_alone():
    moves = [Move.of(block) for block in toy_outline(50).blocks]
    found = values(Random(), toy_outline(50), moves)
    assert values(Random(), toy_outline(50), moves[::-3]).items() <= found.items()
    assert values(Random(seed=1), toy_outline(50), moves).keys() == found.keys()
    assert not values(Random(seed=1), toy_outline(50), moves).items() & found.items()


def test_random_scores_are_the_same_on_every_machine():
    assert values(Random(), toy_outline(1), [Move.parse("mlp.0")])["mlp.0"] == 0.8299033775454077


def test_random_scores_are_spread_evenly():
    moves = [Move.of(block) for block in toy_outline(1000).blocks]
    ordered = sorted(values(Random(seed=3), toy_outline(1000), moves).values())
    gap = max(abs(value - (place + 0.5) / len(ordered)) for place, value in enumerate(ordered))
    assert gap < 1.95 / len(ordered) ** 0.5  # Kolmogorov: 0.1 % of honest draws are above
