"""The documents say of the methods what their classes say."""

from methods_page import BLOCK, PAGE, README, page, short

from blockpruner.catalogue import catalogue, markdown

FIX = "run: python benchmarks/methods_page.py"


def test_the_page_of_methods_is_that_of_the_classes():
    assert PAGE.read_text(encoding="utf-8") == page(catalogue()), FIX


def test_the_readme_lists_the_criteria_there_are():
    (found,) = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert found == short(catalogue()["criteria"]), FIX


def test_a_table_keeps_its_columns_whatever_is_in_a_cell():
    assert markdown([{"a": "x|y", "b": "z"}]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"
