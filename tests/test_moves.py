"""Moves, targets and protected layers mean what they say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_outline

from blockpruner.blocks import Block, Outline, parse_mask
from blockpruner.errors import InputError
from blockpruner.searching.contract import Problem
from blockpruner.searching.moves import GRANULARITIES, Target, format_protected, parse_protected, stock

DENSE = frozenset()


def encoder_decoder(serial=("encoder",)):
    """Two encoder layers of two blocks, two decoder layers of three."""
    kinds = {"encoder": ("attention", "mlp"), "decoder": ("attention", "cross_attention", "mlp")}
    blocks = tuple(Block(kind, layer, stack) for stack in kinds for layer in range(2) for kind in kinds[stack])
    return Outline(blocks, dict.fromkeys(blocks, 10), 200, frozenset(serial))


def names(moves):
    return [str(move) for move in moves]


def offered(moves, mask="dense", outline=None):
    return names(GRANULARITIES[moves](outline or toy_outline(3), parse_mask(mask)))


def test_single_blocks_come_in_the_tie_order_of_blockpruner():
    assert offered("block") == ["attention.0", "attention.1", "attention.2", "mlp.0", "mlp.1", "mlp.2"]


def test_what_is_gone_is_not_offered_again():
    assert offered("block", "attention.1+mlp.0") == ["attention.0", "attention.2", "mlp.1", "mlp.2"]


def test_attention_and_mlp_moves_keep_to_their_kind():
    assert offered("attention", "attention.1") == ["attention.0", "attention.2"]
    assert offered("mlp", "attention.1") == ["mlp.0", "mlp.1", "mlp.2"]
    assert offered("attention", outline=encoder_decoder()) == [
        "decoder.attention.0",
        "decoder.attention.1",
        "encoder.attention.0",
        "encoder.attention.1",
    ]


def test_block_moves_reach_every_kind_there_is():
    outline = encoder_decoder()
    assert set(names(GRANULARITIES["block"](outline, DENSE))) == set(map(str, outline.blocks))


def test_layer_moves_are_layers_that_are_still_whole():
    assert offered("layer") == ["attention.0+mlp.0", "attention.1+mlp.1", "attention.2+mlp.2"]
    assert offered("layer", "mlp.1") == ["attention.0+mlp.0", "attention.2+mlp.2"]


def test_layer_moves_take_all_blocks_of_a_layer_with_three():
    assert offered("layer", outline=encoder_decoder())[-1] == (
        "decoder.attention.1+decoder.cross_attention.1+decoder.mlp.1"
    )


def test_stock_moves_are_whole_layers_and_then_halves_of_two_neighbours():
    assert offered("stock") == [*offered("layer"), "attention.1+mlp.0", "attention.2+mlp.1"]


def test_stock_moves_close_the_gap_that_an_earlier_move_left():
    assert offered("stock", "attention.1+mlp.0") == ["attention.2+mlp.2", "attention.0+mlp.1", "attention.2+mlp.1"]


def test_stacks_that_are_not_serial_lose_whole_layers_only():
    assert names(stock(toy_outline(3, serial=False), DENSE)) == offered("layer")
    straddling = names(stock(encoder_decoder(), DENSE))[4:]
    assert straddling == ["encoder.attention.1+encoder.mlp.0"]


@given(st.integers(1, 9), st.lists(st.integers(0, 10**6)))
def test_after_any_stock_moves_the_kept_blocks_still_pair_up_into_ordinary_layers(depth, choices):
    outline, mask = toy_outline(depth), DENSE
    for taken, choice in enumerate(choices, start=1):
        moves = stock(outline, mask)
        if not moves:
            assert len(mask) == 2 * depth
            break
        mask |= moves[choice % len(moves)].blocks
        kept = [block for block in outline.blocks if block not in mask]
        assert [block.kind for block in kept] == ["attention", "mlp"] * (depth - taken)


@pytest.mark.parametrize("moves", GRANULARITIES)
@given(depth=st.integers(1, 6), data=st.data())
def test_moves_are_distinct_and_remove_only_what_is_there(moves, depth, data):
    outline = toy_outline(depth)
    mask = data.draw(st.frozensets(st.sampled_from(outline.blocks)))
    found = GRANULARITIES[moves](outline, mask)
    assert len(set(found)) == len(found)
    assert all(move.blocks <= set(outline.blocks) - mask for move in found)


@pytest.mark.parametrize("moves", GRANULARITIES)
@given(depth=st.integers(1, 6), protected=st.frozensets(st.integers(0, 5)), choices=st.lists(st.integers(0, 10**6)))
def test_whatever_is_taken_first_everything_on_offer_at_the_start_can_be_taken(moves, depth, protected, choices):
    outline = toy_outline(depth)
    layers = frozenset(("", layer) for layer in protected)
    if all(("", layer) in layers for layer in range(depth)):
        return
    problem, mask = Problem(outline, moves, Target.parse("params=-1%"), layers), DENSE
    everything = frozenset().union(*(move.blocks for move in problem.moves(DENSE)))
    for choice in itertools.chain(choices, itertools.repeat(0)):
        found = problem.moves(mask)
        if not found:
            break
        mask |= found[choice % len(found)].blocks
    assert mask == everything


@pytest.mark.parametrize("text", ["blocks=6", "layers=3", "params=-25%", "params=-33.3%", "params=-0.001%"])
def test_a_target_is_written_as_it_is_read(text):
    assert str(Target.parse(f" {text} ")) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blocks",
        "blocks=0",
        "blocks=-1",
        "blocks=1.5",
        "blocks=٣",
        "blocks=1 layers=1",
        "BLOCKS=1",
        "layers=",
        "params=25%",
        "params=-25",
        "params=-0%",
        "params=-101%",
        "params=-nan%",
        "speed=2x",
    ],
)
def test_what_is_not_a_target_is_refused_with_the_three_forms(text):
    with pytest.raises(InputError) as error:
        Target.parse(text)
    assert "blocks=6, layers=3 or params=-25%" in error.value.fix


def test_a_target_counts_blocks_moves_or_parameters():
    outline, mask = toy_outline(2), parse_mask("attention.0+mlp.0")  # 400 of 1,600 parameters
    assert Target.parse("blocks=2").reached(outline, mask, 1)
    assert not Target.parse("blocks=3").reached(outline, mask, 1)
    assert Target.parse("layers=1").reached(outline, mask, 1)
    assert not Target.parse("layers=2").reached(outline, mask, 1)
    assert Target.parse("params=-25%").reached(outline, mask, 1)
    assert not Target.parse("params=-25.001%").reached(outline, mask, 1)


def test_a_third_of_the_parameters_is_reached_exactly_and_not_a_hair_before():
    blocks = (Block("mlp", 0), Block("mlp", 1))
    outline = Outline(blocks, dict.fromkeys(blocks, 333), 1000)
    assert Target.parse("params=-33.3%").reached(outline, frozenset(blocks[:1]), 1)
    assert not Target.parse("params=-33.301%").reached(outline, frozenset(blocks[:1]), 1)


@pytest.mark.parametrize(
    ("moves", "target", "protected", "most"),
    [
        ("block", "blocks=7", "", "blocks=6"),
        ("attention", "blocks=4", "", "blocks=3"),
        ("block", "blocks=5", "0", "blocks=4"),
        ("layer", "layers=3", "-1", "layers=2"),
        ("stock", "layers=4", "", "layers=3"),
        ("mlp", "params=-37.6%", "", "params=-37.5%"),
        ("stock", "params=-34%", "1", "params=-33.3%"),
    ],
)
def test_a_target_beyond_what_there_is_is_refused_before_anything_runs(moves, target, protected, most):
    outline = toy_outline(3)
    with pytest.raises(InputError) as error:
        Problem(outline, moves, Target.parse(target), parse_protected(protected, outline))
    assert most in error.value.what
    Problem(outline, moves, Target.parse(most), parse_protected(protected, outline))


def test_layers_cannot_be_counted_in_single_blocks():
    with pytest.raises(InputError, match="layers=2 counts moves of whole layers"):
        Problem(toy_outline(3), "block", Target.parse("layers=2"))


def test_a_number_of_blocks_that_the_moves_cannot_make_up_is_refused():
    with pytest.raises(InputError) as error:
        Problem(toy_outline(3), "layer", Target.parse("blocks=3"))
    assert "remove 2 blocks each" in error.value.what
    Problem(toy_outline(3), "layer", Target.parse("blocks=4"))
    with pytest.raises(InputError, match="remove 2 or 3 blocks each"):
        Problem(encoder_decoder(), "layer", Target.parse("blocks=6"))


def test_protecting_everything_leaves_no_search():
    with pytest.raises(InputError, match="every one touches a protected layer"):
        Problem(toy_outline(2), "block", Target.parse("blocks=1"), frozenset([("", 0), ("", 1)]))


def test_a_misspelt_kind_of_move_gets_a_suggestion():
    with pytest.raises(InputError) as error:
        Problem(toy_outline(2), "stok", Target.parse("blocks=1"))
    assert "did you mean 'stock'" in error.value.fix
    assert "attention" in error.value.fix


@pytest.mark.parametrize("moves", ["block", "layer", "stock"])
def test_no_move_touches_a_protected_layer(moves):
    problem = Problem(toy_outline(4), moves, Target.parse("params=-1%"), frozenset([("", 1)]))
    assert problem.moves(DENSE)
    assert all(block.layer != 1 for move in problem.moves(DENSE) for block in move.blocks)


def test_protected_layers_count_from_both_ends():
    assert parse_protected("0, 1,-1", toy_outline(5)) == {("", 0), ("", 1), ("", 4)}
    assert parse_protected("", toy_outline(5)) == frozenset()


def test_layers_of_named_stacks_are_protected_by_their_name():
    protected = parse_protected("encoder.0,decoder.-1", encoder_decoder())
    assert protected == {("encoder", 0), ("decoder", 1)}
    assert format_protected(protected) == ("decoder.1", "encoder.0")


@pytest.mark.parametrize("text", ["5", "-6", "x", "1-3", "encoder.0", "0;1", "1.5", "--1"])
def test_a_layer_that_is_not_there_cannot_be_protected(text):
    with pytest.raises(InputError, match="is not a layer of this model") as error:
        parse_protected(text, toy_outline(5))
    assert "0 to 4" in error.value.fix


def test_a_bare_number_is_refused_where_stacks_have_names():
    with pytest.raises(InputError) as error:
        parse_protected("0", encoder_decoder())
    assert "encoder.0 to encoder.1" in error.value.fix


@given(st.frozensets(st.integers(0, 4)))
def test_protected_layers_are_written_as_they_are_read(layers):
    protected = frozenset(("", layer) for layer in layers)
    assert parse_protected(",".join(format_protected(protected)), toy_outline(5)) == protected


def steps_taken(problem, choose):
    mask, steps = DENSE, 0
    while not problem.reached(mask, steps):
        mask, steps = mask | choose(problem.moves(mask)).blocks, steps + 1
    return steps


@pytest.mark.parametrize("moves", ["block", "attention", "layer", "stock"])
@given(sizes=st.lists(st.integers(1, 50), min_size=8, max_size=8), percent=st.integers(1, 25), choices=st.randoms())
def test_no_road_to_a_parameter_target_is_longer_than_foreseen(moves, sizes, percent, choices):
    plain = toy_outline(4)
    sized = dict(zip(plain.blocks, sizes, strict=True))
    outline = Outline(plain.blocks, sized, sum(sizes), plain.serial)
    removable = 100 * sum(size for block, size in sized.items() if moves != "attention" or block.kind == moves)
    if removable < percent * sum(sizes):
        return
    problem = Problem(outline, moves, Target.parse(f"params=-{percent}%"))
    size = outline.removed_parameters
    assert steps_taken(problem, choices.choice) <= problem.most_steps()
    assert steps_taken(problem, lambda found: min(found, key=lambda move: size(move.blocks))) <= problem.most_steps()


def test_the_road_to_a_number_of_blocks_or_layers_is_known_exactly():
    assert Problem(toy_outline(5), "block", Target.parse("blocks=4")).most_steps() == 4
    assert Problem(toy_outline(5), "layer", Target.parse("blocks=4")).most_steps() == 2
    assert Problem(toy_outline(5), "stock", Target.parse("layers=3")).most_steps() == 3
    assert Problem(toy_outline(5), "attention", Target.parse("params=-12%")).most_steps() == 5
