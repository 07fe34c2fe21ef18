"""Where each tensor of a smaller model comes from: another number in its name, or a part of a table over all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from blockpruner.surgery.pairing import Rest

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """A tensor of the whole model; of a table over its layers, packed along `axis`, the parts of some `layers`."""

    name: str
    axis: int = 0
    before: int = 0
    layers: tuple[int, ...] = ()

    def taken(self, tensor: Tensor) -> Tensor:
        """What `tensor`, the one of this name, gives to the smaller model."""
        if not self.layers:
            return tensor
        parts = tensor.unflatten(self.axis, (self.before, -1))
        index = tensor.new_tensor(self.layers).long()
        return parts.index_select(self.axis, index).flatten(self.axis, self.axis + 1)


class Origins:
    """What tensors come to when a model of the names and shapes `dense` is cut to `rests`."""

    def __init__(self, dense: nn.Module, rests: Sequence[Rest]) -> None:
        self._dense = shapes(dense)
        self._lists = _lengths(dense)
        self._cut = [rest for rest in rests if rest.cut]

    def of(self, trial: nn.Module) -> tuple[dict[str, Origin], list[str]]:
        """name -> origin of every tensor that `trial`, a smaller model, saves; and what is wrong, as text."""
        lists = [*((rest.path, rest) for rest in self._cut), *self._beside(trial)]
        firsts = tuple(f"{rest.path}.0." for rest in self._cut)
        found: dict[str, Origin] = {}
        wrong: list[str] = []
        for name, shape in shapes(trial).items():
            old = _renamed(name, lists)
            origin = self._origin(old, shape)
            if origin is None and name.startswith(firsts):  # what the first layer owns stays with whichever is first
                origin = self._origin(name, shape)
            if origin is None:
                size, was = ("x".join(map(str, s)) if s else "absent" for s in (shape, self._dense.get(old)))
                wrong.append(f"{name} would be {size}, and was {was}")
            else:
                found[name] = origin
        used = {origin.name for origin in found.values()}
        gone = tuple(f"{path}." for path, _ in lists)
        wrong += [f"there would be no {n}" for n in self._dense if n not in used and not n.startswith(gone)]
        return found, wrong

    def _origin(self, name: str, shape: tuple[int, ...]) -> Origin | None:
        was = self._dense.get(name)
        if was == shape:
            return Origin(name)
        if was is None or len(was) != len(shape):
            return None
        changed = [axis for axis, sizes in enumerate(zip(was, shape, strict=True)) if sizes[0] != sizes[1]]
        for rest in self._cut:
            before, after, axis = rest.before, len(rest.layers), changed[0]
            if len(changed) == 1 and was[axis] % before == 0 and was[axis] // before * after == shape[axis]:
                return Origin(name, axis, before, tuple(rest.sources()))
        return None

    def _beside(self, trial: nn.Module) -> list[tuple[str, Rest]]:
        """The lists outside the stacks that have lost entries with a stack: one entry for each of its layers."""
        stacks = tuple(f"{rest.path}." for rest in self._cut)
        return [
            (path, rest)
            for path, length in _lengths(trial).items()
            for rest in self._cut
            if (self._lists.get(path), length) == (rest.before, len(rest.layers)) and not f"{path}.".startswith(stacks)
        ]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """name -> shape of everything that a checkpoint of `model` holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _lengths(model: nn.Module) -> dict[str, int]:
    lists = (nn.ModuleList, nn.ParameterList)
    return {path: len(module) for path, module in model.named_modules() if isinstance(module, lists)}


def _renamed(name: str, lists: Sequence[tuple[str, Rest]]) -> str:
    """The name in the whole model of what is called `name` in the smaller one."""
    for path, rest in lists:
        if name.startswith(f"{path}."):
            number, _, inner = name.removeprefix(f"{path}.").partition(".")
            return ".".join(filter(None, (path, str(rest.source(int(number), inner)), inner)))
    return name
