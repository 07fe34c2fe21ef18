"""Spans: layers that follow each other and are all gone, and which dense layers each place that is left stands for."""

from dataclasses import dataclass

from blockpruner.anatomy.parts import Anatomy, Layer
from blockpruner.blocks import Mask, format_mask
from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Span:
    """Layers that follow each other and have lost all their blocks. stack: its name; first: number of the first."""

    stack: str
    first: int
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> Mask:
        return frozenset(part.block for layer in self.layers for part in layer.parts)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + len(self.layers)))

    @property
    def numbered(self) -> str:
        """As in `layers 4 to 7`, counted from 0."""
        return numbered(self.stack, self.numbers[0], self.numbers[-1])

    def __str__(self) -> str:
        return format_mask(self.blocks)


def numbered(stack: str, first: int, last: int) -> str:
    """These layers of a stack in words."""
    return f"{stack} {f'layer {first}' if first == last else f'layers {first} to {last}'}".strip()


def spans(anatomy: Anatomy, mask: Mask) -> list[Span]:
    """The runs of whole layers in `mask`, as long as can be, in the order in which the model runs."""
    found: list[Span] = []
    for stack in anatomy.stacks:
        run: list[Layer] = []
        for number, layer in enumerate((*stack.layers, None)):
            if layer is not None and layer.parts and all(part.block in mask for part in layer.parts):
                run.append(layer)
            elif run:
                found.append(Span(stack.name, number - len(run), tuple(run)))
                run = []
    return found


def _lives(layer: Layer, mask: Mask, repair: Repair) -> bool:
    """Whether a block of the layer is left, or something stands in the place of one."""
    return any(part.block not in mask or part.path in repair.replacements for part in layer.parts) or (
        layer.path in repair.replacements
    )


def layer_map(anatomy: Anatomy, mask: Mask, repair: Repair) -> dict[str, list[tuple[int, ...]]]:
    """Per stack, for each layer or map that is left, in order, the numbers of the dense layers that it stands for.

    A layer with any block or replacement left stands for itself, and for the whole layers that a replacement in it
    stands for as well. Runs without one stand nowhere.
    """
    whole: dict[str, list[tuple[int, ...]]] = {}
    for stack in anatomy.stacks:
        left: dict[int, tuple[int, ...]] = {
            n: (n,) for n, layer in enumerate(stack.layers) if _lives(layer, mask, repair)
        }
        for path, blocks in repair.spans.items():
            holder = next((n for n, layer in enumerate(stack.layers) if _holds(layer, path)), None)
            if holder is not None:
                gone = (n for n, layer in enumerate(stack.layers) if layer.parts and _blocks(layer) <= blocks)
                left[holder] = tuple(sorted({holder, *gone}))
        whole[stack.name] = [at for _, at in sorted(left.items())]
    return whole


def _blocks(layer: Layer) -> Mask:
    return frozenset(part.block for part in layer.parts)


def _holds(layer: Layer, path: str) -> bool:
    """Whether a gap at this path is one of the layer."""
    return path in (layer.path, *(part.path for part in layer.parts))
