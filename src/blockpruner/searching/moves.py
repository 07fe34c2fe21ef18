"""What may be removed together, when enough is removed, and what is never touched.

A *granularity* generates the moves that remain on top of a mask, in the order that settles ties. Whatever was taken
before, every block that is in some move at the start can still be taken in the end, so the most that a granularity
can remove is the union of its first moves. A new granularity must keep that. Blocks that others need (`Outline.kept`)
are in no move: removing them saves nothing.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Self, cast

from blockpruner.blocks import Kind, Mask, Move, Outline
from blockpruner.errors import InputError
from blockpruner.registry import lookup
from blockpruner.searching.leading import Bound

Granularity = Callable[[Outline, Mask], tuple[Move, ...]]


def block(outline: Outline, mask: Mask) -> tuple[Move, ...]:
    """Every block that remains, alone: all mixing blocks by layer, then all mlps (BlockPruner's tie order)."""
    remaining = sorted((b for b in outline.blocks if b not in mask | outline.kept), key=lambda b: b.order)
    return tuple(Move.of(b) for b in remaining)


def attention(outline: Outline, mask: Mask) -> tuple[Move, ...]:
    """Every attention block that remains; mixers and cross-attention are left to `block`."""
    return _of_kind(outline, mask, "attention")


def mlp(outline: Outline, mask: Mask) -> tuple[Move, ...]:
    """Every mlp that remains."""
    return _of_kind(outline, mask, "mlp")


def layer(outline: Outline, mask: Mask) -> tuple[Move, ...]:
    """Every layer that is still whole, all its blocks together."""
    untouchable = mask | outline.kept
    return tuple(Move.of(*blocks) for blocks in outline.layers().values() if untouchable.isdisjoint(blocks))


def stock(outline: Outline, mask: Mask) -> tuple[Move, ...]:
    """Whole layers, then pairs of a mixing block and an mlp of two layers that are neighbours among the kept blocks.

    Kept blocks of a serial stack then always alternate mixing, mlp, mixing, mlp: halves of different layers re-pack
    into ordinary layers, and the model stays one of its architecture with one layer less per move. In stacks that
    are not serial, whole layers only.
    """
    straddling = []
    for stack in sorted(outline.serial):
        kept = [b for b in outline.blocks if b.stack == stack and b not in mask]
        straddling += [
            Move.of(a, b)
            for a, b in itertools.pairwise(kept)
            if a.layer != b.layer and (a.kind == "mlp") != (b.kind == "mlp") and outline.kept.isdisjoint((a, b))
        ]
    return (*layer(outline, mask), *straddling)


def span(outline: Outline, mask: Mask, length: int) -> tuple[Move, ...]:
    """Every `length` layers that follow each other in a stack and are still whole; they overlap."""
    untouchable = mask | outline.kept
    layers = outline.layers()
    runs = []
    for stack, first in layers:
        blocks = [layers.get((stack, first + step)) for step in range(length)]
        if all(found and untouchable.isdisjoint(found) for found in blocks):
            runs.append(Move.of(*itertools.chain.from_iterable(found for found in blocks if found)))
    return tuple(runs)


_SPAN = re.compile(r"span=(\d{1,4})", re.ASCII)
GRANULARITIES: dict[str, Granularity] = {
    "block": block,
    "attention": attention,
    "mlp": mlp,
    "layer": layer,
    "stock": stock,
}


def check_granularity(text: str) -> None:
    """InputError if `text` is no granularity, and not `span=N`."""
    if not _SPAN.fullmatch(text.strip()):
        lookup(text, GRANULARITIES, "kind of move")


def offered(text: str, outline: Outline, mask: Mask, protected: frozenset[tuple[str, int]]) -> tuple[Move, ...]:
    """The moves of a granularity, or of `span=N`, on top of `mask` that touch no protected layer, in tie order.

    Spans are for criteria only: they overlap, so that a search by steps cannot tell what it will be able to reach.
    """
    if match := _SPAN.fullmatch(text.strip()):
        moves = span(outline, mask, int(match[1])) if int(match[1]) else ()
    else:
        moves = lookup(text, GRANULARITIES, "kind of move")(outline, mask)
    return tuple(move for move in moves if not any((b.stack, b.layer) in protected for b in move.blocks))


def _of_kind(outline: Outline, mask: Mask, kind: Kind) -> tuple[Move, ...]:
    return tuple(move for move in block(outline, mask) if all(b.kind == kind for b in move.blocks))


@dataclass(frozen=True)
class Target:
    """How much is to be removed: `blocks=6`, `layers=3` (that many moves of whole layers), `params=-25%`.

    amount: blocks, layers, or per cent of all parameters of the model. A params target is reached by the first mask
    that removes at least that much; blocks and layers are met exactly, beside other targets too.
    """

    unit: Literal["blocks", "layers", "params"]
    amount: int | Fraction

    rise: ClassVar[float | None] = None
    endless: ClassVar[bool] = False
    limits: ClassVar[tuple[()]] = ()
    sources: ClassVar[str] = ""

    @property
    def exact(self) -> bool:
        """Whether more is as wrong as less."""
        return self.unit != "params"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The target that `text` writes; InputError says the three forms."""
        match = re.fullmatch(r"\s*(?:(blocks|layers)=(\d{1,6})|params=-(\d{1,3}(?:\.\d{1,3})?)%)\s*", text, re.ASCII)
        unit, count, percent = match.groups() if match else (None, None, None)
        amount = Fraction(percent) if percent else int(count or 0)
        if amount == 0 or (percent and amount > 100):
            raise InputError(f"{text!r} is not a target", fix="write blocks=6, layers=3 or params=-25%, above zero")
        return cls(cast(Literal["blocks", "layers"], unit) if unit else "params", amount)

    def __str__(self) -> str:
        return f"params=-{float(self.amount):.10g}%" if self.unit == "params" else f"{self.unit}={self.amount}"

    def reached(self, outline: Outline, mask: Mask, steps: int) -> bool:
        """Whether `mask`, made by `steps` moves, removes enough."""
        return self._removed(outline, mask, steps) >= self.amount

    def exceeded(self, outline: Outline, mask: Mask, steps: int) -> bool:
        """Whether more is gone than a number that is met exactly."""
        return self.exact and self._removed(outline, mask, steps) > self.amount

    def bounds(self, outline: Outline) -> Sequence[Bound]:
        """What it asks for beside a number: nothing."""
        return ()

    def leading(
        self, outline: Outline, mask: Mask, moves: tuple[Move, ...], bounds: Sequence[Bound]
    ) -> tuple[Move, ...]:
        """Those of `moves`, on offer on top of `mask`, after which it can still be met: all."""
        return moves

    def room(self, outline: Outline, mask: Mask, move: Move) -> int:
        """How many moves like `move` are to go on top of `mask`, for a number of blocks or layers."""
        if self.unit == "blocks":
            return (int(self.amount) - len(mask)) // len(move.blocks)
        whole = [blocks for blocks in outline.layers().values() if mask.issuperset(blocks)]
        halves = len(mask) - sum(map(len, whole))  # of layers that stock pairs have left something of
        return int(self.amount) - len(whole) - halves // 2

    def most_steps(self, outline: Outline, moves: Sequence[Move]) -> int:
        """The number of moves that reach it; for params an upper bound (as if the smallest moves were taken).

        moves: those on offer at the start, already checked.
        """
        if self.unit == "layers":
            return int(self.amount)
        if self.unit == "blocks":
            return int(self.amount) // len(moves[0].blocks)
        sizes = sorted(outline.removed_parameters(move.blocks) for move in moves)
        needed = self.amount * outline.total_parameters / 100
        return 1 + sum(total < needed for total in itertools.accumulate(sizes))

    def check(self, outline: Outline, granularity: str, moves: Sequence[Move]) -> None:
        """InputError, naming the most there is, unless a search that begins with `moves` on offer must reach it."""
        if not moves:
            raise InputError(
                f"there is no {granularity!r} move in this model, or every one touches a protected layer",
                fix="use other moves, or protect fewer layers",
            )
        self._check_unit(granularity, {len(move.blocks) for move in moves})
        everything: Mask = frozenset().union(*(move.blocks for move in moves))
        most = self._removed(outline, everything, len({(b.stack, b.layer) for b in everything}))
        if most < self.amount:
            limit = f"params=-{math.floor(10 * most) / 10:g}%" if self.unit == "params" else f"{self.unit}={most}"
            raise InputError(
                f"{self} is more than there is: {granularity!r} moves reach at most {limit}",
                fix=f"ask for {limit} or less, protect fewer layers, or use other moves",
            )

    def _check_unit(self, granularity: str, sizes: set[int]) -> None:
        if self.unit == "layers" and granularity not in ("layer", "stock"):
            raise InputError(
                f"{self} counts moves of whole layers, but the moves are {granularity!r}",
                fix="use --moves layer or --moves stock, or a target blocks=N or params=-P%",
            )
        if self.unit == "blocks" and (len(sizes) > 1 or self.amount % max(sizes)):
            each = " or ".join(map(str, sorted(sizes)))
            raise InputError(
                f"{self} cannot be met exactly: {granularity!r} moves remove {each} blocks each",
                fix=f"use a target layers=N, or a multiple of {max(sizes)}" if len(sizes) == 1 else "use layers=N",
            )

    def _removed(self, outline: Outline, mask: Mask, steps: int) -> int | Fraction:
        if self.unit == "params":
            return Fraction(100 * outline.removed_parameters(mask), outline.total_parameters)
        return len(mask) if self.unit == "blocks" else steps


def parse_protected(text: str, outline: Outline) -> frozenset[tuple[str, int]]:
    """The (stack, layer) of each layer named in `0,1,-1`, negative ones counted from the end; stacks: `encoder.0`.

    `plus` stands for the first four and the last two layers of every stack, as in Shortened LLaMA's Taylor+ and Mag+.
    InputError for a stack or a layer that the model does not have.
    """
    depths: dict[str, int] = {}
    for stack, number in outline.layers():
        depths[stack] = max(depths.get(stack, 0), number + 1)
    words = [part.strip() for part in text.split(",") if part.strip()]
    plus = {(stack, layer) for stack, depth in depths.items() for layer in (*range(4), depth - 2, depth - 1)}
    plus &= outline.layers().keys()
    named = {_layer(word, depths) for word in words if word != "plus"}
    return frozenset(named | (plus if "plus" in words else set()))


def format_protected(protected: frozenset[tuple[str, int]]) -> tuple[str, ...]:
    """The text forms of protected layers, sorted: `0`, `encoder.3`."""
    return tuple(f"{stack}.{number}" if stack else str(number) for stack, number in sorted(protected))


def _layer(text: str, depths: dict[str, int]) -> tuple[str, int]:
    stack, _, number = text.rpartition(".")
    depth = depths.get(stack, 0)
    if not re.fullmatch(r"-?\d{1,6}", number, re.ASCII) or not -depth <= int(number) < depth:
        forms = [f"{name}.0 to {name}.{end - 1}" if name else f"0 to {end - 1}" for name, end in depths.items()]
        raise InputError(
            f"{text!r} is not a layer of this model, so it cannot be protected",
            fix=f"name layers {', '.join(forms)}; negative numbers count from the end",
        )
    return stack, int(number) % depth
