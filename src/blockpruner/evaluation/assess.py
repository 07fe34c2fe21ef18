"""Several models under one protocol, one in memory at a time: text, tasks, and what they write.

The first contestant is the reference. What is found is in the run folder at once, as evaluation.json, tasks.json and
generation.json, and what is found there for the same model and settings is not computed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.artifacts import Artifact
from blockpruner.errors import InputError
from blockpruner.evaluation.assessment import Assessment, Contestant, Opener, Wanted
from blockpruner.evaluation.generation import check_writes, prompts_of, read_by, written_by
from blockpruner.evaluation.quality import Evaluation, Quality, evaluate_masks, greedy_sample, removed_from
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.task_table import TaskResult, TaskTable
from blockpruner.evaluation.tasks import Harness
from blockpruner.evaluation.verdict import GenerationCheck
from blockpruner.evaluation.writings import Written
from blockpruner.loading.models import computation
from blockpruner.searching.contract import Progress
from blockpruner.texts.calibration import Calibration, CalibrationRecord
from blockpruner.texts.overlap import share_known

TEXT, TASKS, WRITING = "evaluation.json", "tasks.json", "generation.json"

T = TypeVar("T", bound=Artifact)


def assess(
    names: Sequence[str],
    opened: Opener,
    wanted: Wanted,
    *,
    run: Path | None = None,
    progress: Progress | None = None,
    found: Sequence[Quality] = (),
) -> Assessment:
    """Everything `wanted` about the contestants `names`, the reference first; each is opened once, the reference twice.

    run: a run folder that the caller holds; found: qualities that are already known.
    """
    if len(set(names)) < len(names):
        raise InputError("a model is named twice", fix="name each once")
    wanted.check()
    harness = Harness(wanted.include_path) if wanted.tasks else None
    tasks = {task.name: harness.find(task.name)[0] for task in wanted.tasks} if harness else {}  # unknown ones: now
    work = _Work(wanted, names, harness, tasks, run, progress, _kept(run), [*found])
    for name in names:
        with opened(name) as one:
            work.look(name, one)
    if not all(written.was_read for written in work.written):
        with opened(names[0]) as reference:
            work.read(reference)
    return work.done()


def _kept(run: Path | None) -> Assessment:
    """What an earlier run left in the folder."""

    def load(name: str, kind: type[T]) -> T | None:
        return kind.load(run / name) if run is not None and (run / name).exists() else None

    return Assessment(load(TEXT, Evaluation), load(TASKS, TaskTable), load(WRITING, GenerationCheck))


@dataclass
class _Work:
    """An assessment as it grows. kept: of an earlier run; qualities, results, written: of this one, so far."""

    wanted: Wanted
    names: Sequence[str]
    harness: Harness | None
    tasks: Mapping[str, str]
    run: Path | None
    progress: Progress | None
    kept: Assessment
    known: list[Quality]
    data: CalibrationRecord | None = None
    reading: tuple[PreTrainedTokenizerBase, Calibration | None] | None = None
    prompts: tuple[str, ...] = ()
    qualities: list[Quality] = field(default_factory=list)
    results: list[TaskResult] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    def look(self, name: str, one: Contestant) -> None:
        """All about one contestant, but how its writing reads to the reference."""
        if self.reading is None or self.reading[0] is not one.tokenizer:
            self.reading = one.tokenizer, self.wanted.windows(one)
        windows = self.reading[1]
        if windows is not None:
            self._tell(f"{name}, text")
            self.data = self.data or windows.record
            self.qualities.append(self._quality(name, one, windows))
            self._save(TEXT, self._evaluation())
        with one.left() as model:
            digest = computation(model)
            for task in self.wanted.tasks:
                self._tell(f"{name}, {task.name}")
                self.results.append(self._result(name, one, model, digest, task))
                self._save(TASKS, self._table())
            if windows is not None and self.wanted.generate:
                self._tell(f"{name}, writing")
                self.prompts = self.prompts or prompts_of(windows, one.tokenizer)
                self.written.append(self._writings(name, one, model, digest))
                self._save(WRITING, self._check())

    def read(self, reference: Contestant) -> None:
        """What the others wrote, read by the reference."""
        with reference.left() as model:
            for place, written in enumerate(self.written):
                if not written.was_read:
                    self.written[place] = read_by(model, reference.tokenizer, self.prompts, written)
        self._save(WRITING, self._check())

    def done(self) -> Assessment:
        self._tell("evaluated")
        return Assessment(
            self._evaluation() if self.qualities else None,
            self._table() if self.results else None,
            self._check() if self.written else None,
        )

    def _quality(self, name: str, one: Contestant, windows: Calibration) -> Quality:
        kept = self.kept.evaluation
        known = [*self.known, *(kept.contestants if kept and kept.protocol == self.wanted.protocol else ())]
        identity = (name, removed_from(one.model, one.mask), computation(one.model), windows.record.fingerprint)
        same = [q for q in known if (q.name, q.removed, q.computation, q.fingerprint) == identity]
        (quality,) = same[:1] or evaluate_masks(
            one.model, one.anatomy, windows, {name: one.mask}, mean=self.wanted.mean
        )
        sample = None
        if self.wanted.prompt:
            with one.left() as model:
                sample = greedy_sample(model, one.tokenizer, self.wanted.prompt)
        shares = [share for known in one.seen if (share := share_known(known, windows.windows.numpy())) is not None]
        most = max(shares, key=lambda share: share.value, default=None)
        return quality.model_copy(update={"sample": sample, "seen": most})

    def _result(self, name: str, one: Contestant, model: PreTrainedModel, digest: str, task: Task) -> TaskResult:
        assert self.harness is not None
        settings = self._settings(name, task) | {"computation": digest}
        for kept in self.kept.tasks.results if self.kept.tasks else ():
            if settings == {key: getattr(kept, key) for key in settings}:
                return kept.by(task.metric)
        how = {"limit": self.wanted.limit, "batch": self.wanted.batch}
        return self.harness.run(model, one.tokenizer, task, contestant=name, computation=digest, **how)

    def _settings(self, name: str, task: Task) -> dict[str, object]:
        assert self.harness is not None
        by = {"harness": self.harness.version, "definition": self.harness.definition(task.name)}
        run = {"limit": self.wanted.limit, "batch": self.wanted.batch, **by}
        return {"contestant": name, "task": task.name, "ran": self.tasks[task.name], "shots": task.shots, **run}

    def _writings(self, name: str, one: Contestant, model: PreTrainedModel, digest: str) -> Written:
        check_writes(model)
        reader = self.written[0].computation if self.written else digest
        kept = self.kept.generation
        if kept and kept.prompts == self.prompts and kept.written[0].computation == reader:
            for written in kept.written:
                if (written.name, written.computation) == (name, digest):
                    return written
        found = written_by(model, one.tokenizer, self.prompts, name=name, computation=digest)
        return found if self.written else read_by(model, one.tokenizer, self.prompts, found)

    # What is saved while there is more to come also holds what an earlier run knew of that.

    def _evaluation(self) -> Evaluation:
        assert self.data is not None
        kept, rest = self.kept.evaluation, self.names[len(self.qualities) :]
        later = kept.contestants if kept and kept.protocol == self.wanted.protocol else ()
        qualities = [*self.qualities, *(quality for quality in later if quality.name in rest)]
        return Evaluation.of(qualities, self.data, self.wanted.protocol)

    def _table(self) -> TaskTable:
        every = [self._settings(name, task) for name in self.names for task in self.wanted.tasks]
        kept, rest = self.kept.tasks.results if self.kept.tasks else (), every[len(self.results) :]
        later = [result for result in kept if {key: getattr(result, key) for key in every[0]} in rest]
        return TaskTable.of(self.names[0], (*self.results, *later))

    def _check(self) -> GenerationCheck:
        kept, rest = self.kept.generation, self.names[len(self.written) :]
        later = kept.written if kept and kept.prompts == self.prompts else ()
        return GenerationCheck.of(self.prompts, [*self.written, *(one for one in later if one.name in rest)])

    def _save(self, name: str, artifact: Artifact) -> None:
        if self.run is not None:
            artifact.save(self.run / name)

    def _tell(self, message: str) -> None:
        done = len(self.qualities) + len(self.results)
        if self.progress:
            steps = len(self.names) * (len(self.wanted.tasks) + (self.wanted.data is not None))
            self.progress(done, steps, message)
