"""Perplexity and bits per byte under a stated protocol, size, cache bytes, and a greedy sample to look at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy.parts import Anatomy
from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Block, Mask, format_mask
from blockpruner.engine.limits import usual_window
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.evaluation.protocols import Mean, perplexity
from blockpruner.loading.models import computation
from blockpruner.objectives.loss import Loss
from blockpruner.searching.contract import Progress
from blockpruner.searching.evaluations import Evaluations
from blockpruner.texts.calibration import Calibration, CalibrationRecord, TextOptions, load_calibration
from blockpruner.texts.examples import examples_of, question

MOST_NATS = 700.0  # a mean loss above it has no perplexity in double precision


class Quality(Record):
    """One contestant; lower = better in every number.

    removed: the blocks that are missing, as text; parameters: how many; cache_bytes: key/value bytes per token;
    dtype: computed in;
    fingerprint: of its windows; losses compare where it is the same.
    loss: mean next-token loss over windows; perplexity = exp(loss), unless the protocol says otherwise, see
    `protocols`; bits_per_byte = summed loss / (ln 2 * bytes of the predicted text), comparable between tokenizers.
    computation: a digest of what it computes with, see `models`. seen: the share of this text, from 0 to 1, that the
    model was recovered with, see `overlap`; None where it was not, or that cannot be told.
    """

    name: str
    removed: str
    parameters: int
    cache_bytes: int
    dtype: str
    fingerprint: str
    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    sample: str | None = None
    computation: str = ""
    seen: Estimate | None = None


class Evaluation(Artifact):
    """Contestants under one protocol. data: the windows of the first, and of all whose `fingerprint` is the same.

    protocol: its name, see `protocols`; None for windows and a BOS policy of one's own, which `data` tells.
    """

    FORMAT: ClassVar[str] = "blockpruner.evaluation"
    VERSION: ClassVar[int] = 2

    data: CalibrationRecord
    contestants: tuple[Quality, ...]
    protocol: str | None = None

    @classmethod
    def of(cls, contestants: Sequence[Quality], data: CalibrationRecord, protocol: str | None = None) -> "Evaluation":
        return cls(format=cls.FORMAT, version=cls.VERSION, data=data, contestants=tuple(contestants), protocol=protocol)


def load_text(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Calibration:
    """The windows of `data` to evaluate `model` on: as for calibration, but `wikitext2` means its test part here."""
    if text.get("split") is None and data.partition("[")[0] == "wikitext2":
        text["split"] = "test"
    window = text.pop("window", None) or usual_window(model)
    return load_calibration(data, tokenizer, window=window, seed=seed, **{"tokens": 16384, **text})


def evaluate_masks(
    model: PreTrainedModel,
    anatomy: Anatomy,
    data: Calibration,
    masks: Mapping[str, Mask],
    *,
    mean: Mean = "losses",
    progress: Progress | None = None,
) -> list[Quality]:
    """Quality of the model without each mask, by name, in one sweep that computes shared prefixes once.

    mean: of what a perplexity is made, see `protocols`.
    CheckFailedError names a contestant whose perplexity is not finite.
    """
    if question(model) != "next token":
        raise InputError(
            f"{type(model).__name__} does not predict next tokens, so it has no perplexity of text",
            fix="give a decoder-only model",
        )
    objective = ModelObjective(model, anatomy, examples_of(model, data.windows))
    evaluations = Evaluations(objective, progress=progress, total=len(set(masks.values())) * objective.batches)
    evaluations.losses(masks.values(), "evaluating")
    digest = computation(model)
    found = [_quality(name, mask, model, anatomy, data, evaluations.values(mask), mean) for name, mask in masks.items()]
    return [quality.model_copy(update={"computation": digest}) for quality in found]


def _quality(
    name: str,
    mask: Mask,
    model: PreTrainedModel,
    anatomy: Anatomy,
    data: Calibration,
    losses: Sequence[float],
    mean: Mean,
) -> Quality:
    wild = [loss for loss in losses if not loss < MOST_NATS]  # NaN too
    if wild:
        raise CheckFailedError(
            f"{name} has no finite perplexity: the loss of a window is {wild[0]} nats",
            fix="evaluate with --dtype float32; if that changes nothing, the model is broken",
        )
    predicted = data.record.window - 1
    bits = [loss * predicted / math.log(2) for loss in losses]
    return Quality(
        name=name,
        removed=removed_from(model, mask),
        parameters=anatomy.total_parameters - anatomy.outline.removed_parameters(mask),
        cache_bytes=anatomy.cache_bytes(mask),
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=data.record.fingerprint,
        loss=Estimate.of(losses, Loss.unit),
        perplexity=perplexity(losses, mean),
        bits_per_byte=Estimate.ratio(bits, data.bytes_per_window, "bits per byte"),
    )


def removed_from(model: PreTrainedModel, mask: Mask) -> str:
    """The blocks that are missing without `mask`: also what an earlier pruning took, as the configuration tells."""
    record = getattr(model.config, "blockpruner", None) or {"removed": []}
    return format_mask(mask | frozenset(map(Block.parse, record["removed"])))


@torch.no_grad()
def greedy_sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 32) -> str:
    """What `model`, a PreTrainedModel that generates, writes after `prompt`, greedily and with its cache."""
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    written = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=padding)
    return str(tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
