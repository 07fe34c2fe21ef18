"""The story of a pruned model, start reading here: prepare a search, say its price, run it, save what is left."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from blockpruner import driver
from blockpruner.artifacts import Work, run_folder
from blockpruner.blocks import Mask
from blockpruner.calibration import TextOptions
from blockpruner.checkpoint import Form, Saved, save_pruned
from blockpruner.data import Data, identity, read_data
from blockpruner.journal import Journal
from blockpruner.moves import Target, format_protected, parse_protected
from blockpruner.objective import ModelObjective
from blockpruner.objectives import OBJECTIVES, parse_objective
from blockpruner.plan import Plan
from blockpruner.registry import format_method
from blockpruner.searches import SEARCHES, parse_search
from blockpruner.searching import Problem, Progress, Search
from blockpruner.subject import Subject


@dataclass(frozen=True)
class Task:
    """A search with all that it needs."""

    subject: Subject
    data: Data
    objective: ModelObjective
    problem: Problem
    search: Search
    seed: int


def prepare(
    subject: Subject,
    *,
    target: str,
    calibration: str,
    search: str = "greedy",
    objective: str = "loss",
    moves: str = "block",
    protect: str = "",
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Task:
    """Read the words of the command line into a search that is ready to run; InputError for each that is not right."""
    outline = subject.anatomy.outline
    problem = Problem(outline, moves, Target.parse(target), parse_protected(protect, outline))
    method, measure = parse_search(search, seed=seed), parse_objective(objective)
    data = read_data(subject, calibration, measure, seed=seed, **text)
    return Task(subject, data, data.objective(subject, measure), problem, method, seed)


@dataclass(frozen=True)
class Price:
    """What a search will cost. evaluations: masks; work: counted tokens; seconds: from one timed pass here.

    All are those of a rehearsal in which the first candidate always wins; the true counts differ a little.
    """

    evaluations: int
    work: Work
    seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """An objective that costs nothing, finds all masks equal, and counts what they would have cost."""

    objective: ModelObjective
    unit: str = "nothing"

    @property
    def batches(self) -> int:
        return self.objective.batches

    def losses(self, masks: Sequence[Mask], batch: int) -> list[tuple[float, ...]]:
        return [(0.0,)] * len(masks)

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        return self.objective.work(masks, batch)


def quote(task: Task) -> Price:
    """The price of a search, said before it starts. Cost: one timed pass over one micro-batch."""
    result = driver.run(task.search, task.problem, Rehearsal(task.objective))
    return Price(result.evaluations, result.work, task.objective.seconds(result.work))


def find_plan(task: Task, run: Path | None = None, progress: Progress | None = None, budget: int | None = None) -> Plan:
    """Search, and leave journal.jsonl and plan.json in the run folder; a killed run resumes when it is called again.

    Without a run folder nothing is written. budget: evaluations at most. Ctrl-C ends in the plan of the steps so far,
    whose stop_reason says so.
    RunFolderError when the folder is in use, or was begun with another model, data, method or version.
    """
    with ExitStack() as held:
        sources = [task.subject.folder] if task.subject.folder else []
        folder = held.enter_context(run_folder(run, sources=sources)) if run else None
        journal = held.enter_context(Journal.open(folder / "journal.jsonl", _identity(task))) if folder else None
        result = driver.run(
            task.search, task.problem, task.objective, journal=journal, progress=progress, budget=budget
        )
        plan = Plan.from_search(
            result,
            search=task.search,
            problem=task.problem,
            objective=format_method(task.objective.measure, OBJECTIVES),
            seed=task.seed,
            dtype=task.subject.dtype,
            model=task.subject.identity,
            calibration=task.data.record.model_dump(mode="json"),
        )
        if folder:
            plan.save(folder / "plan.json")
    return plan


def _identity(task: Task) -> dict[str, str]:
    """All that the journal's losses, and what is decided by them, depend on.

    Not the target: a search may go on to a deeper one.
    """
    return {
        **identity(task.subject, task.data, task.objective, task.seed),
        "search": format_method(task.search, SEARCHES),
        "moves": task.problem.granularity,
        "protected": ",".join(format_protected(task.problem.protected)),
    }


def save_subject(
    subject: Subject,
    plan: Plan,
    out: Path,
    *,
    first: int | None = None,
    form: Form | None = None,
    source: str = "the plan",
) -> Saved:
    """Write the model without the blocks of `plan`, or of its `first` steps, to the new folder `out`.

    Those steps go beside the weights as plan.json; all is reloaded and compared, see `checkpoint.save_pruned`.
    InputError, naming `source`, if the plan is not for this model.
    """
    plan.check(subject.anatomy.outline, subject.identity, source)
    mask = plan.mask(first)
    taken = plan if first is None else plan.cut(first)
    return save_pruned(
        subject.model,
        subject.given_tokenizer,
        subject.anatomy,
        mask,
        out,
        form=form,
        source=subject.folder,
        extra_files={"plan.json": taken.model_dump_json(indent=2).encode() + b"\n"},
    )
