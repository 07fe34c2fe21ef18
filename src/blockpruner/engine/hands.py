"""What lives in a worker's process: the same model, examples and measure as in the main process, and its answers."""

import os
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from blockpruner.anatomy.parts import Anatomy
from blockpruner.engine.cluster import check_ray
from blockpruner.engine.objective import ModelObjective
from blockpruner.engine.units import Unit
from blockpruner.errors import BlockprunerError, InputError, MachineError, is_out_of_memory
from blockpruner.loading.models import computation, load
from blockpruner.measuring import Measure
from blockpruner.searching.contract import DENSE, Values
from blockpruner.texts.examples import Examples

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Who works: `count` processes, on this machine or (`address`: host:port, or auto) in a Ray cluster that is there.

    model, dtype, revision, allow_*: as for `models.load`, by which each worker loads the model. A model that exists in
    memory alone must be saved first: workers find it by its name, and a folder at the same path on every machine.
    MachineError without Ray.
    """

    count: int
    model: str
    address: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    allow_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check_ray()
        if self.count < 1:
            raise InputError(f"{self.count} workers do no work", fix="use --workers 1 or more")


@dataclass(frozen=True)
class Job:
    """All that a worker needs to compute what the main process would."""

    crew: Crew
    device: str
    threads: int
    anatomy: Anatomy
    examples: Examples
    measure: Measure
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """A worker that is ready: where it is, and all that its values depend on."""

    where: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker, and would again: one of our own errors by its class, or another with its trace."""

    kind: type[BlockprunerError] | None
    what: str
    fix: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, BlockprunerError):
            return cls(type(error), error.what, error.fix)
        if is_out_of_memory(error):
            return cls(MachineError, "there is not enough memory", "use fewer --workers, or a smaller --window")
        return cls(None, traceback.format_exc())

    def raised_by(self, worker: object) -> Exception:
        what = f"{worker}: {self.what}"
        return self.kind(what, fix=self.fix) if self.kind else RuntimeError(what)


class Hand:
    """What lives in a worker's process."""

    objective: ModelObjective

    def ready(self, job: Job) -> Card | Failure:
        """Load the model and be ready for units."""
        return _told(lambda: self._ready(job))

    def losses(self, unit: Unit) -> list[Values] | Failure:
        """The values of each mask of `unit`, in order."""
        return _told(lambda: list(self.objective.batch_losses(unit.masks, unit.batch)))

    def _ready(self, job: Job) -> Card:
        torch.set_num_threads(job.threads)
        crew = job.crew
        flags = {"allow_remote_code": crew.allow_remote_code, "allow_pickle": crew.allow_pickle}
        model = load(crew.model, dtype=crew.dtype, device=job.device, revision=crew.revision, **flags).model
        self.objective = ModelObjective(model, job.anatomy, job.examples, job.measure, **job.options)
        return Card(f"process {os.getpid()} on {platform.node()}", facts(self.objective))


def _told(call: Callable[[], T]) -> T | Failure:
    """What `call` returns, or what went wrong in it: as a value, so that all else that Ray raises is a lost worker."""
    try:
        return call()
    except Exception as error:
        return Failure.of(error)


def facts(objective: ModelObjective) -> dict[str, str]:
    """What must be the same in all processes, the last of them to the bit. Cost: one pass over one micro-batch."""
    (dense,) = objective.batch_losses([DENSE], 0)
    return {
        **{package: version(package) for package in ("torch", "transformers", "blockpruner")},
        "model": computation(objective.model),
        "examples": objective.examples.fingerprint,
        **({"vocabulary": objective.drawn} if objective.sampling else {}),
        "engine": objective.fallback or "mask tree",
        "threads": str(torch.get_num_threads()),
        "losses of the first windows": " ".join(value.hex() for value in dense),
    }
