"""Moves after which so many in all can still save enough, for a number of blocks that is met beside other targets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from blockpruner.blocks import Mask, Move, Outline
from blockpruner.searching.costs import Costs


@dataclass(frozen=True)
class Bound:
    """Of a cost, the most that may be left. saved: by moves, once asked for, since it is asked for often."""

    costs: Costs
    most: float | Fraction
    saved: dict[Move, float] = field(default_factory=dict[Move, float], init=False, compare=False, repr=False)

    @property
    def needed(self) -> float:
        """What is to be saved; none or less where the whole model is within it."""
        return float(self.costs.whole - self.most)

    def met(self, outline: Outline, mask: Mask) -> bool:
        return self.costs.left(outline, mask) <= self.most

    def saving(self, outline: Outline, move: Move) -> float:
        """What `move` takes off the whole model."""
        if move not in self.saved:
            self.saved[move] = self.costs.saved(outline, move.blocks)
        return self.saved[move]

    @property
    def slack(self) -> float:
        """How far sums over moves may be off: they leave out what moves share of a layer, and are rounded."""
        return sum(map(abs, self.costs.shared.values())) + 1e-9 * self.costs.whole


def leading(
    outline: Outline, mask: Mask, moves: Sequence[Move], room: int, bounds: Sequence[Bound]
) -> tuple[Move, ...]:
    """Those of `moves` on top of `mask` with which `room` moves, no more and no less, can meet all `bounds`.

    A move does if those that save most of the others make up the number with it. The first of these does so too then,
    so that whoever goes by steps always finds a next one. With one bound no move is missed, but for what layers share;
    with several, what saves most is what does by the mean of the shares of what they need.
    """
    order = most_saving(outline, moves, bounds)
    left = [bound.costs.left(outline, mask) for bound in bounds]

    def enough(move: Move) -> bool:
        way = apart((move, *order), room)
        return 0 < len(way) == room and all(
            _within(bound, before, outline, mask, way) for bound, before in zip(bounds, left, strict=True)
        )

    return tuple(move for move in moves if enough(move))


def most_saving(outline: Outline, moves: Sequence[Move], bounds: Sequence[Bound]) -> list[Move]:
    """The moves in the order of what they save of what the bounds need, most first."""
    open_ = [bound for bound in bounds if bound.needed > 0]
    return sorted(moves, key=lambda move: -sum(bound.saving(outline, move) / bound.needed for bound in open_))


def apart(moves: Iterable[Move], number: int) -> list[Move]:
    """The first `number` of `moves` that do not overlap with one before them."""
    found, gone = list[Move](), frozenset()
    for move in moves:
        if len(found) == number:
            break
        if gone.isdisjoint(move.blocks):
            found.append(move)
            gone |= move.blocks
    return found


def _within(bound: Bound, before: float, outline: Outline, mask: Mask, way: Sequence[Move]) -> bool:
    """Whether `way` on top of `mask`, with which `before` is left, meets the bound."""
    left = before - sum(bound.saving(outline, move) for move in way)
    if abs(left - bound.most) <= bound.slack:
        return bound.met(outline, mask.union(*(move.blocks for move in way)))
    return left <= bound.most
