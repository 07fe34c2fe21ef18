"""Losses of masks, each paid for once: remembered, journalled as they are known, counted, reported.

For whoever asks an objective: the driver of the searches, and criteria that are defined by losses.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from blockpruner.artifacts import Estimate, Work
from blockpruner.blocks import Mask, format_mask, parse_mask
from blockpruner.journal import Journal
from blockpruner.searching import Losses, Objective, Progress

Values = tuple[float, ...]


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
        for batch in range(self.objective.batches):
            self.part(fresh, batch, message)
        self.known |= {mask: estimate(self.values(mask), self.objective.unit) for mask in fresh}
        return {mask: self.known[mask] for mask in masks}

    def values(self, mask: Mask) -> Values:
        """The loss of each unit without `mask`, which `losses` was asked for before."""
        return tuple(loss for batch in range(self.objective.batches) for loss in self._memo[mask, batch])

    def part(self, masks: Iterable[Mask], batch: int, message: str) -> dict[Mask, Values]:
        """The losses of the units of one micro-batch alone, by mask; for estimates that sample the data."""
        masks = tuple(dict.fromkeys(masks))
        self._sweep(masks, batch, message)
        fresh = [mask for mask in masks if (mask, batch) not in self._counted]
        if fresh:
            self.work += self.objective.work(fresh, batch)
            self._counted |= {(mask, batch) for mask in fresh}
            self._masks |= set(fresh)
        return {mask: self._memo[mask, batch] for mask in masks}

    def partly(self, masks: Iterable[Mask], batches: Sequence[int], message: str) -> Losses:
        """The mean loss of each mask over the units of these micro-batches alone, with its standard error."""
        masks = tuple(dict.fromkeys(masks))
        parts = [self.part(masks, batch, message) for batch in batches]
        return {mask: estimate([loss for part in parts for loss in part[mask]], self.objective.unit) for mask in masks}

    def evaluated(self, more: Iterable[Mask]) -> int:
        """How many masks were evaluated, in part or in whole, or would be with `more`."""
        return len(self._masks.union(more))

    def _sweep(self, masks: Sequence[Mask], batch: int, message: str) -> None:
        missing = [mask for mask in masks if (mask, batch) not in self._memo]
        self._done += len(masks) - len(missing)
        if missing:
            self._report(message, first=True)
        for mask, losses in zip(missing, self.objective.losses(missing, batch) if missing else (), strict=True):
            found = tuple(map(float, losses))
            if self._journal is not None:
                self._journal.append([_record(mask, batch, found)])
            self._memo[mask, batch] = found
            self._done += 1
            self._report(message)

    def _report(self, message: str, *, first: bool = False) -> None:
        if self._progress is not None and not (first and self._announced):
            self._progress(self._done, max(self._done, self.total), message)
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
