"""What an anatomy is: the blocks of a model, where they sit and how they join the residual stream, as data.

A layer all of whose blocks are gone is gone itself: it returns its input. Where blocks are added to an untouched
stream this is what their absence means anyway; where norms or scales stand on the stream, these go with the last block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from blockpruner.anatomy.probing import Key
from blockpruner.blocks import Block, Mask, Outline

Spec = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One block of the model: where it sits and what goes with it.

    modules: path -> stand-in of the module whose output is the branch; outlets: names of the parameters that silence it
    when they are zero; idle: path -> stand-in of what only it needed; parameters: number that leave; compute: its
    share of the multiply-adds of one short forward pass, 0 to 1 (None where they could not be counted); cache_bytes:
    key/value bytes per token (of the encoder where it reads the encoder) and sequence; evidence: what decided its kind.
    """

    block: Block
    modules: Mapping[str, Spec]
    outlets: tuple[str, ...]
    idle: Mapping[str, Spec]
    parameters: int
    compute: float | None
    cache_bytes: int
    evidence: str

    @property
    def path(self) -> str:
        return next(iter(self.modules))

    @property
    def kept(self) -> bool:
        """Whether its modules go on running when it is removed, because other blocks need what they make."""
        return any(spec.get("keep") for spec in self.modules.values())


@dataclass(frozen=True)
class Layer:
    """One layer: its path, the argument that carries the stream, its parts in the order they run.

    through: the stand-in for the whole layer, which hands the stream through in the structure the layer returns;
    identity: whether the layer does that by itself once its parts are silent (and filled places empty); shell: whether
    it stays then, else `through` takes its place; idle: what does nothing in a shell; shared: parameters that leave
    with the last part; filled: whether a recovery put something in the place of a block that was removed earlier: such
    a layer is a shell, and does more than hand the stream through.
    """

    path: str
    hidden: Key
    through: Spec
    identity: bool
    shell: bool
    parts: tuple[Part, ...]
    idle: Mapping[str, Spec]
    shared: int
    filled: bool = False


@dataclass(frozen=True)
class Stack:
    """One stack of layers; `name` is empty when it is the only one. serial: see `Outline`."""

    name: str
    path: str
    layers: tuple[Layer, ...]
    serial: bool


@dataclass(frozen=True)
class Anatomy:
    """All stacks of a model, proved; `left`: path -> reason of those that are not understood, and left alone."""

    stacks: tuple[Stack, ...]
    total_parameters: int
    left: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def parts(self) -> dict[Block, Part]:
        """Every part by its block, in the order they run."""
        return {part.block: part for stack in self.stacks for layer in stack.layers for part in layer.parts}

    @cached_property
    def outline(self) -> Outline:
        return Outline(
            tuple(self.parts),
            {block: part.parameters for block, part in self.parts.items()},
            self.total_parameters,
            frozenset(stack.name for stack in self.stacks if stack.serial),
            {(s.name, i): layer.shared for s in self.stacks for i, layer in enumerate(s.layers) if layer.shared},
            frozenset(block for block, part in self.parts.items() if part.kept),
        )

    def cache_bytes(self, mask: Mask = frozenset()) -> int:
        """Key/value bytes per token without the blocks of `mask`; what kept blocks write stays."""
        return sum(part.cache_bytes for block, part in self.parts.items() if part.kept or block not in mask)

    def stand_ins(self, removed: Iterable[Block]) -> dict[str, Spec]:
        """path -> stand-in for everything that these blocks and only they need; InputError for an unknown block."""
        mask = frozenset(removed)
        self.outline.check(mask, "the set of blocks to remove")
        specs: dict[str, Spec] = {}
        for stack in self.stacks:
            for layer in stack.layers:
                specs |= layer_stand_ins(layer, mask)
        return specs


def layer_stand_ins(layer: Layer, mask: Mask) -> dict[str, Spec]:
    """path (below the model) -> stand-in for what `mask` takes out of one layer."""
    gone = [part for part in layer.parts if part.block in mask]
    empty = gone and len(gone) == len(layer.parts)
    if empty and not layer.shell:
        return {layer.path: layer.through}
    specs = {path: spec for part in gone for path, spec in {**part.modules, **part.idle}.items()}
    return {**specs, **layer.idle} if empty else specs
