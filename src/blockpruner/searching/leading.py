"""Moves after which so many in all can still save enough, for a number of blocks that is met beside other targets."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from blockpruner.blocks import Mask, Move, Outline
from blockpruner.searching.costs import Costs

Saved = tuple[float, ...]  # by a move, of each bound's cost


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

    A move does if others make up the number with it: one after the other those that save most of what is still to be
    saved. The first of these does so too then, so that whoever goes by steps always finds a next one. With one bound no
    move is missed, but for what layers share; with several, few are.
    """
    alike: dict[Saved, list[Move]] = {}
    for move in most_saving(outline, moves, bounds):
        alike.setdefault(tuple(bound.saving(outline, move) for bound in bounds), []).append(move)
    left = [bound.costs.left(outline, mask) for bound in bounds]

    def enough(move: Move, saved: Saved) -> bool:
        still = [before - float(b.most) - one for before, b, one in zip(left, bounds, saved, strict=True)]
        way = [move, *_others(move, room - 1, alike, [b.needed for b in bounds], still)]
        return len(way) == room and all(
            _within(bound, before, outline, mask, way) for bound, before in zip(bounds, left, strict=True)
        )

    found = {move for saved, group in alike.items() for move in group if enough(move, saved)}
    return tuple(move for move in moves if move in found)


def _others(
    first: Move, number: int, alike: Mapping[Saved, Sequence[Move]], needed: Sequence[float], still: Sequence[float]
) -> Iterator[Move]:
    """So many moves beside `first`, each the one that saves the most shares of what is still to be saved."""
    gone, at = first.blocks, dict.fromkeys(alike, 0)

    def worth(saved: Saved) -> float:
        each = zip(saved, still, needed, strict=True)
        shares = (min(one, more) / whole for one, more, whole in each if whole > 0 and more > 0)
        return round(math.fsum(shares), 12)  # equals are equal, however they were summed up

    for _ in range(number):
        for saved, group in alike.items():
            while at[saved] < len(group) and not gone.isdisjoint(group[at[saved]].blocks):
                at[saved] += 1
        open_ = [saved for saved, group in alike.items() if at[saved] < len(group)]
        if not open_:
            return
        best = max(open_, key=worth)
        yield (move := alike[best][at[best]])
        gone |= move.blocks
        still = [more - one for more, one in zip(still, best, strict=True)]


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
