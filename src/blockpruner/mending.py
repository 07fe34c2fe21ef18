"""From words to a recovered model: text is read, a recovery runs and is judged, and what it made is saved."""

import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Required, Unpack

from blockpruner.artifacts import run_folder
from blockpruner.data import read_data
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.objectives.loss import Loss
from blockpruner.plan import Plan
from blockpruner.recoveries import RECOVERIES, check_installed, parse_chain
from blockpruner.recovering import HELD_OUT, apart, check_written, recover
from blockpruner.registry import format_method
from blockpruner.repairs.kept import MADE
from blockpruner.repairs.recovery import Bench, Recovery, RecoveryRecord, Trained
from blockpruner.repairs.written import FILE
from blockpruner.searching.contract import Progress
from blockpruner.standin import MODEL_TYPE
from blockpruner.subject import Subject, save_subject
from blockpruner.surgery.checkpoint import Saved
from blockpruner.surgery.gaps import Repair
from blockpruner.texts.calibration import TextOptions
from blockpruner.texts.examples import Examples


class MendOptions(TextOptions, total=False):
    """The options of `prepare`."""

    method: Required[str]
    calibration: Required[str]
    held_out: str | None
    first: int | None
    force: bool
    seed: int
    source: str


@dataclass(frozen=True)
class Mended:
    """What a recovery makes of a model without the blocks of a plan, not saved yet. subject: the dense model."""

    subject: Subject
    plan: Plan
    repair: Repair
    record: RecoveryRecord

    def check(self) -> None:
        """CheckFailedError if held-out text is worse off with the repair, or there is none."""
        if not self.record.applied:
            raise CheckFailedError(
                f"nothing was written: {self.record.reason}",
                fix="fit on more text, take another method, or write it all the same with --force",
            )

    def save(self, out: Path) -> Saved:
        """Write it to the new folder `out`, reloaded and compared, with plan.json and recovery.json beside the weights.

        See `checkpoint.save_pruned`; CheckFailedError, and no folder, where `check` fails too.
        """
        self.check()
        files = {"recovery.json": self.record.model_dump_json(indent=2).encode() + b"\n"}
        return save_subject(self.subject, self.plan, out, repair=self.repair, record=self.record, extra_files=files)


@dataclass(frozen=True)
class Task:
    """A recovery with all that it needs, not begun yet. held_out: other text to judge by."""

    subject: Subject
    plan: Plan
    chain: tuple[Recovery, ...]
    examples: Examples
    held_out: Examples
    force: bool = False

    @property
    def trains(self) -> bool:
        return any(isinstance(method, Trained) for method in self.chain)

    def price(self) -> list[str]:
        """What each method of the chain takes at most, in words: forward passes, or a training."""
        model, anatomy = self.subject.model, self.subject.anatomy
        bench = Bench(model, anatomy, self.plan.mask(), self.examples, self.held_out)
        return [f"{format_method(each, RECOVERIES).partition(':')[0]}: {each.price(bench)}" for each in self.chain]

    def run(self, progress: Progress | None = None, run: Path | None = None) -> Mended:
        """Fit and judge. run: the folder for what is kept of a chain with training; killed, it goes on from there.

        Cost, memory and errors: see `recovering.recover`; RunFolderError when the folder is in use, or of another run.
        """
        sources = [self.subject.folder] if self.subject.folder else []
        with ExitStack() as held:
            folder = held.enter_context(run_folder(run, sources=sources)) if run and self.trains else None
            repair, record = recover(
                *(self.subject.model, self.subject.anatomy, self.plan.mask(), self.chain),
                *(self.examples, self.held_out),
                force=self.force,
                progress=progress,
                folder=folder,
            )
        return Mended(self.subject, self.plan, repair, record)


def prepare(
    subject: Subject,
    plan: Plan,
    *,
    method: str,
    calibration: str,
    held_out: str | None = None,
    first: int | None = None,
    force: bool = False,
    seed: int = 0,
    source: str = "the plan",
    **text: Unpack[TextOptions],
) -> Task:
    """Read the words of the command line into a recovery that is ready to run, of the model without `plan`.

    method: one recovery, or several joined by commas; first: only so many steps of the plan; held_out: other text to
    judge by, a quarter as many tokens; without it the last fifth of the calibration text is held out. force: keep also
    what held-out text is worse off with. InputError, naming `source`, if the plan is not for this model or removes
    nothing; MachineError for a package that is not installed.
    """
    chain = parse_chain(method, seed=seed)
    check_installed(chain)
    taken = plan if first is None else plan.cut(first)
    taken.check(subject.anatomy.outline, subject.identity, source)
    if not taken.steps:
        raise InputError(f"{source} removes nothing, so nothing is missing", fix="give the plan of a search")
    _check_whole(subject)

    def read(name: str, tokens: int | None) -> Examples:
        return read_data(subject, name, Loss(), seed=seed, **{**text, "tokens": tokens}).examples

    tokens = text.get("tokens", 16384)
    judged = None
    if held_out is not None:
        judged = read(held_out, None if tokens is None else -(-tokens // (HELD_OUT - 1)))
    fit, judged = apart(read(calibration, tokens), judged)
    check_written(chain, fit)
    return Task(subject, taken, chain, fit, judged, force)


def mend(
    subject: Subject,
    plan: Plan,
    *,
    progress: Progress | None = None,
    run: Path | None = None,
    **options: Unpack[MendOptions],
) -> Mended:
    """Fit a recovery for the dense model of `subject` without the blocks of `plan`; see `prepare` and `Task.run`."""
    return prepare(subject, plan, **options).run(progress, run)


def forget(run: Path) -> None:
    """Remove the checkpoints in a run folder, and the folder itself if it holds nothing else."""
    with run_folder(run):
        for kind in ("step-*", "run-*", MADE, f".{MADE}.*"):
            for done in run.glob(f"[0-9]*-*/{kind}"):
                shutil.rmtree(done)
        for text in run.glob(f"[0-9]*-*/{FILE}"):
            text.unlink()
        for folder in run.glob("[0-9]*-*"):
            with suppress(OSError):
                folder.rmdir()
        (run / ".lock").unlink()
    with suppress(OSError):
        run.rmdir()


def _check_whole(subject: Subject) -> None:
    """InputError if a recovery changed the model before: what that put in is no block, and would be fitted twice."""
    earlier = getattr(subject.model.config, MODEL_TYPE, None) or {"modules": {}}
    if any("replacement" in spec for spec in earlier["modules"].values()):
        raise InputError(
            f"{subject.identity.name} was recovered before, so it is not the dense model",
            fix="give the model that its blocks were removed from",
        )
