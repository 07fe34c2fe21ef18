"""Removal lists of BlockPruner and LLM-Drop are understood, with their order where they have one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_outline

from blockpruner.errors import InputError
from blockpruner.foreign import read_moves

# What BlockPruner removed from Llama-2-7B, in order (32 calibration samples).
LLAMA_2_7B = """
    mha27 mha25 mha28 mha23 mha24 mha29 mha7 mlp6 mha18 mha19
    mlp26 mha30 mha21 mlp23 mlp24 mha12 mlp12 mlp9 mha10 mlp18
"""
UNITS = [(kind, int(layer)) for kind, layer in re.findall(r"(mha|mlp)(\d+)", LLAMA_2_7B)]


def official(units):
    """The form of `*_del_order_list.json`: for each k the set of the first k units, sorted by layer alone."""
    sets = {str(k): sorted(set(units[:k]), key=lambda unit: unit[1]) for k in range(1, len(units) + 1)}
    return {k: [list(unit) for unit in units] for k, units in sets.items()}


def read(value, outline=None):
    return [str(move) for move in read_moves(value, "list.json", outline)]


def test_blockpruners_order_is_recovered_by_differences():
    assert read(official(UNITS)) == [f"{kind.replace('mha', 'attention')}.{layer}" for kind, layer in UNITS]


def test_the_order_of_keys_and_of_units_in_a_set_does_not_matter():
    value = {k: list(reversed(units)) for k, units in reversed(official(UNITS).items())}
    assert read(value) == read(official(UNITS))


def test_a_step_in_which_nothing_was_found_adds_nothing():
    value = official(UNITS[:3])
    value["4"] = value["3"]
    assert read(value) == read(official(UNITS[:3]))


def test_units_whose_order_is_not_told_go_together():
    value = official(UNITS[:3])
    assert read({"1": value["1"], "3": value["3"]}) == ["attention.27", "attention.25+attention.28"]


def test_a_list_that_puts_a_unit_back_is_refused():
    with pytest.raises(InputError, match=r"list.json: 2 puts back attention.27"):
        read({"1": [["mha", 27]], "2": [["mha", 25], ["mha", 28]]})


@pytest.mark.parametrize("entry", [["mla", 1], ["mha", -1], ["mha", "1"], ["mha", True], ["mha"], "mha", None, {}])
def test_an_entry_that_is_no_unit_is_named(entry):
    with pytest.raises(InputError, match=r"list.json: 1: .* is not \[\"mha\" or \"mlp\", layer\]"):
        read({"1": [entry]})


def config(attention, mlp, layers=32):
    return {"model_type": "mistral", "num_hidden_layers": layers, "drop_attn_list": attention, "drop_mlp_list": mlp}


def test_llm_drops_published_lists_keep_their_order():
    assert read(config([25, 26, 24, 22], None)) == ["attention.25", "attention.26", "attention.24", "attention.22"]
    assert read(config([], [26, 27, 25])) == ["mlp.26", "mlp.27", "mlp.25"]


def test_equal_lists_drop_whole_layers():
    assert read(config([26, 25, 24], [26, 25, 24])) == [f"attention.{i}+mlp.{i}" for i in (26, 25, 24)]


def test_lists_without_an_order_are_one_move():
    assert read(config([22, 24, 25], None)) == ["attention.22+attention.24+attention.25"]
    assert read(config([25, 24], [3])) == ["attention.24+attention.25+mlp.3"]
    assert read(config([False, True, True, False], [False] * 4, layers=4)) == ["attention.1+attention.2"]


def test_a_single_dropped_block_needs_no_order():
    assert read(config([5], None)) == ["attention.5"]


@pytest.mark.parametrize("bad", [[32], [-1], [1, 1], [1.0], ["1"], "1", 7, {"1": 1}, [True] * 33, [True, 1]])
def test_a_list_that_does_not_fit_the_model_is_refused(bad):
    with pytest.raises(InputError, match=r"list.json: drop_attn_list"):
        read(config(bad, None))


def test_a_config_that_drops_nothing_is_refused():
    with pytest.raises(InputError, match="removes nothing"):
        read(config([False] * 32, None))


def test_what_a_joint_drop_reserved_is_turned_into_what_went():
    kept = [0, 1, 3, 4, 5, 7]  # of 4 attention blocks (0 to 3) and 4 mlps (4 to 7)
    assert read(kept, toy_outline(4)) == ["attention.2+mlp.2"]


def test_a_reserved_list_that_does_not_say_of_what_is_refused_with_the_file_that_does():
    with pytest.raises(InputError) as error:
        read([0, 1, 3], toy_outline(4))
    assert "keeps layers 0 to 3, but does not say of what" in error.value.what
    assert "config.json" in error.value.fix


@pytest.mark.parametrize("kept", [[0, 8], [0, 0, 7], [7, "x"], [1.0, 7]])
def test_a_reserved_list_of_another_model_is_refused(kept):
    with pytest.raises(InputError):
        read(kept, toy_outline(4))


def test_a_reserved_list_needs_its_model():
    with pytest.raises(InputError, match="what is kept"):
        read([0, 1, 7])


@pytest.mark.parametrize(
    "value", [{}, [], {"a": 1}, {"1": [], "x": []}, ["attention.3"], "attention.3", 3, None, {"٣": []}]
)
def test_anything_else_is_refused_with_the_forms_that_are_read(value):
    with pytest.raises(InputError) as error:
        read(value)
    assert "neither a plan nor a removal list" in error.value.what
    assert "drop_attn_list" in error.value.fix


def test_a_list_of_no_units_removes_nothing():
    with pytest.raises(InputError, match="removes nothing"):
        read({"1": []})


SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats(allow_nan=False) | st.sampled_from(["mha", "mlp", "1"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["1", "2", "drop_attn_list", "drop_mlp_list", "num_hidden_layers"]), inner)
    ),
)


@given(JSON)
def test_whatever_json_is_given_it_is_read_or_refused(value):
    try:
        moves = read_moves(value, "list.json", toy_outline(4))
    except InputError:
        return
    blocks = [block for move in moves for block in move.blocks]
    assert blocks
    assert len(set(blocks)) == len(blocks)
