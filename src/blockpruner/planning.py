"""From words to a plan: a search that is ready to run, and what it finds."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

from blockpruner.artifacts import Estimate, Traffic, run_folder
from blockpruner.blocks import Mask, Move
from blockpruner.criteria import CRITERIA, parse_criterion
from blockpruner.data import Data, identity, read_data
from blockpruner.engine.hands import Crew
from blockpruner.engine.limits import usual_window
from blockpruner.engine.objective import ModelObjective
from blockpruner.engine.workers import spread
from blockpruner.errors import InputError
from blockpruner.evaluation.costing import bound, table_of
from blockpruner.importance.criterion import Criterion, Lab
from blockpruner.journal import Journal
from blockpruner.objectives import OBJECTIVES, parse_objective
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.recoveries import parse_recovery
from blockpruner.registry import format_method
from blockpruner.replaceable import Replacing
from blockpruner.scores import Recorded
from blockpruner.searches import SEARCHES, parse_search, races
from blockpruner.searching import driver
from blockpruner.searching.contract import Problem, Progress, Scorer, Scores, Search, SearchResult, Stop
from blockpruner.searching.costs import parse_card
from blockpruner.searching.evaluations import Evaluations, Notes
from blockpruner.searching.moves import check_granularity, format_protected, parse_protected
from blockpruner.searching.racing import WINDOW
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.searching.targets import Goals, Speed, parse_target
from blockpruner.subject import Subject
from blockpruner.texts.calibration import TextOptions
from blockpruner.texts.examples import Examples

log = logging.getLogger("blockpruner")

# What searches see of the data at once, or one window if that is longer, and how fine: races begin with two of these.
BATCH_TOKENS, SEGMENT = 512, 128


@dataclass(frozen=True)
class Task:
    """A search with all that it needs."""

    subject: Subject
    data: Data
    objective: ModelObjective
    problem: Problem
    search: Search
    criterion: Criterion
    seed: int
    replacing: Replacing | None = None

    def scorer(self, notes: Notes, progress: Progress | None) -> Callable[[Evaluations], Scorer]:
        """What scores moves for searches that rank them, by the criterion of the run."""
        model, anatomy = self.subject.model, self.subject.anatomy

        def make(evaluations: Evaluations) -> Scorer:
            def scorer(mask: Mask, moves: Sequence[Move]) -> Scores:
                lab = Lab(model, anatomy, self.data.examples, evaluations, notes, mask, progress)
                return self.criterion.scores(lab, moves)

            return scorer

        return make

    @property
    def cut_short(self) -> bool:
        """Whether a rise of the loss may end the search earlier than is rehearsed: made-up losses do not tell when."""
        return isinstance(self.problem.target, Goals) and self.problem.target.rise is not None

    @cached_property
    def rehearsed(self) -> "Rehearsed":
        """The search on an objective that costs nothing, as long as it can be: no loss of it rises beyond a target."""
        passes, moved = list[float](), list[Traffic]()

        def scorer(evaluations: Evaluations) -> Scorer:
            def free(mask: Mask, moves: Sequence[Move]) -> Scores:
                lab = Lab(self.subject.model, self.subject.anatomy, self.data.examples, evaluations, mask=mask)
                passes.append(self.criterion.cost(lab, moves))
                return dict.fromkeys(moves, Estimate(value=0.0, stderr=None, n=0, unit="nothing"))

            return free

        target, problem = self.problem.target, self.problem
        if isinstance(target, Goals) and target.rise is not None:  # what it takes to see how far it rose still counts
            problem = replace(problem, target=replace(target, rise=math.inf))
        free = Rehearsal(self.objective, told=lambda asked: moved.append(self.objective.traffic(asked)))
        result = driver.run(self.search, problem, free, scorer=scorer, keep=False)
        return Rehearsed(result, sum(passes), sum(moved, Traffic()))


@dataclass(frozen=True)
class Rehearsed:
    """A search that was only counted. passes: over all data, that its criterion would take beside evaluations; moved:
    what these would."""

    result: SearchResult
    passes: float
    moved: Traffic


def prepare(
    subject: Subject,
    *,
    target: str,
    calibration: str,
    search: str = "greedy",
    criterion: str | Criterion | None = None,
    objective: str = "loss",
    moves: str = "block",
    protect: str = "",
    start: Plan | None = None,
    recovery: str | None = None,
    device_spec: str | None = None,
    costs: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Task:
    """Read the words of the command line into a search that is ready to run; InputError for each that is not right.

    criterion: for searches that rank, cosine if left out; start: an earlier plan, for searches that go on from one;
    recovery: in closed form, with which each mask is scored, see `replaceable`. Searches that race take windows of
    WINDOW tokens unless others are named. For targets of speed: device_spec, a card that times are computed for; costs,
    a file of times that were measured before; progress of measuring them now.
    """
    wanted, card = parse_target(target), parse_card(device_spec) if device_spec else None
    outline = subject.anatomy.outline
    begun = () if start is None else tuple(Move.of(*step.blocks) for step in start.steps)
    method = parse_search(search, seed=seed, streamed=subject.memory is not None)
    measure = parse_objective(objective, seed=seed)
    if criterion is not None and not method.ranks:
        raise _unused("--criterion", search, [name for name, kind in SEARCHES.items() if kind.ranks])
    if start is not None and not method.starts:
        raise _unused("--from", search, [name for name, kind in SEARCHES.items() if kind.starts])
    if card and not any(isinstance(limit, Speed) for limit in wanted.limits):
        raise InputError(f"{wanted} makes no use of --device-spec", fix="leave it out, or add speed=1.3x:decode")
    goal = bound(wanted, subject, card=card, table=costs, progress=progress)
    problem = Problem(outline, moves, goal, parse_protected(protect, outline), start=begun)
    named = "cosine" if criterion is None else criterion
    ranks = _criterion(named, subject.identity, seed) if isinstance(named, str) else named
    if goal.endless and not method.nested:
        raise InputError(
            f"{goal} is the end of a search that goes step by step, and {method.title!r} is none",
            fix="use --search greedy, exhaustive or one-shot, or add a target of size or speed",
        )
    if method.ranks:
        subject.check_criterion(ranks)
    if races(method) and measure.reads != "items":
        window = text.get("window") or min(WINDOW, usual_window(subject.model))
        if window > WINDOW:
            log.warning("races take pieces of a window to be independent: with windows of %d they err more", window)
        text = {**text, "window": window}
    data = read_data(subject, calibration, measure, seed=seed, **text)
    inside = None if recovery is None else replacing(subject, recovery, data.examples)
    seen = data if inside is None else replace(data, examples=inside.held_out)
    ready = seen.objective(subject, measure, inside, batch_tokens=BATCH_TOKENS, segment=SEGMENT)
    problem = replace(problem, sizes=ready.sizes, unit=ready.unit)
    return Task(subject, data, ready, problem, method, ranks, seed, inside)


def _unused(option: str, search: str, searches: Sequence[str]) -> InputError:
    """What to say of an option that would make no difference."""
    *most, last = searches
    return InputError(
        f"--search {search} makes no use of {option}", fix=f"leave it out, or use --search {', '.join(most)} or {last}"
    )


def replacing(subject: Subject, recovery: str, examples: Examples) -> Replacing:
    """The recovery of this name for a search; InputError where it cannot be inside one, or the weights are streamed."""
    if subject.memory is not None:
        raise InputError(
            "replacements are fitted on forward passes to every layer, for which weights are not streamed",
            fix="leave out --stream, or --recovery",
        )
    return Replacing.of(subject.model, subject.anatomy, parse_recovery(recovery), examples)


def check_words(
    *,
    target: str,
    search: str = "greedy",
    criterion: str | None = None,
    objective: str = "loss",
    moves: str = "block",
    recovery: str | None = None,
    device_spec: str | None = None,
    **_: object,
) -> None:
    """InputError for a word that `prepare` does not know, whatever the model."""
    parse_target(target)
    parse_search(search)
    parse_objective(objective)
    check_granularity(moves)
    if criterion is not None:
        _criterion(criterion)
    if recovery is not None:
        parse_recovery(recovery)
    if device_spec is not None:
        parse_card(device_spec)


def _criterion(text: str, model: ModelIdentity | None = None, seed: int = 0) -> Criterion:
    """A criterion by its name, or the scores in a file of that name: `scores.json`, `scores.json:cosine`."""
    if file := re.fullmatch(r"(.+\.json)(?::(.+))?", text):
        return Recorded.read(Path(file[1]), model, file[2])
    return parse_criterion(text, seed=seed)


def find_plan(
    task: Task,
    run: Path | None = None,
    progress: Progress | None = None,
    budget: int | None = None,
    crew: Crew | None = None,
) -> Plan:
    """Search, and leave journal.jsonl and plan.json in the run folder; a killed run resumes when it is called again.

    Without a run folder nothing is written. budget: evaluations at most. Ctrl-C ends in the plan of what was found by
    then, whose stop_reason says so. crew: workers that find the losses; the plan is the same.
    InputError where workers are to find losses with replacements.
    RunFolderError when the folder is in use, or was begun with another model, data, method or version.
    """
    if crew and task.replacing:
        raise InputError(
            "workers do not fit replacements", fix="leave out --workers, or --recovery and recover after the search"
        )
    with ExitStack() as held:
        sources = [task.subject.folder] if task.subject.folder else []
        folder = held.enter_context(run_folder(run, sources=sources)) if run else None
        if task.replacing:
            held.callback(task.replacing.close)
        objective = held.enter_context(spread(task.objective, crew))
        journal = held.enter_context(Journal.open(folder / "journal.jsonl", _identity(task))) if folder else None
        table = table_of(task.problem.target, task.subject)
        if folder and table:
            table.save(folder / "costs.json")  # which the same search must go by when it resumes
        result = driver.run(
            task.search,
            task.problem,
            objective,
            journal=journal,
            progress=progress,
            budget=budget,
            looks=task.rehearsed.result.looks if progress else None,
            scorer=task.scorer(Notes(journal), progress),
        )
        plan = Plan.from_search(
            replace(result, work=result.work + task.objective.drawing()[0]),
            search=task.search,
            criterion=format_method(task.criterion, CRITERIA) if task.search.ranks else None,
            problem=task.problem,
            objective=format_method(task.objective.measure, OBJECTIVES),
            recovery=task.replacing and task.replacing.text,
            windows=task.replacing and task.replacing.windows,
            seed=task.seed,
            dtype=task.subject.dtype,
            model=task.subject.identity,
            calibration=task.data.record.model_dump(mode="json"),
        )
        if folder:
            plan.save(folder / "plan.json")
    _check_reached(task, result)
    return plan


def _check_reached(task: Task, result: SearchResult) -> None:
    """InputError, with the nearest that there is, if the loss ended the search before the other targets were met."""
    target, outline = task.problem.target, task.problem.outline
    if result.stop_reason != Stop.LOSS or not isinstance(target, Goals) or (target.endless and result.steps):
        return
    mask: Mask = frozenset().union(*(step.move.blocks for step in result.steps))
    had = target.had(outline, mask)
    raise InputError(
        f"{target} cannot be had: within that loss this search removes {len(mask)} blocks{had and f' ({had})'}",
        fix="allow more loss, ask for less, or try another search; the steps so far are in plan.json",
    )


def _identity(task: Task) -> dict[str, str]:
    """All that the journal's losses, and what is decided by them, depend on.

    Not the target: a search may go on to a deeper one.
    """
    return {
        **identity(task.subject, task.data, task.objective, task.seed),
        "search": format_method(task.search, SEARCHES),
        **({"criterion": format_method(task.criterion, CRITERIA)} if task.search.ranks else {}),
        **({"recovery": task.replacing.identity} if task.replacing else {}),
        **({"begun from": "+".join(map(str, task.problem.start))} if task.problem.start else {}),
        "moves": task.problem.granularity,
        "protected": ",".join(format_protected(task.problem.protected)),
    }
