"""Weights read by transformers, strictly and silently.

transformers fills what a checkpoint lacks with random numbers and drops what it does not expect, with a printed report
only. Here both are errors, as are shapes that differ and numbers that are not finite.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from blockpruner.errors import BlockprunerError, InputError, MachineError, UnsupportedModelError

# A model may hold this many numbers more than its checkpoint: tables that it computes, never layers.
SLACK = 2**26
# What old encoder checkpoints hold beside the model: poolers, heads of their second task, tables now computed.
LEFTOVERS = re.compile(r"(.*\.)?((pooler|seq_relationship)\..+|position_ids|inv_freq|masked_bias)")
# The row of transformers' report that says which tensor could not be put together, as with an expert missing.
CONVERSION = re.compile(r"^\s*(\S.*?)\s*\| CONVERSION", re.MULTILINE)
# Tried in this order: where an architecture stands in several lists, the first is the task it was trained for.
AUTO_CLASSES = tuple(
    (getattr(transformers, auto), getattr(modeling_auto, mapping), getattr(modeling_auto, f"{mapping}_NAMES"))
    for auto, mapping in (
        ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
        ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
        ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
        ("AutoModel", "MODEL_MAPPING"),
    )
)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class for the architecture that `config` names, else for the first task its type is known for."""
    named = (config.architectures or [""])[0]
    code: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    for auto, _, architectures in AUTO_CLASSES:
        known = chain.from_iterable([found] if isinstance(found, str) else found for found in architectures.values())
        if named in set(known):
            return auto
    for auto, classes, _ in AUTO_CLASSES:
        if type(config) in classes or auto.__name__ in code:
            return auto
    raise UnsupportedModelError(
        f"{named or config.model_type!r} is not a language model",
        fix="give a causal, masked or sequence-to-sequence language model",
    )


def read_weights(
    folder: Path, config: PreTrainedConfig, values: int | None, *, source: Path, **options: Any
) -> PreTrainedModel:
    """The model of `config` with the weights in `folder`: every one found, none left over, all finite; eval mode.

    values: how many numbers the files hold, None if unknown: a config.json that asks for many more is refused before
    memory is taken for them; source: what messages name; options: passed on to `from_pretrained`.
    """
    with quietly(source):
        auto = auto_class(config)
        if values is not None and not options.get("trust_remote_code"):
            with torch.device("meta"):
                empty = auto.from_config(config, trust_remote_code=False)
            wanted = sum(tensor.numel() for tensor in chain(empty.parameters(), empty.buffers()))
            if wanted > values + SLACK:
                raise InputError(
                    f"config.json of {source} describes a model of {wanted} numbers, its weights hold {values}",
                    fix="get the config.json and the weights that belong together",
                )
        model, found = auto.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            local_files_only=True,
            **options,
        )
    _check_complete(found, source)
    check_finite(model, source)
    return model.eval().requires_grad_(False)


def _check_complete(found: Mapping[str, Any], source: Path) -> None:
    """InputError naming the tensors by which config.json and weights differ; `found` is the loading information."""
    for key, trouble in (
        ("missing_keys", "not in the weights, and nothing is filled with random numbers"),
        ("unexpected_keys", "in the weights, but not in the model that config.json describes"),
        ("mismatched_keys", "of another shape in the weights than in the model that config.json describes"),
    ):
        names = sorted(item if isinstance(item, str) else str(item[0]) for item in found[key])
        if key == "unexpected_keys":
            names = [name for name in names if not LEFTOVERS.fullmatch(name)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{source}: {', '.join(names[:3])}{more}: {trouble}",
                fix="get the complete checkpoint: config.json and weights that belong together",
            )


def check_finite(model: nn.Module, source: Path) -> None:
    """InputError naming the first tensor of `model` that is not made of finite numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
            continue
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):  # NaN comes through; nothing is copied
            raise InputError(
                f"{source}: {name} holds NaN or infinite numbers, read as {str(tensor.dtype).removeprefix('torch.')}",
                fix="get the checkpoint again; if it is sound, load it in float32 or bfloat16",
            )


@contextlib.contextmanager
def quietly(source: Path) -> Iterator[None]:
    """Let transformers work on `source`: it prints nothing, and what it raises is made one of our errors."""
    with _silence() as heard:
        try:
            yield
        except BlockprunerError:
            raise
        except ImportError as error:
            raise MachineError(f"{source} needs a package: {first_line(error)}", fix="install that package") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MachineError(f"not enough memory for {source}", fix="try bfloat16 or another device") from error
        except Exception as error:  # transformers raises every kind for a checkpoint that is wrong
            said = CONVERSION.search("\n".join(record.getMessage() for record in heard))
            reason = f"{said[1]} cannot be made of its tensors" if said else first_line(error)
            raise InputError(
                f"transformers cannot load {source}: {type(error).__name__}: {reason}",
                fix="get config.json, weights and tokenizer files that belong together",
            ) from error


@contextlib.contextmanager
def _silence() -> Iterator[list[logging.LogRecord]]:
    """Keep warnings, bars and both streams quiet; gives what transformers logs. All settings are put back."""
    logger = logging.getLogger("transformers")
    before = logger.handlers, logger.propagate, logger.level
    bars, no_hub_bars = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    listener, nowhere = BufferingHandler(capacity=10_000), io.StringIO()
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        logger.handlers, logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
        transformers_logging.disable_progress_bar()
        try:
            yield listener.buffer
        finally:
            logger.handlers, logger.propagate = before[:2]
            logger.setLevel(before[2])
            if bars:
                transformers_logging.enable_progress_bar()
            (disable_progress_bars if no_hub_bars else enable_progress_bars)()


def first_line(error: Exception) -> str:
    """What `error` says, short enough for one line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
