"""What a model is measured on: a source of text or of items, read as questions for this model."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Unpack

import torch

from blockpruner.engine.limits import context, usual_window
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.loading.models import computation
from blockpruner.measuring import Measure
from blockpruner.objectives import OBJECTIVES
from blockpruner.registry import format_method
from blockpruner.subject import Subject
from blockpruner.surgery.gaps import Filling
from blockpruner.texts.calibration import CalibrationRecord, TextOptions, check_options, load_calibration
from blockpruner.texts.examples import Examples, Signs, examples_of, question
from blockpruner.texts.items import item_examples, read_items


@dataclass(frozen=True)
class Data:
    """Examples for one model, with the record of where they come from."""

    examples: Examples
    record: CalibrationRecord

    def objective(
        self, subject: Subject, measure: Measure, filling: Filling | None = None, **options: int
    ) -> ModelObjective:
        more: Any = {"memory": subject.memory, "filling": filling, **options}
        return ModelObjective(subject.model, subject.anatomy, self.examples, measure, **more)


def read_data(subject: Subject, source: str, measure: Measure, *, seed: int = 0, **text: Unpack[TextOptions]) -> Data:
    """`source` as examples for the model: windows of text, or the items that `measure` asks for.

    For windows see `calibration` and `examples`; for items `items`, of which `text` says the BOS policy alone.
    InputError where the source, or the model, is not fit for it; TypeError for an option that there is not.
    """
    check_options(text)
    asked = question(subject.model)
    bos = text.get("bos", "auto")
    if measure.reads == "items":
        if asked != "next token":
            raise InputError(
                f"{type(subject.model).__name__} does not write from left to right, so it cannot choose answers",
                fix="use another objective",
            )
        label, items = read_items(source, split=text.get("split"))
        examples, record = item_examples(items, subject.tokenizer, label, bos=bos, longest=context(subject.model))
        return Data(examples, record)
    found = load_calibration(
        source,
        subject.tokenizer,
        window=text.get("window") or usual_window(subject.model),
        tokens=text.get("tokens", 16384),
        seed=seed,
        bos="none" if bos == "auto" and asked != "next token" else bos,  # `examples` frames those itself
        split=text.get("split"),
        column=text.get("column"),
        quiet=text.get("quiet", False),
    )
    signs = Signs() if asked == "next token" else Signs.of(subject.tokenizer)
    return Data(examples_of(subject.model, found.windows, signs, seed=seed), found.record)


def identity(subject: Subject, data: Data, objective: ModelObjective, seed: int) -> dict[str, str]:
    """All that a measured value depends on, for the header of a journal."""
    record = data.record
    return {
        "model": subject.identity.fingerprint,
        "computation": computation(subject.model),
        "calibration": f"{record.source}, {record.windows} x {record.window} tokens, BOS {record.bos}, "
        f"{record.fingerprint}",
        "question": f"{data.examples.question}, {data.examples.fingerprint[:16]}",
        "seed": str(seed),
        "objective": format_method(objective.measure, OBJECTIVES),
        "batch tokens": str(objective.batch_tokens),
        **({"vocabulary": objective.drawn} if objective.sampling else {}),
        **({"values per window": str(objective.pieces)} if objective.pieces > 1 else {}),
        "engine": "plain forward" if objective.fallback else "mask tree",
        "dtype": subject.dtype,
        "device": _device(subject.model.device),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **{package: version(package) for package in ("torch", "transformers", "blockpruner")},
    }


def _device(device: torch.device) -> str:
    """What computes, since other hardware rounds otherwise: the card by its name, or what the processor can."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
