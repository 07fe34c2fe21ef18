"""Losses of masks, each paid for once: remembered, journalled as they are known, counted, reported.

For whoever asks an objective: the driver of the searches, and criteria that are defined by losses.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from blockpruner.artifacts import Estimate, Work
from blockpruner.blocks import Mask, format_mask, parse_mask
from blockpruner.journal import Journal
from blockpruner.searching.contract import Losses, Objective, Progress, Values


class Evaluations:
    """What an objective says of masks; a journal answers what it holds, and is given the rest as it is known.

    The journal's identity must hold all that a loss depends on: model, data, micro-batch size, dtype, versions.
    progress: called with (done, total, message), in masks times micro-batches, before the first evaluation that the
    journal does not answer and after each one; total may be a bound.
    """

    def __init__(
        self,
        objective: Objective,
        journal: Journal | None = None,
        progress: Progress | None = None,
        total: int = 0,
    ) -> None:
        self.objective = objective
        self.known: dict[Mask, Estimate | None] = {}
        self.work = Work()
        self.total = total
        self._journal = journal
        self._memo = {} if journal is None else _recall(journal)
        self._progress = progress
        self._announced = False
        self._done = 0
        # What was asked for in this run, whether remembered or not: the figures of a resumed run are those of an
        # undisturbed one.
        self._counted: set[tuple[Mask, int]] = set()
        self._masks: set[Mask] = set()

    def losses(self, masks: Iterable[Mask], message: str) -> Losses:
        """The mean loss of each mask over all units, with its standard error; None if that of a unit is not finite."""
        masks = tuple(dict.fromkeys(masks))
        fresh = [mask for mask in masks if mask not in self.known]
        self._evaluate(fresh, range(self.objective.batches), message)
        self.known |= {mask: estimate(self.values(mask), self.objective.unit) for mask in fresh}
        return {mask: self.known[mask] for mask in masks}

    def values(self, mask: Mask) -> Values:
        """The loss of each unit without `mask`, which `losses` was asked for before."""
        return self._units(self._held(mask, range(self.objective.batches)))

    def part(self, masks: Iterable[Mask], batch: int, message: str) -> dict[Mask, Values]:
        """The losses of the units of one micro-batch alone, by mask; for estimates that sample the data."""
        return {mask: self._units(values) for mask, values in self.pieces(masks, [batch], message).items()}

    def partly(self, masks: Iterable[Mask], batches: Sequence[int], message: str) -> Losses:
        """The mean loss of each mask over the units of these micro-batches alone, with its standard error."""
        found = self.pieces(masks, batches, message)
        return {mask: estimate(self._units(values), self.objective.unit) for mask, values in found.items()}

    def pieces(self, masks: Iterable[Mask], batches: Sequence[int], message: str) -> dict[Mask, Values]:
        """The values of each mask on these micro-batches, one after the other: as the objective gives them."""
        masks = tuple(dict.fromkeys(masks))
        self._evaluate(masks, batches, message)
        return {mask: self._held(mask, batches) for mask in masks}

    def loss(self, mask: Mask) -> Estimate | None:
        """The mean loss of `mask` over all units if all were asked for by now, else None; None if not finite, too."""
        if mask not in self.known and all((mask, batch) in self._counted for batch in range(self.objective.batches)):
            self.known[mask] = estimate(self.values(mask), self.objective.unit)
        return self.known.get(mask)

    def evaluated(self, more: Iterable[Mask]) -> int:
        """How many masks were evaluated, in part or in whole, or would be with `more`."""
        return len(self._masks.union(more))

    @property
    def looks(self) -> int:
        """How many masks were evaluated, each as often as on micro-batches."""
        return len(self._counted)

    def _evaluate(self, masks: Sequence[Mask], batches: Sequence[int], message: str) -> None:
        """Have all of these remembered, and counted as asked for in this run."""
        fresh = {batch: [mask for mask in masks if (mask, batch) not in self._counted] for batch in batches}
        missing = {batch: [mask for mask in new if (mask, batch) not in self._memo] for batch, new in fresh.items()}
        self._done += sum(map(len, fresh.values())) - sum(map(len, missing.values()))
        self._sweep({batch: new for batch, new in missing.items() if new}, message)
        for batch, new in fresh.items():
            if new:
                self.work += self.objective.work(new, batch)
                self._counted |= {(mask, batch) for mask in new}
                self._masks |= set(new)

    def _sweep(self, asked: Mapping[int, Sequence[Mask]], message: str) -> None:
        if not asked:
            return
        ahead = self._done + sum(map(len, asked.values()))  # what was expected may be less
        self._report(message, ahead, first=True)
        for batch, mask, found in self.objective.losses(asked):
            values = tuple(map(float, found))
            if self._journal is not None:
                self._journal.append([_record(mask, batch, values)])
            self._memo[mask, batch] = values
            self._done += 1
            self._report(message, ahead)

    def _held(self, mask: Mask, batches: Sequence[int]) -> Values:
        return tuple(value for batch in batches for value in self._memo[mask, batch])

    def _units(self, values: Values) -> Values:
        """The loss of each unit from its pieces."""
        each = self.objective.pieces
        return values if each == 1 else tuple(fmean(values[at : at + each]) for at in range(0, len(values), each))

    def _report(self, message: str, ahead: int, *, first: bool = False) -> None:
        if self._progress is not None and not (first and self._announced):
            self._progress(self._done, max(ahead, self.total), message)
            self._announced = True


class Notes:
    """Intermediate results by name, for work that is no evaluation of a mask: from the journal, or made and noted."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._held = {r["note"]: r["value"] for r in journal.records if "note" in r} if journal else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The note `name`; `make` gives it as strict JSON (no NaN) where there is none yet."""
        if name not in self._held:
            value = make()
            if self._journal is not None:
                self._journal.append([{"note": name, "value": value}])
            self._held[name] = value
        return self._held[name]


def estimate(values: Sequence[float], unit: str) -> Estimate | None:
    """Their mean with its standard error; None if one is not finite, or their squares are not."""
    if not all(map(math.isfinite, values)):
        return None
    try:
        return Estimate.of(values, unit)
    except OverflowError:
        return None


def _record(mask: Mask, batch: int, losses: Sequence[float]) -> dict[str, object]:
    """The journal's record of one mask on one micro-batch; strict JSON has no NaN, so such a loss becomes text."""
    return {
        "mask": format_mask(mask),
        "batch": batch,
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
    }


def _recall(journal: Journal) -> dict[tuple[Mask, int], Values]:
    return {
        (parse_mask(record["mask"]), record["batch"]): tuple(map(float, record["losses"]))
        for record in journal.records
        if "mask" in record
    }
