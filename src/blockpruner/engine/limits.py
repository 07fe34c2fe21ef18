"""What a model can read, and whether examples and a measure are fit for it."""

import torch
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import vocabulary_size
from blockpruner.errors import InputError
from blockpruner.measuring import Measure
from blockpruner.texts.examples import Examples


def context(model: PreTrainedModel) -> int | None:
    """The longest window the model can read, where its configuration or its table of positions says it.

    Where the table has a row for padding (RoBERTa), positions begin behind that row.
    """
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        table.num_embeddings - table.padding_idx - 1
        for name, table in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(table, torch.nn.Embedding)
        and table.padding_idx is not None
    ]
    return min([*tables, *([said] if said else [])], default=None)


def usual_window(model: PreTrainedModel) -> int:
    """The window to take when none is asked for: 2048 tokens, or what the model was made for if that is shorter."""
    return min(2048, context(model) or getattr(model.config.get_text_config(), "n_positions", None) or 2048)


def check_fits(model: PreTrainedModel, examples: Examples, measure: Measure) -> None:
    """InputError if the model lacks what is measured, or does not know tokens or lengths of the examples."""
    if (measure.of == "states") != (examples.question == "states"):
        has = "has no head that predicts tokens" if examples.question == "states" else "has a head that predicts tokens"
        other = "embedding" if examples.question == "states" else "loss or kl"
        raise InputError(f"{type(model).__name__} {has}, so {measure.title!r} is not for it", fix=f"use {other}")
    rows = vocabulary_size(model)
    longest = context(model)
    for name, ids in examples.inputs.items():
        if name.endswith("input_ids") and int(ids.max()) >= rows:
            raise InputError(
                f"the text has token {int(ids.max())}, and the model's vocabulary ends at {rows - 1}",
                fix="use the tokenizer that belongs to the model",
            )
        if longest is not None and ids.shape[1] > longest:
            raise InputError(
                f"windows of {ids.shape[1]} tokens are longer than the model's context of {longest}",
                fix=f"choose --window {longest} or less",
            )
