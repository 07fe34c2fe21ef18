"""The vocabulary: text forms are inverses of each other, and parameters are counted once."""

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.blocks import KINDS, Block, Move, Outline, format_mask, parse_mask
from blockpruner.errors import InputError
from blockpruner.surgery.removal import prune_

BLOCKS = st.builds(
    Block,
    kind=st.sampled_from(KINDS),
    layer=st.integers(0, 999),
    stack=st.sampled_from(["", "encoder", "decoder"]),
    slot=st.integers(0, 9),
)


@given(BLOCKS)
def test_the_text_of_a_block_is_read_back_as_that_block(block: Block):
    assert Block.parse(str(block)) == block


@given(st.frozensets(BLOCKS, max_size=8))
def test_equal_masks_have_equal_text_and_are_read_back(mask: frozenset[Block]):
    assert parse_mask(format_mask(mask)) == mask
    assert format_mask(sorted(mask, key=str)) == format_mask(sorted(mask, key=hash))


@pytest.mark.parametrize(
    "text", ["", "attention", "attention.", "attention.-1", "block.3", "mlp.3.x", "mlp.\u0661", "a.b.mlp.1"]
)
def test_what_names_no_block_is_refused_with_the_form_it_should_have(text: str):
    with pytest.raises(InputError, match="does not name a block") as caught:
        Block.parse(text)
    assert "attention.12" in caught.value.fix


def test_a_mask_that_names_a_block_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        parse_mask("mlp.1+mlp.1")


def test_a_move_removes_at_least_one_block():
    with pytest.raises(ValueError, match="at least one"):
        Move(frozenset())


def test_blocks_that_a_model_lacks_are_named_with_those_it_has():
    outline = Outline((Block("mlp", 0), Block("mlp", 1)), {Block("mlp", 0): 1, Block("mlp", 1): 1}, 2)
    with pytest.raises(InputError, match=r"my plan names blocks this model does not have: mlp\.7") as caught:
        outline.check([Block("mlp", 7)], "my plan")
    assert "layers 0 to 1" in caught.value.fix


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_the_outline_counts_what_pruning_really_frees_shared_norms_included(family: str):
    outline = tiny.anatomy_of(family).outline
    layer = outline.layers()["", 1]
    for mask in (frozenset(layer), frozenset(layer[:1]), frozenset([*layer, outline.blocks[-1]])):
        model = tiny.FAMILIES[family]()
        before = sum(p.numel() for p in model.parameters())
        prune_(model, mask)
        assert before - sum(p.numel() for p in model.parameters()) == outline.removed_parameters(mask)
