"""The model that a run is about, taken apart and known by its fingerprint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import MAX_JSON_BYTES
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Criterion
from blockpruner.loading.models import LoadedModel, identify, stored_dtype
from blockpruner.model_card import Written, license_of, model_card
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.repairs.recovery import RecoveryRecord
from blockpruner.repairs.spans import layer_map, spans
from blockpruner.standin import MODEL_TYPE
from blockpruner.surgery.checkpoint import Form, Saved, save_pruned
from blockpruner.surgery.gaps import UNREPAIRED, Repair


@dataclass(frozen=True)
class Subject:
    """A model taken apart and known by its fingerprint.

    folder: where its files are, which nothing writes into; memory: bytes of states that are held in memory where the
    weights are streamed, None where they are not; stored: the dtype in its files, whatever it was loaded in; None where
    it is not known, or there are no files.
    """

    model: PreTrainedModel
    given_tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    identity: ModelIdentity
    folder: Path | None = None
    memory: int | None = None
    stored: torch.dtype | None = None

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

    def check_criterion(self, criterion: Criterion) -> None:
        """InputError if the weights are streamed and `criterion` wants gradients."""
        if self.memory is not None and criterion.needs == "backward passes":
            raise InputError(
                f"{criterion.title!r} needs backward passes, and streamed weights are there for forward passes only",
                fix="use another criterion, or leave out --stream",
            )


def open_subject(loaded: LoadedModel, memory: int | None = None) -> Subject:
    """Prove the anatomy of a loaded model; memory: see `Subject`, for one of `streaming.load_streamed`."""
    subject = subject_of(loaded.model, loaded.tokenizer, loaded.name, loaded.folder)
    return replace(subject, memory=memory, stored=stored_dtype(loaded.folder))


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
    repair: Repair = UNREPAIRED,
    record: RecoveryRecord | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Saved:
    """Write the model without the blocks of `plan`, or of its `first` steps, to the new folder `out`.

    Those steps go beside the weights as plan.json, with a model card, and the `extra_files`; repair, record: of a
    recovery. What the folder of a model that was pruned before says of that is kept as plan.earlier.json and
    recovery.earlier.json. All is reloaded and compared, see `checkpoint.save_pruned`.
    InputError, naming `source`, if the plan is not for this model.
    """
    plan.check(subject.anatomy.outline, subject.identity, source)
    mask, anatomy = plan.mask(first), subject.anatomy
    taken = plan if first is None else plan.cut(first)
    taken = taken.model_copy(update={"model": taken.model or subject.identity})  # one by hand says of no model

    earlier = _earlier(subject.folder)
    gone = tuple((getattr(subject.model.config, MODEL_TYPE, None) or {"removed": ()})["removed"])

    def card(form: str, parameters: int, auto_class: str) -> str:
        layers = layer_map(anatomy, mask, repair) if spans(anatomy, mask) else None
        made = Written(form, parameters, auto_class, gone, tuple(earlier))
        return model_card(subject.identity, taken, made, record, license_of(subject.folder), layers)

    return save_pruned(
        subject.model,
        subject.given_tokenizer,
        anatomy,
        mask,
        out,
        form=form,
        source=subject.folder,
        extra_files={"plan.json": taken.model_dump_json(indent=2).encode() + b"\n", **earlier, **(extra_files or {})},
        repair=repair,
        card=card,
    )


def _earlier(folder: Path | None) -> dict[str, bytes]:
    """The plan and the recovery that made the model in `folder`, by the names under which they are kept."""
    found = {f"{name}.earlier.json": folder / f"{name}.json" for name in ("plan", "recovery")} if folder else {}
    return {
        name: file.read_bytes()
        for name, file in found.items()
        if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES
    }
