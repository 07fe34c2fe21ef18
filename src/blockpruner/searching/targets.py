"""Targets of memory, speed and loss, and several at once: what they mean, once costs are known.

The text form is a list of `key=value`. The keys `blocks`, `layers`, `params`, `memory`, `speed` and `loss` begin a
target each; other keys are options of the target before them, so that there is one way to read
`memory=16GiB,context=32768,batch=8,speed=1.3x:decode,batch=1,loss=+0.1`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, Literal, NoReturn, Self

from blockpruner.blocks import Mask, Move, Outline
from blockpruner.errors import InputError
from blockpruner.searching.costs import Costs, format_bytes, parse_bytes
from blockpruner.searching.leading import Bound, apart, leading, most_saving
from blockpruner.searching.moves import Target

Phase = Literal["decode", "prefill"]
FORMS = (
    "write blocks=6, layers=3, params=-25%, memory=16GiB,context=32768,batch=8, speed=1.3x:decode,batch=1 or "
    "loss=+0.1, or several of them, joined by commas"
)
_OPTIONS = {"memory": ("context", "batch", "reserve"), "speed": ("batch", "context"), "loss": ()}
_COUNTS = ("blocks", "layers", "params")


@dataclass(frozen=True)
class Memory:
    """Weights and what a cache of `batch` sequences of `context` tokens holds, at most `most` bytes less `reserve`.

    reserve: for activations and the runtime, which are not counted.
    """

    most: int
    context: int = 2048
    batch: int = 1
    reserve: int = 0

    @property
    def workload(self) -> str:
        return f"memory,context={self.context},batch={self.batch}"

    def __str__(self) -> str:
        reserve = f",reserve={format_bytes(self.reserve)}" if self.reserve else ""
        return f"memory={format_bytes(self.most)},context={self.context},batch={self.batch}{reserve}"

    def limit(self, costs: Costs) -> float:
        return self.most - self.reserve

    def nearest(self, costs: Costs, left: float) -> str:
        """The target that a cost which is left just meets."""
        return str(replace(self, most=math.ceil(left) + self.reserve))


@dataclass(frozen=True)
class Speed:
    """So many times as fast as the whole model.

    decode: per new token with `context` tokens in the cache; prefill: of `context` tokens; `batch` sequences.
    """

    ratio: Fraction
    phase: Phase = "decode"
    batch: int = 1
    context: int = 512

    @property
    def workload(self) -> str:
        return f"{self.phase},batch={self.batch},context={self.context}"

    def __str__(self) -> str:
        return f"speed={float(self.ratio):.10g}x:{self.workload}"

    def limit(self, costs: Costs) -> float:
        return costs.whole / float(self.ratio)

    def nearest(self, costs: Costs, left: float) -> str:
        """The target that a cost which is left just meets."""
        ratio = Fraction(math.floor(100 * costs.whole / left), 100) if left > 0 else Fraction(999)
        return str(replace(self, ratio=ratio)) if ratio > 1 else "no speed-up at all"


Limit = Memory | Speed


@dataclass(frozen=True)
class Goals:
    """Several targets at once, or one that needs costs: enough is removed when all of them are met.

    Blocks and layers are met exactly: just so many go, and they are such that the other targets are met.

    rise: the loss may be above the dense one by so much at most, in the unit of the objective. A search stops before
    the first step that would pass it; without another target, that is the only end. costs: by workload, see `bound`.
    """

    counts: tuple[Target, ...] = ()
    limits: tuple[Limit, ...] = ()
    rise: float | None = None
    costs: Mapping[str, Costs] = field(default_factory=dict[str, Costs], compare=False)

    unit: ClassVar[str] = "goals"
    amount: ClassVar[int] = 0

    @property
    def endless(self) -> bool:
        """Whether only the loss ends it."""
        return not self.counts and not self.limits

    def bound(self, costs: Mapping[str, Costs]) -> Self:
        """The same with the costs of every workload that it names."""
        return replace(self, costs={limit.workload: costs[limit.workload] for limit in self.limits})

    def __str__(self) -> str:
        rise = [] if self.rise is None else [f"loss=+{self.rise:.10g}"]
        return ",".join([*map(str, self.counts), *map(str, self.limits), *rise])

    def reached(self, outline: Outline, mask: Mask, steps: int) -> bool:
        """Whether `mask`, made by `steps` moves, removes enough; never, if the loss alone ends the search."""
        counted = all(count.reached(outline, mask, steps) for count in self.counts)
        return not self.endless and counted and all(self._bound(limit).met(outline, mask) for limit in self.limits)

    def exceeded(self, outline: Outline, mask: Mask, steps: int) -> bool:
        """Whether more is gone than a number of blocks or layers that is met exactly."""
        return any(count.exceeded(outline, mask, steps) for count in self.counts)

    @property
    def exact(self) -> list[Target]:
        """Numbers of blocks and layers."""
        return [count for count in self.counts if count.exact]

    def bounds(self, outline: Outline) -> Sequence[Bound]:
        """What may be left at most, by all targets but the exact ones and the loss."""
        total = outline.total_parameters
        sizes = {block: float(size) for block, size in outline.parameters.items()}
        shared = {key: float(size) for key, size in outline.shared.items()}
        parameters = Costs(float(total), sizes, shared, "parameters", "the anatomy")
        shares = [Bound(parameters, total - count.amount * total / 100) for count in self.counts if not count.exact]
        return [*map(self._bound, self.limits), *shares]

    def leading(
        self, outline: Outline, mask: Mask, moves: tuple[Move, ...], bounds: Sequence[Bound]
    ) -> tuple[Move, ...]:
        """Those of `moves`, on offer on top of `mask`, after which all can still be met, see `leading`."""
        if not moves or not self.exact or len(self.exact) + len(bounds) == 1:
            return moves
        rooms = {count.room(outline, mask, moves[0]) for count in self.exact}
        return leading(outline, mask, moves, rooms.pop(), bounds) if len(rooms) == 1 else ()

    def _bound(self, limit: Limit) -> Bound:
        costs = self.costs[limit.workload]
        return Bound(costs, limit.limit(costs))

    def had(self, outline: Outline, mask: Mask) -> str:
        """The targets with costs that `mask` just meets."""
        return ",".join(
            limit.nearest(costs, costs.left(outline, mask))
            for limit in self.limits
            for costs in (self.costs[limit.workload],)
        )

    def most_steps(self, outline: Outline, moves: Sequence[Move]) -> int:
        """An upper bound of the number of moves, as if those that save least were taken first."""
        if self.endless:
            return len(moves)
        if self.exact:
            return min(count.most_steps(outline, moves) for count in self.exact)
        steps = [count.most_steps(outline, moves) for count in self.counts]
        for limit in self.limits:
            costs = self.costs[limit.workload]
            saved = sorted(max(0.0, costs.saved(outline, move.blocks)) for move in moves)
            needed = costs.whole - limit.limit(costs)
            steps.append(1 + sum(total < needed for total in itertools.accumulate(saved)))
        return min(len(moves), max(steps))

    def check(self, outline: Outline, granularity: str, moves: Sequence[Move]) -> None:
        """InputError, naming what there is, if no set of `moves` reaches it, or the whole model has it already."""
        for count in self.counts or (Target("params", Fraction(1, 10**9)),):
            count.check(outline, granularity, moves)
        everything: Mask = frozenset().union(*(move.blocks for move in moves))
        for limit in self.limits:
            if not self._bound(limit).met(outline, everything):
                costs = self.costs[limit.workload]
                nearest = limit.nearest(costs, costs.left(outline, everything))
                raise InputError(
                    f"{limit} cannot be had: without any of the blocks that {granularity!r} moves may take, the "
                    f"nearest is {nearest} (costs: {costs.source})",
                    fix=f"ask for {nearest}, shorten context or batch, protect less, or use other moves",
                )
        if self.reached(outline, frozenset(), 0):
            raise InputError(
                f"the whole model meets {self}: it has {self.had(outline, frozenset())} (costs: {self.sources})",
                fix="nothing needs to go; ask for less",
            )
        bounds = self.bounds(outline)
        if not self.leading(outline, frozenset(), tuple(moves), bounds):
            self._refuse_number(outline, moves, bounds)

    @property
    def sources(self) -> str:
        """Where the costs come from."""
        return "; ".join(dict.fromkeys(costs.source for costs in self.costs.values()))

    def _refuse_number(self, outline: Outline, moves: Sequence[Move], bounds: Sequence[Bound]) -> NoReturn:
        """InputError: no set of just so many blocks or layers meets the rest, of which it names the nearest."""
        number = ",".join(map(str, self.exact))
        room = min(count.room(outline, frozenset(), moves[0]) for count in self.exact)
        nearest: list[str] = []
        for limit, bound in itertools.zip_longest(self.limits, bounds):
            way = apart(most_saving(outline, moves, [bound]), room)
            left = bound.costs.left(outline, frozenset().union(*(move.blocks for move in way)))
            share = math.floor(1000 * (1 - left / bound.costs.whole)) / 10
            nearest.append(limit.nearest(bound.costs, left) if limit else f"params=-{share:g}%")
        had = f"with {number} the nearest is {' and '.join(nearest)}" if nearest else "these are not as many moves"
        raise InputError(
            f"{self} {'was not found' if len(bounds) > 1 else 'cannot be had'}: {had}"
            f"{', each by itself' if len(nearest) > 1 else ''}",
            fix=f"ask for what there is, or leave out {number}, so that as many go as it takes",
        )


def parse_target(text: str) -> Target | Goals:
    """The target or targets that `text` writes; InputError says the forms, or the option that is not one."""
    counts, limits, rises = [], [], []
    for head, value, options in _groups(text):
        if head in _COUNTS:
            counts.append(Target.parse(f"{head}={value}"))
        elif head == "memory":
            sizes = {key: parse_bytes(given) if key == "reserve" else _whole(key, given) for key, given in options}
            limits.append(Memory(parse_bytes(value), **sizes))
        elif head == "speed":
            found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?)x(?::(decode|prefill))?", value, re.ASCII)
            if found is None or Fraction(found[1]) <= 1:
                raise InputError(f"speed={value} is no speed-up", fix="write speed=1.3x:decode or speed=1.3x:prefill")
            numbers = {key: _whole(key, given) for key, given in options}
            phase: Phase = "prefill" if found[2] == "prefill" else "decode"
            limits.append(Speed(Fraction(found[1]), phase, **numbers))
        else:
            found = re.fullmatch(r"\+(\d{1,3}(?:\.\d{1,6})?)", value, re.ASCII)
            if found is None or float(found[1]) == 0:
                raise InputError(f"loss={value} is no rise of the loss", fix="write it as in loss=+0.1")
            rises.append(float(found[1]))
    _check_once([*(count.unit for count in counts), *(limit.workload for limit in limits), *("loss" for _ in rises)])
    if len(counts) == 1 and not limits and not rises:
        return counts[0]
    return Goals(tuple(counts), tuple(limits), rises[0] if rises else None)


def _groups(text: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(key, value, options) of each target in `text`."""
    groups: list[tuple[str, str, list[tuple[str, str]]]] = []
    for word in text.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        if key in _COUNTS or key in _OPTIONS:
            groups.append((key, value, []))
            continue
        known = _OPTIONS.get(groups[-1][0], ()) if groups else ()
        if not equals or key not in known:
            where = f" of {groups[-1][0]}" if groups else ""
            raise InputError(f"{word.strip()!r} in {text!r} is not a target or an option{where}", fix=FORMS)
        if key in dict(groups[-1][2]):
            raise InputError(f"{text!r} gives {key} of {groups[-1][0]} twice", fix="give it once")
        groups[-1][2].append((key, value))
    return groups


def _whole(key: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
        raise InputError(f"{key}={text} is no number of {key}", fix=f"give a whole number above 0: {key}=8")
    return int(text)


def _check_once(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"the target {', '.join(twice)} is given twice", fix="give each once")
