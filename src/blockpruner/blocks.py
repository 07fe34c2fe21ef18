"""The vocabulary: blocks, moves, masks and their text forms. Nothing here knows of tensors.

A *block* is one residual branch of one layer, a *mask* the set of removed blocks, a *move* a set of
blocks that a search removes together. The text form of a block is `[stack.]kind.layer[.slot]`:
`attention.12`, `encoder.mlp.0`; the slot counts blocks of one kind within a layer and is left out when 0.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from blockpruner.errors import InputError

Kind = Literal["attention", "cross_attention", "mixer", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_TEXT = re.compile(rf"(?:([A-Za-z_]\w*)\.)?({'|'.join(KINDS)})\.(\d{{1,6}})(?:\.(\d{{1,3}}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Block:
    """One residual branch of one layer; `stack` is empty where the model has only one stack."""

    kind: Kind
    layer: int
    stack: str = ""
    slot: int = 0

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        slot = f".{self.slot}" if self.slot else ""
        return f"{stack}{self.kind}.{self.layer}{slot}"

    def __repr__(self) -> str:
        return f"Block({self})"

    @classmethod
    def parse(cls, text: str) -> "Block":
        """The block that `text` names; InputError if it is not of the form `[stack.]kind.layer[.slot]`."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"{text!r} does not name a block",
                fix=f"write [stack.]kind.layer, kind one of {', '.join(KINDS)}: attention.12, encoder.mlp.0",
            )
        stack, kind, layer, slot = match.groups()
        return cls(cast(Kind, kind), int(layer), stack or "", int(slot or 0))

    @property
    def order(self) -> tuple[int, str, int, int]:
        """Sort key: every mixing kind before mlp, then by stack, layer, slot (BlockPruner's tie order)."""
        return KINDS.index(self.kind), self.stack, self.layer, self.slot


Mask = frozenset[Block]


def format_mask(mask: Iterable[Block]) -> str:
    """Blocks in a fixed order joined by `+`; equal masks have equal text, the empty mask is `dense`."""
    return "+".join(str(block) for block in sorted(mask, key=lambda b: b.order)) or "dense"


def parse_mask(text: str) -> Mask:
    """The inverse of `format_mask`; a block named twice is an InputError."""
    if text == "dense":
        return frozenset()
    blocks = [Block.parse(part) for part in text.split("+")]
    if len(set(blocks)) != len(blocks):
        raise InputError(f"{text!r} names a block twice", fix="name every block once")
    return frozenset(blocks)


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks removed together: one block, a layer, a span, or a stock pair. Never empty."""

    blocks: Mask

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a move removes at least one block")

    def __str__(self) -> str:
        return format_mask(self.blocks)

    def __repr__(self) -> str:
        return f"Move({self})"

    @classmethod
    def of(cls, *blocks: Block) -> "Move":
        return cls(frozenset(blocks))

    @classmethod
    def parse(cls, text: str) -> "Move":
        return cls(parse_mask(text))


@dataclass(frozen=True)
class Outline:
    """What a search may know of a model: its blocks in the order they run, and their sizes.

    blocks: execution order; parameters: per block, the norms that leave with it included;
    total_parameters: of the whole model, tied weights once; serial: the stacks (by name) whose layers run
    one mixing block and then one mlp, each on its own, so that halves of two layers can make one ordinary layer;
    shared: per (stack, layer), the parameters that leave with the last of its blocks (a norm that they share);
    kept: blocks whose modules stay when they are removed, since others need what they make: searches leave them alone.
    """

    blocks: tuple[Block, ...]
    parameters: Mapping[Block, int]
    total_parameters: int
    serial: frozenset[str] = frozenset()
    shared: Mapping[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    kept: frozenset[Block] = frozenset()

    def layers(self) -> dict[tuple[str, int], tuple[Block, ...]]:
        """The blocks of each (stack, layer), in the order they run."""
        groups: dict[tuple[str, int], tuple[Block, ...]] = {}
        for block in self.blocks:
            key = (block.stack, block.layer)
            groups[key] = (*groups.get(key, ()), block)
        return groups

    def removed_parameters(self, mask: Mask) -> int:
        """Number of parameters that leave the model with `mask`."""
        gone = [key for key in self.shared if mask.issuperset(self.layers()[key])]
        return sum(self.parameters[block] for block in mask) + sum(self.shared[key] for key in gone)

    def check(self, mask: Iterable[Block], source: str) -> None:
        """InputError, naming `source`, if a block of `mask` is not a block of this model."""
        known = set(self.blocks)
        unknown = [str(block) for block in mask if block not in known]
        if unknown:
            kinds = sorted({f"{b.stack}.{b.kind}" if b.stack else b.kind for b in self.blocks})
            deepest = max((b.layer for b in self.blocks), default=-1)
            raise InputError(
                f"{source} names blocks this model does not have: {', '.join(unknown[:5])}",
                fix=f"use {', '.join(kinds)} of layers 0 to {deepest}; `blockpruner inspect` lists them",
            )
