"""Whole layers out of what is left: scattered removals that pair up again make an ordinary, smaller model.

In a serial stack (attention, then mlp, each for itself) the blocks that are kept form one sequence. Where an attention
block is directly followed by an mlp block, the two make one ordinary layer, also when they come from two layers.
If everything pairs up, the model is a stock model with fewer layers; nothing else about it is special.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockpruner.anatomy.parts import Anatomy, Layer, Stack
from blockpruner.blocks import Block, Mask


class Unfit(Exception):
    """No ordinary model has what is left; the text says why."""


class HalfLayers(Unfit):
    """What is left is not whole layers, as after most removals of single blocks."""


@dataclass(frozen=True)
class NewLayer:
    """An ordinary layer made of the mixing half of layer `mixing` and the mlp half of layer `mlp` (indices)."""

    mixing: int
    mlp: int


@dataclass(frozen=True)
class Rest:
    """What is left of one stack of layers.

    path: of its module list; before: layers of the whole model; layers: the new ones, in order; mlps: of each layer
    of the whole model, the paths below it of what makes its mlp half; needed: removed blocks that others build on.
    """

    path: str
    before: int
    layers: tuple[NewLayer, ...]
    mlps: tuple[frozenset[str], ...]
    needed: tuple[Block, ...]

    @property
    def cut(self) -> bool:
        return len(self.layers) < self.before

    def source(self, new: int, inner: str) -> int:
        """The layer of the whole model from which new layer `new` has what is at path `inner` below it."""
        made = self.layers[new]
        return made.mlp if below(inner, self.mlps[made.mlp]) else made.mixing

    def uses(self, layer: int) -> bool:
        """Whether either half of this layer of the whole model is in a new one."""
        return any(layer in (made.mixing, made.mlp) for made in self.layers)

    def without_need(self) -> "Rest":
        return replace(self, needed=())

    def sources(self, *, mlp: bool = False) -> list[int]:
        """Of each new layer, the layer of the whole model that gives the half in question."""
        return [made.mlp if mlp else made.mixing for made in self.layers]


def untouched(path: str, layers: int) -> Rest:
    """All of a stack of which nothing is removed."""
    return Rest(path, layers, tuple(NewLayer(i, i) for i in range(layers)), (frozenset(),) * layers, ())


def below(path: str, roots: frozenset[str]) -> bool:
    """Whether `path` is one of `roots`, or is inside one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def rests(anatomy: Anatomy, mask: Mask) -> list[Rest]:
    """What `mask` leaves of every stack; Unfit where it is not whole layers, or none."""
    return [_rest(stack, mask) for stack in anatomy.stacks]


def _rest(stack: Stack, mask: Mask) -> Rest:
    layers = repack(stack, mask)
    if not layers:
        raise Unfit(f"no layer is left of {stack.path}")
    mlps = tuple(frozenset(_mlp_paths(layer)) for layer in stack.layers)
    needed = tuple(block for layer in stack.layers for block in _needed(layer, mask))
    return Rest(stack.path, len(stack.layers), layers, mlps, needed)


def _needed(layer: Layer, mask: Mask) -> list[Block]:
    """The removed blocks of `layer` that others build on; where nothing looks into a layer that is gone, none."""
    gone = [part for part in layer.parts if part.block in mask]
    if len(gone) == len(layer.parts) and not layer.shell:
        return [part.block for part in gone if layer.through.get("keep")]
    return [part.block for part in gone if part.kept]


def _mlp_paths(layer: Layer) -> list[str]:
    made = [path for part in layer.parts if part.block.kind == "mlp" for path in (*part.modules, *part.idle)]
    return [path.removeprefix(f"{layer.path}.") for path in made]


def repack(stack: Stack, mask: Mask) -> tuple[NewLayer, ...]:
    """The layers that remain of `stack` without `mask`; HalfLayers, naming the block, where one is left over."""
    made: list[NewLayer] = []
    waiting: int | None = None  # a mixing half that has not met its mlp
    for index, layer in enumerate(stack.layers):
        kept = [part.block for part in layer.parts if part.block not in mask]
        if not kept and layer.parts:
            continue
        if waiting is None and len(kept) == len(layer.parts):
            made.append(NewLayer(index, index))
        elif waiting is None and stack.serial and kept[0].kind != "mlp":
            waiting = index
        elif waiting is not None and len(kept) < len(layer.parts) and kept[0].kind == "mlp":
            made.append(NewLayer(waiting, index))
            waiting = None
        else:
            raise HalfLayers(_alone(stack, waiting, kept))
    if waiting is not None:
        raise HalfLayers(_alone(stack, waiting, []))
    return tuple(made)


def _alone(stack: Stack, waiting: int | None, kept: Sequence[Block]) -> str:
    if not stack.serial:
        return f"{', '.join(map(str, kept))} alone is no layer, and halves of two layers cannot be one here"
    if waiting is None:
        return f"{kept[0]} is left without a mixing block before it"
    mixing = next(part.block for part in stack.layers[waiting].parts if part.block.kind != "mlp")
    return f"{mixing} is left without an mlp after it"
