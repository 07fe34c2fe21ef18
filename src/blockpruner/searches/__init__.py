"""The shelf of searches: one file per method, one line here."""

from blockpruner.registry import parse_method
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.random import Random
from blockpruner.searching import Search

SEARCHES: dict[str, type[Search]] = {
    "exhaustive": Exhaustive,
    "random": Random,
}

# `greedy` stands for the best greedy search there is; today that is the one that tries every move.
ALIASES = {"greedy": "exhaustive"}


def parse_search(text: str, *, seed: int = 0) -> Search:
    """The search that `text` names, as in `random:seed=3`; `seed` serves searches that take one and were given none."""
    name, colon, options = text.partition(":")
    return parse_method(ALIASES.get(name.strip(), name) + colon + options, SEARCHES, "search", seed=seed)
