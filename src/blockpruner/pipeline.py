"""The story of a pruned model, start reading here: open a model, prepare a search, say its price, run it, save."""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner import driver
from blockpruner.anatomy import read_anatomy
from blockpruner.artifacts import Work, run_folder
from blockpruner.blocks import Mask
from blockpruner.calibration import Calibration, load_calibration
from blockpruner.checkpoint import Form, Saved, save_pruned
from blockpruner.errors import InputError
from blockpruner.journal import Journal
from blockpruner.models import LoadedModel, computation, identify
from blockpruner.moves import Target, format_protected, parse_protected
from blockpruner.objective import LossObjective, usual_window
from blockpruner.parts import Anatomy
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.registry import format_method, lookup
from blockpruner.searches import SEARCHES, parse_search
from blockpruner.searching import Problem, Progress, Search

OBJECTIVES = {"loss": LossObjective}


@dataclass(frozen=True)
class Subject:
    """A model taken apart and known by its fingerprint; folder: where its files are, which nothing writes into."""

    model: PreTrainedModel
    given_tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    identity: ModelIdentity
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What reads text for the model; InputError if the model came without one."""
        if self.given_tokenizer is None:
            raise InputError(
                f"{self.identity.name} has no tokenizer, so it cannot read text",
                fix="put its tokenizer files beside its weights",
            )
        return self.given_tokenizer


def open_subject(loaded: LoadedModel) -> Subject:
    """Prove the anatomy of a loaded model."""
    return subject_of(loaded.model, loaded.tokenizer, loaded.name, loaded.folder)


def subject_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, folder: Path | None = None
) -> Subject:
    """Prove the anatomy of a model in memory; `name` may be a path, of which the last part is kept."""
    return Subject(model, tokenizer, read_anatomy(model), identify(model, name), folder)


@dataclass(frozen=True)
class Task:
    """A search with all that it needs."""

    subject: Subject
    calibration: Calibration
    objective: LossObjective
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
    tokens: int | None = 16384,
    window: int | None = None,
    bos: str = "auto",
    split: str | None = None,
    column: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Task:
    """Read the words of the command line into a search that is ready to run; InputError for each that is not right.

    tokens: None takes all the text there is; window: None takes 2048, or the model's context if that is shorter.
    """
    outline = subject.anatomy.outline
    problem = Problem(outline, moves, Target.parse(target), parse_protected(protect, outline))
    method = parse_search(search, seed=seed)
    minimised = lookup(objective, OBJECTIVES, "objective")
    data = load_calibration(
        calibration,
        subject.tokenizer,
        window=window or usual_window(subject.model),
        tokens=tokens,
        seed=seed,
        bos=bos,
        split=split,
        column=column,
        quiet=quiet,
    )
    return Task(subject, data, minimised(subject.model, subject.anatomy, data.windows), problem, method, seed)


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

    objective: LossObjective
    batches: int = 1
    unit: str = LossObjective.unit

    def losses(self, masks: Sequence[Mask], batch: int) -> list[tuple[float, ...]]:
        return [(0.0,)] * len(masks)

    def work(self, masks: Sequence[Mask]) -> Work:
        return self.objective.work(masks)


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
            objective=format_method(task.objective, OBJECTIVES),
            seed=task.seed,
            dtype=task.subject.dtype,
            model=task.subject.identity,
            calibration=task.calibration.record.model_dump(mode="json"),
        )
        if folder:
            plan.save(folder / "plan.json")
    return plan


def _identity(task: Task) -> dict[str, str]:
    """All that the journal's losses, and what is decided by them, depend on.

    Not the target: a search may go on to a deeper one.
    """
    data = task.calibration.record
    return {
        "model": task.subject.identity.fingerprint,
        "computation": computation(task.subject.model),
        "calibration": f"{data.source}, {data.windows} x {data.window} tokens, BOS {data.bos}, {data.fingerprint}",
        "seed": str(task.seed),
        "search": format_method(task.search, SEARCHES),
        "objective": format_method(task.objective, OBJECTIVES),
        "moves": task.problem.granularity,
        "protected": ",".join(format_protected(task.problem.protected)),
        "batch tokens": str(task.objective.batch_tokens),
        "engine": "plain forward" if task.objective.fallback else "mask tree",
        "dtype": task.subject.dtype,
        "device": task.subject.model.device.type,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **{package: version(package) for package in ("torch", "transformers", "blockpruner")},
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
