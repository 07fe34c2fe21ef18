"""Every method there is, as its class describes it: for `list`, and for the tables of the documents."""

from collections.abc import Iterable, Mapping
from typing import Any

from blockpruner.criteria import CRITERIA
from blockpruner.objectives import OBJECTIVES
from blockpruner.recipe import Recipe, names
from blockpruner.recoveries import RECOVERIES
from blockpruner.searches import SEARCHES
from blockpruner.searching.moves import GRANULARITIES, span

Rows = list[dict[str, str]]
TARGETS = {
    "blocks=6": "that many blocks, no more and no less",
    "layers=3": "that many moves of whole layers, no more and no less",
    "params=-25%": "that share of all parameters, or more",
    "memory=16GiB,context=32768,batch=8": "weights and the cache of so many tokens of so many sequences fit into that, "
    "in the dtype of the model's files; reserve=1GiB keeps some for activations",
    "speed=1.3x:decode,batch=1,context=512": "so many times as fast, or `prefill`; measured here, or --device-spec",
    "loss=+0.1": "the search stops before the loss rises by more; several targets, joined by commas, are all met",
}


def catalogue() -> dict[str, Rows]:
    """Shelf -> its methods, a row each."""
    kinds = {**GRANULARITIES, "span=N": span}
    return {
        "criteria": _rows(CRITERIA, ("title", "source", "needs", "passes", "moves")),
        "objectives": _rows(OBJECTIVES, ("title", "source", "unit", "reads")),
        "searches": _rows(SEARCHES, ("title", "source")),
        "recoveries": _rows(RECOVERIES, ("title", "source", "needs", "passes")),
        "recipes": [{"name": name, "title": (one := Recipe.read(name)).title, "source": one.paper} for name in names()],
        "moves": [{"name": name, "meaning": _first_line(kind)} for name, kind in kinds.items()],
        "targets": [{"name": name, "meaning": meaning} for name, meaning in TARGETS.items()],
    }


def markdown(rows: Rows) -> str:
    """The rows as a table for a document."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(line))} |" for line in lines) + "\n"


def _rows(shelf: Mapping[str, Any], fields: Iterable[str]) -> Rows:
    return [{"name": name} | {field: getattr(method, field) for field in fields} for name, method in shelf.items()]


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _cell(values: Iterable[str]) -> list[str]:
    return [value.replace("|", "\\|") for value in values]
