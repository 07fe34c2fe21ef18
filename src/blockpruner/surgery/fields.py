"""Which fields of a configuration may speak of layers, and what they might say when some layers are gone.

Nothing here knows what a field means: these are proposals, most likely ones first, for `smaller` to try.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blockpruner.surgery.pairing import Rest

Path = tuple[str | int, ...]  # of a field: the keys, and places in lists, on the way to it
Changes = dict[Path, Any]
Positions = Sequence[tuple[int, ...]]  # sets of new layers that have something in common

_COUNTS = ("layer", "depth", "block")  # what names of fields that count layers have in them
_MLP = ("mlp", "moe", "dense", "sparse")  # ... of lists that describe the mlp half of each layer
_NAMES = ("layers", "n_layer", "blocks")  # ... in which it can mean nothing else
_LAYERS = (*_COUNTS, "idx")  # ... of lists of layer numbers
# ... of what a pattern of layers can depend on
_PATTERN = (*_LAYERS, "mlp", "dense", "sparse", "period", "offset", "step", "freq", "every", "interval", "pattern")
_PATTERN = (*_PATTERN, "first", "skip", "start", "hybrid", "stride", "type")


def changed(plain: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of the configuration `plain` with these values at these paths."""
    made = copied(plain)
    for path, value in changes.items():
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = copied(value)
    return made


def copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def countings(plain: Mapping[str, Any], rest: Rest) -> Iterator[Changes]:
    """Ways to say that this stack has fewer layers: one field with the lists beside it; several; another field."""
    whole: Changes = {}
    for holder, fields in _configs(plain):
        named = {path: n for path, n in _numbers_of(holder, fields, rest) if _says(path[-1], _COUNTS)}
        lists = _lists(holder, fields, rest)
        for path, number in named.items():
            yield from ({**cut, path: number} for cut in lists)
        yield lists[0]
        yield {**lists[0], **named}
        whole |= {**lists[0], **named}
    yield whole
    for holder, fields in _configs(plain):
        yield from ({path: number} for path, number in _numbers_of(holder, fields, rest))


def counts(plain: Mapping[str, Any], rest: Rest) -> Changes:
    """Every field that must be a count of layers, and is of as many as this stack has; with the new number."""
    found = (one for holder, fields in _configs(plain) for one in _numbers_of(holder, fields, rest))
    return {path: number for path, number in found if _says(path[-1], _NAMES)}


def _numbers_of(holder: Path, fields: Mapping[str, Any], rest: Rest) -> Iterator[tuple[Path, int]]:
    """Where a configuration, or a list in it, has the number of layers; with the new one."""
    for name, value in fields.items():
        listed = isinstance(value, (list, tuple))
        for place, number in enumerate(value if listed else [value]):
            if type(number) is int and number == rest.before:
                yield (*holder, name, *([place] if listed else [])), len(rest.layers)


def _lists(holder: Path, fields: Mapping[str, Any], rest: Rest) -> list[Changes]:
    """What has an entry per layer, or numbers layers, cut: what is about the mlp by the mlp halves.

    With layers numbered from 0; from 1; and with nothing but numbers changed, for lists may belong to another stack.
    """
    found: list[Changes] = []
    for start, entries in ((0, True), (1, True), (0, False)):
        changes: Changes = {}
        for name, value in fields.items():
            if _says(name, ["token"]):
                continue
            sources = rest.sources(mlp=_says(name, _MLP))
            cuts = _renumbered(name, value, rest, sources, start) or (entries and _cut(value, rest, sources))
            if cuts and cuts[0] != value:
                changes[*holder, name] = cuts[0]
        if changes not in found:
            found.append(changes)
    return found


def _configs(plain: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The configuration, and those nested in it (of text towers, of an encoder), by their paths."""
    yield path, plain
    for name, value in plain.items():
        if isinstance(value, Mapping) and (name.endswith("config") or "model_type" in value):
            yield from _configs(value, (*path, name))


def _says(name: object, words: Sequence[str]) -> bool:
    return any(word in str(name).lower() for word in words)


def _renumbered(name: str, value: Any, rest: Rest, sources: Sequence[int], start: int) -> list[Any]:
    """A list of layers, or a dictionary by layer, when only `sources` are left; empty for anything else."""
    layers = range(start, rest.before + start)
    if isinstance(value, Mapping) and value and _says(name, _COUNTS):
        if not all(str(key).isdecimal() and int(key) in layers for key in value):
            return []
        old = {int(key) - start: (type(key), item) for key, item in value.items()}
        return [{old[s][0](new + start): old[s][1] for new, s in enumerate(sources) if s in old}]
    listed = isinstance(value, (list, tuple)) and value and type(value[0]) is int and _says(name, _LAYERS)
    if not listed or list(value) != [layer for layer in layers if layer in value]:
        return []
    return [[new + start for new, source in enumerate(sources) if source + start in value]]


def _cut(value: Any, rest: Rest, sources: Sequence[int]) -> list[Any]:
    """A list with an entry per layer, or of [pattern, times], when only `sources` are left; empty for anything else."""
    if not isinstance(value, (list, tuple)):
        return []
    if len(value) == rest.before:
        return [[value[source] for source in sources]]
    if not all(isinstance(v, (list, tuple)) and len(v) == 2 and isinstance(v[0], (list, tuple)) for v in value):
        return []
    each = [
        entry for pattern, times in value if type(times) is int and times <= rest.before for entry in pattern * times
    ]
    return [[[[each[source] for source in sources], 1]]] if len(each) == rest.before else []


def options(
    plain: Mapping[str, Any], rest: Rest, positions: Positions, ratios: Sequence[float]
) -> Iterator[tuple[Path, list[Any]]]:
    """Every field that a pattern of layers, or a scale in them, can depend on, and the values to try.

    Values that carry a pattern on come first; ratios: what scales would have to be multiplied with.
    """
    for holder, fields in _configs(plain):
        for name, value in fields.items():
            if isinstance(value, float) and value:
                near = (math.nextafter(value * ratio, end) for ratio in ratios for end in (0, math.inf))
                if exact := [value * ratio for ratio in ratios]:
                    yield (*holder, name), [*exact, *near]
            elif _says(name, _PATTERN):
                values = list(_values(name, value, rest, positions))
                distinct = [v for i, v in enumerate(values) if v not in values[:i]]
                if distinct:
                    yield (*holder, name), distinct


def _values(name: str, value: Any, rest: Rest, positions: Positions) -> Iterator[Any]:
    both = [rest.sources(mlp=mlp) for mlp in (False, True)]
    for sources in both:
        yield from [*_renumbered(name, value, rest, sources, 0), *_renumbered(name, value, rest, sources, 1)]
        yield from _cut(value, rest, sources)
    if isinstance(value, (list, tuple)):
        if all(type(v) is int for v in value):
            yield from map(list, positions)
        elif 0 < len(value) < rest.before:
            yield from ([value[source % len(value)] for source in sources] for sources in both)
        if not _renumbered(name, value, rest, both[0], 0):
            yield list(value)
    elif type(value) is int and 0 <= value <= 2 * rest.before:
        yield from (sum(source < value for source in sources) for sources in both)
        yield from (sum(source >= rest.before - value for source in sources) for sources in both)
        yield from _numbers(positions, len(rest.layers))


def _numbers(positions: Positions, after: int) -> list[int]:
    """Periods, offsets and lengths of these sets of layers."""
    found: dict[int, None] = {}
    for places in positions:
        gaps = {after - before for before, after in itertools.pairwise(places)}
        found |= dict.fromkeys([*(gaps if len(gaps) == 1 else ()), places[0], places[0] + 1, len(places)])
    return [*found, 0, 1, after, after + 1]
