"""Quality against size, cache and speed, over all depths of one or several plans: what is worth having."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.plan import Plan
from blockpruner.searching.costs import Costs, CostTable

if TYPE_CHECKING:
    from blockpruner.subject import Subject

Axis = Literal["parameters", "cache_bytes", "time"]
AXES: dict[Axis, str] = {"parameters": "parameters", "cache_bytes": "KV bytes per token", "time": "time, dense = 1"}
WITHIN = 0.1  # nats per token: a loss budget to begin with


class Point(Record):
    """A plan at one depth. removed: blocks; loss: None where it is not known; rise: of the loss over dense.

    parameters; cache_bytes: key/value bytes per token; time: share of the dense model's, by measured costs or counted
    operations (see `Pareto.time`), None where these are not known; best_in: axes on which no other point is at least
    as good in both loss and that. recovery: that of the search, with which its blocks were chosen; recovered: whether
    the loss is with what it put in their place, too, which parameters, cache and time leave out.
    """

    plan: str
    depth: int
    removed: int
    loss: Estimate | None
    rise: float | None
    parameters: int
    cache_bytes: int
    time: float | None
    best_in: tuple[Axis, ...] = ()
    recovery: str | None = None
    recovered: bool = False

    @property
    def title(self) -> str:
        """The plan, and what stands in the place of its blocks: plans with other recoveries are other models."""
        if self.recovery is None:
            return self.plan
        return f"{self.plan} + {self.recovery}" if self.recovered else f"{self.plan} (found with {self.recovery})"

    def on(self, axis: Axis) -> float | None:
        return {"parameters": self.parameters, "cache_bytes": self.cache_bytes, "time": self.time}[axis]


class Advice(Record):
    """Points to begin with on one axis, by their number. knee: farthest below the line between the ends of the front;

    within: the smallest whose loss is within the budget, None if none is.
    """

    axis: Axis
    knee: int | None
    within: int | None


class Pareto(Artifact):
    """All points, the dense model first. judged_by: the text or search that the losses are from; time: what it is."""

    FORMAT: ClassVar[str] = "blockpruner.pareto"
    VERSION: ClassVar[int] = 1

    model: str
    judged_by: str
    time: str
    budget: float
    points: tuple[Point, ...] = Field(min_length=1)
    advice: tuple[Advice, ...]

    @classmethod
    def of(cls, points: Sequence[Point], *, model: str, judged_by: str, time: str, budget: float = WITHIN) -> Self:
        """The points with their fronts, and advice for each axis that tells them apart."""
        axes: list[Axis] = [axis for axis in AXES if len({point.on(axis) for point in points} - {None}) > 1]
        fronts = {axis: front(points, axis) for axis in axes}
        marked = tuple(
            point.model_copy(update={"best_in": tuple(axis for axis in axes if place in fronts[axis])})
            for place, point in enumerate(points)
        )
        advice = tuple(
            Advice(axis=axis, knee=knee(points, fronts[axis], axis), within=within(points, axis, budget))
            for axis in axes
        )
        return cls(
            format=cls.FORMAT,
            version=cls.VERSION,
            model=model,
            judged_by=judged_by,
            time=time,
            budget=budget,
            points=marked,
            advice=advice,
        )


def front(points: Sequence[Point], axis: Axis) -> list[int]:
    """Numbers of the points that no other is at least as good as in both, and better in one; by rising cost."""
    known = pairs_on(points, axis)
    order = sorted(known, key=lambda place: known[place])
    found: list[int] = []
    for place in order:
        if not found or known[place][1] < known[found[-1]][1]:
            found.append(place)
    return found


def knee(points: Sequence[Point], places: Sequence[int], axis: Axis) -> int | None:
    """The point of a front that lies farthest below the line between its ends, both axes scaled to 0..1.

    None where the front has no point between its ends that lies below the line.
    """
    known = pairs_on(points, axis)
    if len(places) < 3:
        return None
    (x0, y0), (x1, y1) = known[places[0]], known[places[-1]]
    below = {place: 1 - (known[place][0] - x0) / (x1 - x0) - (known[place][1] - y1) / (y0 - y1) for place in places}
    best = max(below, key=below.__getitem__)
    return best if below[best] > 1e-9 else None


def within(points: Sequence[Point], axis: Axis, budget: float) -> int | None:
    """The cheapest point whose loss rises by at most `budget`; of equally cheap ones that of lowest loss."""
    known = pairs_on(points, axis)
    fitting = [place for place in known if (rise := points[place].rise) is not None and rise <= budget]
    return min(fitting, key=known.__getitem__, default=None)


def pairs_on(points: Sequence[Point], axis: Axis) -> dict[int, tuple[float, float]]:
    """(cost, loss) of the points that have both."""
    pairs = {place: (point.on(axis), point.loss) for place, point in enumerate(points)}
    return {place: (cost, loss.value) for place, (cost, loss) in pairs.items() if cost is not None and loss is not None}


def depths(plan: Plan) -> list[int]:
    """The numbers of steps at which `plan` is a plan, from 1 on."""
    return list(range(1, len(plan.steps) + 1)) if plan.nested else [len(plan.steps)] * bool(plan.steps)


def pareto_of(
    subject: "Subject",
    plans: Mapping[str, Plan],
    *,
    costs: Costs | None = None,
    judge: Callable[[Mapping[str, Mask]], Mapping[str, Estimate]] | None = None,
    judged_by: str = "",
    budget: float = WITHIN,
) -> Pareto:
    """The points of all depths of `plans`, by name, on the model of `subject`.

    costs: of the blocks, in seconds; without them, time is the share of operations that was counted. judge: evaluates
    masks by name, all on one text and without recoveries; without it, the losses are those that the plans recorded,
    with the recoveries of their searches, as the points say.
    InputError if these are from different data, so that they do not compare.
    """
    masks = {("dense", 0): frozenset[Any]()}
    masks |= {(name, depth): plan.mask(depth) for name, plan in plans.items() for depth in depths(plan)}
    if judge is None:
        judged_by = _same_judge(plans)
        recorded = {(name, depth): plan.steps[depth - 1].loss for name, plan in plans.items() for depth in depths(plan)}
        losses: Mapping[tuple[str, int], Estimate | None] = {("dense", 0): _dense(plans), **recorded}
    else:
        found = judge({f"{name} {depth}": mask for (name, depth), mask in masks.items()})
        losses = {key: found[f"{key[0]} {key[1]}"] for key in masks}
    dense = losses["dense", 0]
    recoveries = {name: plan.method and plan.method.recovery for name, plan in plans.items()}
    points = [
        _point(subject, key, mask, losses[key], dense, costs, recoveries.get(key[0]) if mask else None, judge is None)
        for key, mask in masks.items()
    ]
    counted = "share of the operations of a short pass, with the head at every position"
    time = counted if costs is None else f"seconds, {costs.source}"
    return Pareto.of(points, model=subject.identity.name, judged_by=judged_by, time=time, budget=budget)


def _point(
    subject: "Subject",
    key: tuple[str, int],
    mask: Mask,
    loss: Estimate | None,
    dense: Estimate | None,
    costs: Costs | None,
    recovery: str | None,
    recorded: bool,
) -> Point:
    anatomy = subject.anatomy
    shares = [anatomy.parts[block].compute for block in sorted(mask, key=lambda block: block.order)]
    share = None if None in shares else 1 - math.fsum(share for share in shares if share is not None)
    return Point(
        plan=key[0],
        depth=key[1],
        removed=len(mask),
        loss=loss,
        rise=None if loss is None or dense is None else loss.value - dense.value,
        parameters=anatomy.total_parameters - anatomy.outline.removed_parameters(mask),
        cache_bytes=anatomy.cache_bytes(mask),
        time=share if costs is None else costs.left(anatomy.outline, mask) / costs.whole,
        recovery=recovery,
        recovered=recovery is not None and recorded,
    )


def _dense(plans: Mapping[str, Plan]) -> Estimate | None:
    return next((plan.dense_loss for plan in plans.values() if plan.dense_loss is not None), None)


def _same_judge(plans: Mapping[str, Plan]) -> str:
    """What the recorded losses are from; InputError if from different data or measures.

    A search with a recovery fits it on one half of its text, and has losses of the other half alone.
    """
    judges = {
        (plan.calibration or {}).get("fingerprint") or name: (plan.calibration or {}).get("source")
        for name, plan in plans.items()
    }
    measures = {plan.method.objective for plan in plans.values() if plan.method is not None}
    halves = {plan.method is not None and plan.method.recovery is not None for plan in plans.values()}
    if len(judges) > 1 or len(measures) > 1 or len(halves) > 1:
        alike = len(judges) == len(measures) == 1
        half = " (with a recovery, they are of half the text)" if alike else ""
        raise InputError(
            f"the losses of {', '.join(plans)} are from different data or objectives{half}, so they do not compare",
            fix="add --data SOURCE, to evaluate all of them on one text, without recoveries",
        )
    if all(step.loss is None for plan in plans.values() for step in plan.steps):
        raise InputError(f"{', '.join(plans)} recorded no losses", fix="add --data SOURCE, to evaluate them")
    return f"the search's own text ({next(iter(judges.values())) or 'not named'}), which chose the blocks"


def plan_file(name: str) -> Path:
    """The plan in a run folder, or the file itself; InputError if there is none."""
    file = Path(name) / "plan.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise InputError(f"there is no plan at {file}", fix="give a run folder with plan.json, or a plan file")
    return file


def _costs_beside(file: Path, plans: Mapping[str, Plan]) -> dict[str, Costs]:
    """Costs that were measured for the model of these plans, their workload in the source."""
    table = CostTable.load(file)
    if any(plan.model is not None and plan.model.fingerprint != table.model for plan in plans.values()):
        raise InputError(f"{file} has costs of another model", fix="remove that file")
    where = f"{table.dtype}, {table.device}"
    found = {key: record.costs() for key, record in table.workloads.items()}
    return {key: replace(one, source=f"{key}: {one.source} ({where})") for key, one in found.items()}


def read_plans(names: Sequence[str], outline: Any) -> tuple[dict[str, Plan], dict[str, Costs]]:
    """The plans in run folders or files, by their names, and the costs that lie beside them by workload."""
    plans: dict[str, Plan] = {}
    costs: dict[str, Costs] = {}
    for name in names:
        path, file = Path(name), plan_file(name)
        plans[path.name if path.is_dir() else path.stem if path.stem != "plan" else path.parent.name or name] = (
            Plan.read(file, outline)
        )
        table = file.parent / "costs.json"
        if table.is_file():
            costs |= _costs_beside(table, plans)
    if len(costs) > 1:
        raise InputError(
            f"the plans have costs of different workloads: {'; '.join(costs)}",
            fix="weigh plans of one workload, or have times computed with --device-spec",
        )
    if len(plans) < len(names):
        raise InputError("two plans go by one name", fix="give folders or files of different names")
    return plans, costs
