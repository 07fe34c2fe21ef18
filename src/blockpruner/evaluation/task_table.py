"""What contestants made of tasks, item by item, and each beside the reference."""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.errors import CheckFailedError
from blockpruner.evaluation.paired import Comparison, compare, together


class Items(Record):
    """The items of one task in their order. docs: a digest of each; values: metric -> a number for each.

    The numbers go the way of their metric: of perplexities they are negative log-likelihoods, see `tasks`.
    """

    docs: tuple[str, ...]
    values: dict[str, tuple[float, ...]]


def usual_metric(wanted: str | None, metrics: Mapping[str, Estimate]) -> str:
    """The metric to look at: that which is wanted, if it is there, else acc_norm, acc, or the first."""
    return next(name for name in (wanted or "", "acc_norm", "acc", *metrics) if name in metrics)


class TaskResult(Record):
    """What one contestant made of one task.

    task: as asked for; ran: what the harness calls it; metric: the one to look at, among `metrics`; n: items.
    items: by task, several for a group; shots, limit, batch, harness (its version), dtype, computation: how it was run.
    definition: what says what the task is, see `Harness.definition`; higher_is_better: by metric, as the harness has
    it, None or not there where it does not say.
    """

    contestant: str
    task: str
    ran: str
    metric: str
    metrics: dict[str, Estimate]
    items: dict[str, Items]
    shots: int | None
    limit: int | None
    batch: int
    harness: str
    dtype: str
    computation: str
    definition: str = ""
    higher_is_better: dict[str, bool | None] = Field(default_factory=dict)

    def by(self, metric: str | None) -> Self:
        """The same, looked at by another metric."""
        return self.model_copy(update={"metric": usual_metric(metric, self.metrics)})

    @property
    def figure(self) -> Estimate:
        return self.metrics[self.metric]

    def column(self) -> dict[tuple[str, int, str], float]:
        """The values of `metric`, item by item; empty where the harness has no number for single items."""
        return {
            (leaf, number, doc): value
            for leaf, items in self.items.items()
            if self.metric in items.values
            for number, (doc, value) in enumerate(zip(items.docs, items.values[self.metric], strict=True))
        }


class TaskTable(Artifact):
    """Tasks of all contestants, the reference first. comparisons: contestant -> task -> beside the reference."""

    FORMAT: ClassVar[str] = "blockpruner.tasks"
    VERSION: ClassVar[int] = 1

    reference: str
    results: tuple[TaskResult, ...]
    comparisons: dict[str, dict[str, Comparison]]

    @classmethod
    def of(cls, reference: str, results: tuple[TaskResult, ...]) -> "TaskTable":
        """All results, with Holm's correction over the tasks of each contestant."""
        mine = {one.task: one for one in results if one.contestant == reference}
        names = dict.fromkeys(one.contestant for one in results if one.contestant != reference)
        found = {
            name: together(
                {
                    one.task: compared
                    for one in results
                    if one.contestant == name and one.task in mine and (compared := _beside(mine[one.task], one))
                }
            )
            for name in names
        }
        return cls(format=cls.FORMAT, version=cls.VERSION, reference=reference, results=results, comparisons=found)


def _beside(reference: TaskResult, other: TaskResult) -> Comparison | None:
    """None where single items have no numbers; CheckFailedError if the items are not the same."""
    mine, its = reference.column(), other.column()
    if reference.metric != other.metric or not mine or not its:
        return None
    if mine.keys() != its.keys():
        raise CheckFailedError(
            f"{reference.contestant} and {other.contestant} did not have the same items of {other.task}",
            fix="evaluate both again, in a new run folder",
        )
    direction = other.higher_is_better.get(other.metric)
    return compare(list(mine.values()), [its[key] for key in mine], higher_is_better=direction)
