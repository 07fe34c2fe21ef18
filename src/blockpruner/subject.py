"""The model that a run is about, taken apart and known by its fingerprint."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy import read_anatomy
from blockpruner.checkpoint import Form, Saved, save_pruned
from blockpruner.errors import InputError
from blockpruner.models import LoadedModel, identify
from blockpruner.parts import Anatomy
from blockpruner.plan import ModelIdentity, Plan


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
