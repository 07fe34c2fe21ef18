"""The shelf of searches: one file per method, one line here."""

from blockpruner.registry import parse_method
from blockpruner.searches.beam import Beam
from blockpruner.searches.enumeration import Enumeration
from blockpruner.searches.evolution import Evolution
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import STREAMED, Greedy
from blockpruner.searches.iterative import Iterative
from blockpruner.searches.knapsack import Knapsack
from blockpruner.searches.one_shot import OneShot
from blockpruner.searches.random import Random
from blockpruner.searches.span import Span
from blockpruner.searches.swap import Swap
from blockpruner.searching.contract import Search

SEARCHES: dict[str, type[Search]] = {
    "greedy": Greedy,
    "exhaustive": Exhaustive,
    "one-shot": OneShot,
    "iterative": Iterative,
    "span": Span,
    "knapsack": Knapsack,
    "beam": Beam,
    "evolution": Evolution,
    "swap": Swap,
    "enumeration": Enumeration,
    "random": Random,
}


def parse_search(text: str, *, seed: int = 0, streamed: bool = False) -> Search:
    """The search that `text` names, as in `random:seed=3`; `seed` serves searches that take one and were given none.

    streamed: every look reads the weights, so races take few.
    """
    search = parse_method(text, SEARCHES, "search", seed=seed)
    if streamed and races(search):
        return parse_method(text, SEARCHES, "search", seed=seed, growth=STREAMED)
    return search


def races(search: Search) -> bool:
    """Whether it decides by races: `greedy` does, and others where their option `race` is on."""
    return isinstance(search, Greedy) or bool(getattr(search, "race", False))
