"""What the layers of a model are apart from their numbers, and whether those of another model are the same.

Shapes alone do not tell a sliding window, an activation or a scale: the plain attributes of all modules are compared
too. Attributes that number or count layers differ, as they must, and those that nothing but the place in the stack
decides (a scale that shrinks with depth) cannot be had in another place.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockpruner.surgery.pairing import Rest

Place = tuple[str, str]  # path of a module below its layer, name of its attribute
_NUMBERING = ("layer", "idx", "index", "depth", "block")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Look:
    """One module: the name of its class, its plain attributes, the shapes of what it saves itself."""

    kind: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


Looks = Mapping[str, Look]  # path below the layer -> look


def looks(layer: nn.Module) -> dict[str, Look]:
    """The look of `layer` (at path "") and of every module inside it."""
    return {path: _look(module) for path, module in layer.named_modules(remove_duplicate=False)}


def _look(module: nn.Module) -> Look:
    saved = dict(module._parameters) | {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _plain(value)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items() if tensor is not None}
    return Look(type(module).__name__, settings, shapes)


def _plain(value: Any) -> bool:
    return all(type(item) in _PLAIN for item in value) if isinstance(value, (list, tuple)) else type(value) in _PLAIN


class Likeness:
    """Compares layers with those that are left of one stack; `dense`: the looks of all its layers."""

    def __init__(self, dense: Sequence[Looks], rest: Rest) -> None:
        self.rest = rest
        self._dense = dense
        self._expected = [self._joined(new) for new in range(len(rest.layers))]
        self._numbers = {place: line for place in self._places() if (line := self._line(place)) is not None}

    def _joined(self, new: int) -> dict[str, Look]:
        made = self.rest.layers[new]
        return {
            path: look
            for source in dict.fromkeys((made.mixing, made.mlp))
            for path, look in self._dense[source].items()
            if self.rest.source(new, path) == source
        }

    def misfits(self, trial: Sequence[Looks]) -> list[list[str]]:
        """What is wrong with each layer of a trial, which has the right number of them; empty lists where all fits."""
        return [list(self._misfits(new, layer)) for new, layer in enumerate(trial)]

    def _misfits(self, new: int, trial: Looks) -> Iterator[str]:
        expected = self._expected[new]
        added = self._added(trial) if new == 0 and self.rest.needed else {}
        path = f"{self.rest.path}.{new}"
        for inner in {**expected, **trial}:
            where = f"{path}.{inner}".rstrip(".")
            if inner not in trial:
                yield f"there would be no {where}"
            elif inner not in expected:
                if inner not in added:
                    yield f"{where} would be new"
            else:
                yield from self._differences(new, inner, where, trial[inner], {*added.get(inner, ())})

    def _differences(self, new: int, inner: str, where: str, trial: Look, added: set[str]) -> Iterator[str]:
        expected = self._expected[new][inner]
        if trial.kind != expected.kind:
            yield f"{where} would be of class {trial.kind}, not {expected.kind}"
        for name in {**expected.shapes, **trial.shapes}:
            wanted, found = expected.shapes.get(name), trial.shapes.get(name)
            if wanted != found and not (wanted is None and name in added):
                yield f"{where}.{name} would be {_size(found)}, not {_size(wanted)}"
        first = self._dense[0].get(inner)
        for name in {**expected.settings, **trial.settings}:
            wanted, found = (look.settings.get(name) for look in (expected, trial))
            if found == wanted and type(found) is type(wanted):
                continue
            if self._renumbered(new, (inner, name), wanted, found):
                continue
            if not (added and first and first.settings.get(name) == found):
                yield f"{where}.{name} would be {found!r}, not {wanted!r}"

    def _added(self, trial: Looks) -> dict[str, tuple[str, ...]]:
        """What the first layer of the trial has beyond that which becomes the first, as the old first layer had it.

        Path below the layer -> names of those of its own tensors and of its children that are more.
        """
        first, expected = self._dense[0], self._expected[0]
        more: dict[str, tuple[str, ...]] = {}
        for path, look in trial.items():
            if path not in first or first[path].shapes != look.shapes:
                continue
            names = look.shapes.keys() - expected[path].shapes.keys() if path in expected else look.shapes.keys()
            if names:
                more[path] = tuple(names)
                parent = path.rpartition(".")[0]
                if path not in expected:
                    more[parent] = (*more.get(parent, ()), path)
        return more

    def _renumbered(self, new: int, place: Place, wanted: Any, found: Any) -> bool:
        """Whether an attribute differs as it must, since it numbers or counts layers, or has an entry for each."""
        if isinstance(wanted, tuple) and isinstance(found, tuple):
            return self._recut(place[1], wanted, found)
        if type(wanted) is not int or type(found) is not int:
            return False
        if place in self._numbers:
            start, step = self._numbers[place]
            return found == start + step * new
        if not any(word in place[1].lower() for word in _NUMBERING):
            return False
        return found in {sum(source < wanted for source in self.rest.sources(mlp=mlp)) for mlp in (False, True)}

    def _recut(self, name: str, wanted: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
        """Whether what has an entry for each layer, or numbers some of them, differs as it must."""
        for sources in (self.rest.sources(mlp=mlp) for mlp in (False, True)):
            if len(wanted) == self.rest.before and found == tuple(wanted[source] for source in sources):
                return True
            numbered = tuple(new for new, source in enumerate(sources) if source in wanted)
            if any(word in name.lower() for word in _NUMBERING) and found == numbered:
                return True
        return False

    def positional(self, new: int, trial: Looks) -> str | None:
        """The first attribute in which layer `new` of a trial is wrong though its place alone decides it, as text."""
        for inner, look in self._expected[new].items():
            for name, wanted in look.settings.items():
                found = trial[inner].settings.get(name) if inner in trial else wanted
                if found != wanted and isinstance(wanted, float) and self._distinct((inner, name)):
                    path = f"{self.rest.path}.{new}.{inner}".rstrip(".")
                    return f"{path}.{name} is another in every place: it would be {found!r}, not {wanted!r}"
        return None

    def ratios(self, trial: Sequence[Looks]) -> set[float]:
        """By what factors scales in the layers of a trial would have to be others."""
        return {
            wanted / found
            for expected, layer in zip(self._expected, trial, strict=True)
            for inner in expected.keys() & layer.keys()
            for name, wanted in expected[inner].settings.items()
            if isinstance(found := layer[inner].settings.get(name), float)
            and isinstance(wanted, float)
            and found != wanted
            and found * wanted != 0
        }

    def _places(self) -> Iterator[Place]:
        for inner, look in self._dense[0].items():
            yield from ((inner, name) for name in look.settings)

    def _values(self, place: Place) -> list[Any]:
        inner, name = place
        return [layer[inner].settings.get(name) if inner in layer else None for layer in self._dense]

    def _line(self, place: Place) -> tuple[int, int] | None:
        """Start and step of an attribute that counts up from layer to layer; None where it does not number layers."""
        values = self._values(place)
        if len(values) < 2 or any(type(value) is not int for value in values):
            return None
        steps = {after - before for before, after in itertools.pairwise(values)}
        return (values[0], steps.pop()) if len(steps) == 1 and 0 not in steps else None

    def _distinct(self, place: Place) -> bool:
        values = self._values(place)
        return len(values) > 2 and len(set(values)) == len(values)

    def positions(self) -> list[tuple[int, ...]]:
        """The sets of new layers that have something in common which others lack, as sorted numbers, each set once."""
        found: dict[tuple[int, ...], None] = {}
        readers: list[Callable[[Looks], Any]] = []
        for inner in dict.fromkeys(itertools.chain.from_iterable(self._expected)):
            readers.append(lambda layer, inner=inner: (look := layer.get(inner)) and (look.kind, look.shapes))
            names = {name for layer in self._expected if inner in layer for name in layer[inner].settings}
            for name in sorted(names):
                if (inner, name) not in self._numbers:
                    readers.append(lambda layer, i=inner, n=name: i in layer and layer[i].settings.get(n))
        for read in readers:
            values = [repr(read(layer)) for layer in self._expected]
            kinds = dict.fromkeys(values)
            if 1 < len(kinds) < max(3, len(values)):
                for kind in kinds:
                    found[tuple(place for place, value in enumerate(values) if value == kind)] = None
        return list(found)


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "one number"
