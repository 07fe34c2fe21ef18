"""Perplexity and bits per byte under a stated protocol, size, cache bytes, and a greedy sample to look at."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy import Anatomy
from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.blocks import Mask, format_mask
from blockpruner.calibration import Calibration, CalibrationRecord, load_calibration
from blockpruner.errors import CheckFailedError
from blockpruner.objective import LossObjective
from blockpruner.searching import Progress


class Quality(Record):
    """One contestant. parameters, cache_bytes: number of parameters, key/value bytes per token; lower = better.

    loss: mean next-token loss over windows; perplexity = exp(loss), its standard error exp(loss) times that of the
    loss; bits_per_byte = summed loss / (ln 2 * bytes of the predicted text), comparable between tokenizers.
    """

    name: str
    removed: str
    parameters: int
    cache_bytes: int
    loss: Estimate
    perplexity: Estimate
    bits_per_byte: float
    sample: str | None = None


class Evaluation(Artifact):
    """Contestants on the same text under the same protocol."""

    FORMAT: ClassVar[str] = "blockpruner.evaluation"
    VERSION: ClassVar[int] = 1

    data: CalibrationRecord
    dtype: str
    contestants: tuple[Quality, ...]

    @classmethod
    def of(cls, contestants: Sequence[Quality], data: CalibrationRecord, dtype: str) -> "Evaluation":
        return cls(format=cls.FORMAT, version=cls.VERSION, data=data, dtype=dtype, contestants=tuple(contestants))


def load_text(data: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Calibration:
    """The windows of `data` to evaluate on: as for calibration, but `wikitext2` means its test part here."""
    if data.partition("[")[0] == "wikitext2" and options.get("split") is None:
        options["split"] = "test"
    return load_calibration(data, tokenizer, **options)


def evaluate_masks(
    model: PreTrainedModel,
    anatomy: Anatomy,
    data: Calibration,
    masks: dict[str, Mask],
    *,
    progress: Progress | None = None,
) -> list[Quality]:
    """Quality of the model without each mask, by name, in one sweep that computes shared prefixes once.

    CheckFailedError names a contestant whose loss is not finite.
    """
    objective = LossObjective(model, anatomy, data.windows)
    distinct = list(dict.fromkeys(masks.values()))
    losses: dict[Mask, list[float]] = {mask: [] for mask in distinct}
    for batch in range(objective.batches):
        if progress:
            progress(batch, objective.batches, f"evaluating {len(masks)} contestants")
        for mask, found in zip(distinct, objective.losses(distinct, batch), strict=True):
            losses[mask] += found
    if progress:
        progress(objective.batches, objective.batches, "evaluated")
    return [_quality(name, mask, anatomy, data, losses[mask]) for name, mask in masks.items()]


def _quality(name: str, mask: Mask, anatomy: Anatomy, data: Calibration, losses: list[float]) -> Quality:
    if not all(map(math.isfinite, losses)):
        raise CheckFailedError(f"{name} has a loss that is not a finite number", fix="evaluate with --dtype float32")
    loss = Estimate.of(losses, LossObjective.unit)
    value = math.exp(loss.value)
    stderr = None if loss.stderr is None else value * loss.stderr
    predicted = data.record.window - 1
    return Quality(
        name=name,
        removed=format_mask(mask),
        parameters=anatomy.total_parameters - anatomy.outline.removed_parameters(mask),
        cache_bytes=sum(part.cache_bytes for block, part in anatomy.parts.items() if block not in mask),
        loss=loss,
        perplexity=Estimate(value=value, stderr=stderr, n=loss.n, unit="perplexity", reason=loss.reason),
        bits_per_byte=math.fsum(losses) * predicted / (math.log(2) * data.record.bytes),
    )


@torch.no_grad()
def greedy_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 32) -> str:
    """What the model writes after `prompt`, greedily and with its cache."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    written = model.generate(
        **given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
    )
    return str(tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
