"""The documents say of the methods what their classes say."""

import pytest
from methods_page import IN_README, PAGE, README, block, page, short

from blockpruner.catalogue import catalogue, markdown

FIX = "run: python benchmarks/methods_page.py"


def test_the_page_of_methods_is_that_of_the_classes():
    assert PAGE.read_text(encoding="utf-8") == page(catalogue()), FIX


@pytest.mark.parametrize("name", IN_README)
def test_the_readme_lists_the_methods_there_are(name):
    (found,) = block(name).findall(README.read_text(encoding="utf-8"))
    assert found == short(catalogue()[name]), FIX


def test_a_table_keeps_its_columns_whatever_is_in_a_cell():
    assert markdown([{"a": "x|y", "b": "z"}]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"
