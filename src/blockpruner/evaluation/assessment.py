"""What is to be found out about which models, and what was found."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy.parts import Anatomy
from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.evaluation.protocols import Mean, protocol_of
from blockpruner.evaluation.quality import Evaluation, Quality, load_text
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.task_table import TaskTable
from blockpruner.evaluation.verdict import GenerationCheck
from blockpruner.repairs.recovery import RecoveryRecord
from blockpruner.surgery.removal import skipped
from blockpruner.texts.calibration import Calibration, TextOptions, check_options


@dataclass(frozen=True)
class Contestant:
    """A model without the blocks of `mask`, which are in place until it is looked at.

    seen: text that it was recovered with, each as `overlap.sketch` has it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    mask: Mask = frozenset()
    seen: tuple[str, ...] = ()

    def left(self) -> AbstractContextManager[PreTrainedModel]:
        return skipped(self.model, self.mask, anatomy=self.anatomy)


def recovered_with(folder: Path | None) -> tuple[str, ...]:
    """The text that went into the recoveries of a model in `folder`, each as `overlap.sketch` has it.

    What another program left there under these names is passed over.
    """
    found = list[str]()
    for path in sorted(folder.glob("recovery*.json")) if folder else ():
        with suppress(InputError):
            found.append(RecoveryRecord.load(path).seen)
    return tuple(filter(None, found))


Opener = Callable[[str], AbstractContextManager[Contestant]]


@dataclass(frozen=True)
class Wanted:
    """What is to be found out.

    data, text, seed: see `quality.load_text`; protocol: see `protocols`; prompt: of a sample to look at, or empty;
    tasks, limit, batch, include_path: see `tasks`; generate: whether models write, on prompts from `data`.
    """

    data: str | None = None
    text: TextOptions = field(default_factory=lambda: TextOptions())
    seed: int = 0
    protocol: str | None = None
    prompt: str = ""
    tasks: tuple[Task, ...] = ()
    limit: int | None = None
    batch: int = 1
    include_path: Path | None = None
    generate: bool = False

    def check(self) -> None:
        """InputError where nothing is wanted, or text is needed and not named; TypeError for an unknown option."""
        check_options(self.text)
        if self.data is None and not self.tasks:
            raise InputError(
                "there is nothing to evaluate on", fix="give --data SOURCE, --suite quick, or --tasks piqa"
            )
        if self.data is None and (self.generate or self.protocol):
            word = "--generate" if self.generate else "--protocol"
            raise InputError(f"{word} needs a text", fix="name one: --data wikitext2")
        if self.protocol is not None:
            protocol_of(self.protocol).applied(self.protocol, self.text)

    @property
    def mean(self) -> Mean:
        """Of what a perplexity is made."""
        return protocol_of(self.protocol).mean if self.protocol else "losses"

    def windows(self, one: Contestant) -> Calibration | None:
        if self.data is None:
            return None
        text = self.text if self.protocol is None else protocol_of(self.protocol).applied(self.protocol, self.text)
        return load_text(self.data, one.tokenizer, one.model, seed=self.seed, **text)


@dataclass(frozen=True)
class Assessment:
    """What was found; None for what was not asked for."""

    evaluation: Evaluation | None = None
    tasks: TaskTable | None = None
    generation: GenerationCheck | None = None

    @property
    def contestants(self) -> tuple[Quality, ...]:
        """The quality of each on text."""
        return self.evaluation.contestants if self.evaluation else ()

    def as_json(self) -> dict[str, Any]:
        """The evaluation on text, with `tasks` and `generation` beside its keys where they were asked for."""
        value = self.evaluation.model_dump(mode="json") if self.evaluation else {}
        more = {"tasks": self.tasks, "generation": self.generation}
        return value | {name: one.model_dump(mode="json") for name, one in more.items() if one}
