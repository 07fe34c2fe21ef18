"""Which blocks stand in for each other, from the losses of pairs that a search has evaluated anyway."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Self

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask, Move, parse_mask
from blockpruner.evaluation.explanation import Interaction
from blockpruner.journal import read_journal
from blockpruner.plan import Plan
from blockpruner.searching.contract import DENSE, Values

LEVEL = 0.05
BROKEN = 1.0  # nats per token: a model that loses so much by one move is another one


@dataclass(frozen=True)
class Seen:
    """The losses in a journal: mask -> micro-batch -> its values there, `pieces` for each window, window by window.

    model: its fingerprint; objective: as on the command line.
    """

    values: Mapping[Mask, Mapping[int, Values]]
    pieces: int
    model: str
    objective: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those of a run's journal; InputError if it is none, or damaged."""
        identity, records = read_journal(path)
        values: dict[Mask, dict[int, Values]] = {}
        for record in records:
            if "mask" in record:
                found = tuple(map(float, record["losses"]))
                values.setdefault(parse_mask(record["mask"]), {})[record["batch"]] = found
        pieces = int(identity.get("values per window", "1"))
        return cls(values, pieces, identity.get("model", ""), identity.get("objective", ""))


def interaction(seen: Seen, given: Mask, one: Move, other: Move, unit: str) -> Interaction | None:
    """Of `one` with its partner `other` on top of `given`, over the windows that all four masks were seen on.

    None if there is no such window, or a loss there is not finite.
    """
    both = (given | one.blocks | other.blocks, given | one.blocks, given | other.blocks, given)
    if any(mask not in seen.values for mask in both):
        return None
    together, first, second, neither = (seen.values[mask] for mask in both)
    values, rises = list[float](), list[float]()
    for batch in sorted(together.keys() & first.keys() & second.keys() & neither.keys()):
        pieces = list(zip(together[batch], first[batch], second[batch], neither[batch], strict=True))
        for at in range(0, len(pieces), seen.pieces):
            ab, a, b, none = map(fmean, zip(*pieces[at : at + seen.pieces], strict=True))
            values.append(ab - a - b + none)
            rises.append(b - none)
    if not values or not all(map(math.isfinite, values)):
        return None
    gone = tuple(map(str, sorted(given, key=lambda block: block.order)))
    return Interaction(partner=str(other), given=gone, rise=fmean(rises), value=Estimate.of(values, unit))


def partners(seen: Seen, plan: Plan) -> list[tuple[Interaction, ...]]:
    """Per step its interactions with every other move that the plan tells of, the highest first.

    Given is what was gone when the two were last both there, as the plan went: so a pair of a step with a move that
    stayed is given all steps before it. Where that was not evaluated (searches that do not try every move at every
    step), it is the nearest earlier state that was.
    """
    moves = [Move.of(*step.blocks) for step in plan.steps]
    others = dict.fromkeys([*moves, *(Move.parse(text) for step in plan.steps for text in step.scores)])
    states = [DENSE, *accumulate((move.blocks for move in moves), lambda gone, more: gone | more)]
    unit = plan.dense_loss.unit if plan.dense_loss else "of the search's loss"
    found = []
    for move in moves:
        pairs = [_latest(seen, states, move, other, unit) for other in others if not move.blocks & other.blocks]
        found.append(tuple(sorted(filter(None, pairs), key=lambda pair: -pair.value.value)))
    return found


def strongest(pairs: Sequence[Interaction], broken: float = BROKEN) -> list[Interaction]:
    """Those that are there by a t test at LEVEL, divided by the number of pairs (Bonferroni); the largest first.

    Left out are partners that break the model by themselves: whose rise is above `broken`.
    """
    from scipy.special import stdtr

    def sure(value: Estimate) -> bool:
        if not value.stderr:  # of windows that are all alike nothing follows for others
            return False
        return 2 * float(stdtr(value.n - 1, -abs(value.value) / value.stderr)) * len(pairs) <= LEVEL

    found = [pair for pair in pairs if pair.rise <= broken and sure(pair.value)]
    return sorted(found, key=lambda pair: -abs(pair.value.value))


def _latest(seen: Seen, states: Sequence[Mask], one: Move, other: Move, unit: str) -> Interaction | None:
    both = one.blocks | other.blocks
    found = (interaction(seen, given, one, other, unit) for given in reversed(states) if not given & both)
    return next((pair for pair in found if pair is not None), None)
