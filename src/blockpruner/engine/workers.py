"""Many workers: processes here or on other machines, each with the model, that share the masks of a search; by Ray."""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask
from blockpruner.engine.cluster import joined, resources, threads_each
from blockpruner.engine.hands import Card, Crew, Failure, Hand, Job, facts
from blockpruner.engine.objective import ModelObjective
from blockpruner.engine.units import Unit, cut
from blockpruner.errors import CheckFailedError, InputError, MachineError
from blockpruner.searching.contract import Found, Objective

REPEATS = 2  # how often work is done again whose worker died
PATIENCE = 60.0  # seconds without a word from any worker, after which that is said

_log = logging.getLogger("blockpruner")


@dataclass(frozen=True)
class _Lost:
    """A worker that is no more."""

    reason: str


@dataclass
class _Worker:
    """The main process's view of a worker."""

    number: int
    actor: Any
    where: str = "still loading"

    def __str__(self) -> str:
        return f"worker {self.number} ({self.where})"


class Workers:
    """An objective whose losses come from worker processes, with the same bits as those of the one it stands for.

    Units of work (`units.cut`) go to whoever is free. A worker that dies is replaced and its unit done again, at most
    REPEATS times in a row; an error in a worker is raised here with its message. Before a worker gets work, it has
    shown that model, examples, engine, threads and versions are ours and that it finds the same bits for the whole
    model on the first micro-batch. CheckFailedError where it does not.

    whole: the same in this process, which counts work and keeps anatomy and measure. Memory: one model more than there
    are workers, because of that one; each worker has what `whole` has. ray: connected, see `cluster.joined`.
    """

    def __init__(self, whole: ModelObjective, crew: Crew, ray: Any, threads: int) -> None:
        self.whole, self.batches, self.pieces, self.unit = whole, whole.batches, whole.pieces, whole.unit
        self._crew, self._ray, self._threads = crew, ray, threads
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._under_way: dict[Any, tuple[_Worker, Unit | None]] = {}  # None: nothing that anybody waits for
        self._lost: Counter[Unit | None] = Counter()

    def losses(self, asked: Mapping[int, Sequence[Mask]]) -> Iterator[Found]:
        if not self._all:
            self._hire()
        todo = deque(cut(asked, self._crew.count, self.whole.anatomy.outline.blocks, self._cost))
        found: list[Found] = []
        try:
            while todo or any(unit for _, unit in self._under_way.values()):
                while todo and self._idle:
                    self._give(self._idle.pop(0), todo.popleft())
                yield from found  # while they work
                found = self._next(todo)
            yield from found
        finally:
            self._under_way = {call: (worker, None) for call, (worker, _) in self._under_way.items()}

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        """As a single process counts it, which computes each shared prefix once; units compute a few again."""
        return self.whole.work(masks, batch)

    def close(self) -> None:
        """Let all workers go."""
        for worker in self._all:
            self._ray.kill(worker.actor)

    def _cost(self, masks: Sequence[Mask], batch: int) -> float:
        return self.whole.seconds(self.whole.work(masks, batch))

    def _hire(self) -> None:
        whole, crew = self.whole, self._crew
        device = whole.model.device.type
        options = {"batch_tokens": whole.batch_tokens, "segment": whole.segment}
        job = Job(crew, device, self._threads, whole.anatomy, whole.examples, whole.measure, options)
        self._job = self._ray.put(job)
        share = {"num_cpus": self._threads, "num_gpus": 1 if device == "cuda" else 0, "scheduling_strategy": "SPREAD"}
        self._kind = self._ray.remote(Hand).options(max_restarts=0, max_task_retries=0, **share)
        for number in range(1, crew.count + 1):
            self._start(number)
        self._expected = facts(whole)  # while they load

    def _start(self, number: int) -> None:
        worker = _Worker(number, self._kind.remote())
        self._all.append(worker)
        self._under_way[worker.actor.ready.remote(self._job)] = (worker, None)

    def _give(self, worker: _Worker, unit: Unit) -> None:
        self._under_way[worker.actor.losses.remote(unit)] = (worker, unit)

    def _next(self, todo: deque[Unit]) -> list[Found]:
        """Wait until a worker has something to say; what it found, if that was asked for."""
        while not (done := self._ray.wait(list(self._under_way), timeout=PATIENCE)[0]):
            if all(unit is None for _, unit in self._under_way.values()):
                _log.warning("still waiting for workers to load the model, or for room in the cluster")
        (call,) = done
        worker, unit = self._under_way.pop(call)
        found: list[Found] = []
        match self._answer(call):
            case Failure() as failure:
                raise failure.raised_by(worker)
            case _Lost() as lost:
                todo.extendleft([unit] if unit else [])
                self._replace(worker, unit, lost)
                return found
            case Card() as card:
                self._check(worker, card)
            case values if unit:
                found = [(unit.batch, *each) for each in zip(unit.masks, values, strict=True)]
        self._lost.pop(unit, None)
        self._idle.append(worker)
        return found

    def _answer(self, call: Any) -> Any:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:  # not even started: blockpruner is missing there, as a rule
            raise MachineError(
                f"a worker cannot work: {error}", fix="install the same blockpruner everywhere"
            ) from None
        except self._ray.exceptions.RayError as error:
            return _Lost(" ".join(str(error).split()))

    def _check(self, worker: _Worker, card: Card) -> None:
        worker.where = card.where
        expected, found = self._expected, card.facts
        drift = [f"{name}: {expected[name]} -> {found[name]}" for name in expected if expected[name] != found[name]]
        if drift:
            raise CheckFailedError(
                f"{worker} would compute something else than this process:\n  " + "\n  ".join(drift),
                fix="use the same model files, versions and kind of machine for all; for a model that was changed in "
                "memory, save it and give its folder",
            )
        _log.info("%s is ready", worker)

    def _replace(self, worker: _Worker, unit: Unit | None, lost: _Lost) -> None:
        self._ray.kill(worker.actor)  # it may be cut off, and not dead
        self._all.remove(worker)
        self._lost[unit] += 1
        if self._lost[unit] > REPEATS:
            raise MachineError(
                f"{self._lost[unit]} workers died in a row over {unit or 'loading the model'}; {worker}: {lost.reason}",
                fix="see whether memory ran out there, and use fewer --workers; the same command goes on from here",
            )
        _log.warning("%s died over %s and is replaced: %s", worker, unit or "loading the model", lost.reason)
        self._start(worker.number)


def spread(objective: ModelObjective, crew: Crew | None) -> AbstractContextManager[Objective]:
    """`objective` itself, or (with a crew) the same from many workers, who leave when the block ends."""
    return nullcontext(objective) if crew is None else _hired(objective, crew)


@contextmanager
def _hired(objective: ModelObjective, crew: Crew) -> Iterator[Workers]:
    """In the block this process computes with as many threads as each worker, because their number shows in the bits.

    That number: the cores there are, shared out, and at most what this process had. InputError where there are too few
    GPUs or machines, or where the model is streamed.
    """
    if objective.memory is not None:
        raise InputError("workers hold the whole model, so they do not stream", fix="leave out --stream, or --workers")
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    gpus = torch.cuda.device_count() if objective.model.device.type == "cuda" else 0
    here = [cores] if cores >= crew.count else [crew.count]
    threads = threads_each(crew.count, here, before)
    size = sum(tensor.nbytes for tensor in (*objective.examples.inputs.values(), objective.examples.targets))
    with joined(crew.address, threads * crew.count, gpus, size) as ray:
        if crew.address:
            threads = threads_each(crew.count, resources(ray, "CPU"), before)
        if gpus and sum(map(int, resources(ray, "GPU"))) < crew.count:
            raise InputError(f"there is no GPU for each of {crew.count} workers", fix="use fewer, or --device cpu")
        torch.set_num_threads(threads)
        workers = Workers(objective, _at_work(crew, objective), ray, threads)
        try:
            yield workers
        finally:
            workers.close()
            torch.set_num_threads(before)


def _at_work(crew: Crew, objective: ModelObjective) -> Crew:
    """`crew` with what does not depend on where a worker is: a whole path, and the dtype that was chosen here."""
    path = Path(crew.model).expanduser()
    model = str(path.absolute()) if crew.model != "demo" and path.exists() else crew.model
    dtype = str(objective.model.dtype).removeprefix("torch.") if crew.dtype == "auto" else crew.dtype
    return replace(crew, model=model, dtype=dtype)
