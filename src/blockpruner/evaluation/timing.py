"""How long a model takes: runs of prefill and cached decode, and the numbers that are made of several runs."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, ClassVar, Self

import torch
from scipy.special import bdtr
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from blockpruner.artifacts import Record
from blockpruner.engine.limits import context
from blockpruner.errors import InputError
from blockpruner.evaluation.memory import last_logits, random_inputs
from blockpruner.registry import parse_method

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Protocol:
    """What is timed: `batch` sequences of `context` random tokens are read, then `new` tokens are written.

    prefill: from the call to the first token; decode: the mean of the steps that follow, with the cache. rounds: runs
    of every contestant, after `warm_up` ones that do not count; sample: draw tokens (top-k 50, top-p 0.95), not greedy.
    """

    batch: int = 1
    context: int = 512
    new: int = 16
    rounds: int = 11
    warm_up: int = 1
    sample: bool = False

    source: ClassVar[str] = "ours: enough rounds for an interval of the median"

    def __post_init__(self) -> None:
        if min(self.batch, self.context, self.new, self.rounds) < 1 or self.warm_up < 0:
            raise InputError(f"{self} is out of range", fix="give numbers from 1 on, warm_up from 0 on")


@dataclass(frozen=True)
class ShortenedLlama(Protocol):
    """12 tokens in, 128 out, sampled, 30 runs of which the first 10 are not counted; they also give 512 out, and
    batches of 1, 8, ..., 256. Theirs repeats one sentence; ours draws tokens."""

    context: int = 12
    new: int = 128
    rounds: int = 20
    warm_up: int = 10
    sample: bool = True

    source: ClassVar[str] = "Kim et al. 2024, arXiv 2402.02834 (Shortened LLaMA)"


@dataclass(frozen=True)
class LlmDrop(Protocol):
    """2048 tokens in and as many out; the paper raises the batch until the GPU is full, and counts both together."""

    context: int = 2048
    new: int = 2048
    rounds: int = 7

    source: ClassVar[str] = "He et al. 2024, arXiv 2406.15786 (LLM-Drop)"


@dataclass(frozen=True)
class Sleb(Protocol):
    """Their decode: 64 sequences of 64 tokens, 128 new ones, 10 runs after one. Their prefill: one of 2048, 50 runs."""

    batch: int = 64
    context: int = 64
    new: int = 128
    rounds: int = 10

    source: ClassVar[str] = "Song et al. 2024, arXiv 2402.09025 (SLEB)"


PROTOCOLS: dict[str, type[Protocol]] = {
    "quick": Protocol,
    "shortened-llama": ShortenedLlama,
    "llm-drop": LlmDrop,
    "sleb": Sleb,
}


def parse_protocol(text: str) -> Protocol:
    """The protocol that `text` names, as in `quick:batch=8,context=2048`."""
    return parse_method(text, PROTOCOLS, "protocol of speed")


class Timing(Record):
    """Seconds of several runs: their median and quartiles."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median=median(seconds), low=low, high=high, runs=len(seconds))


class SpeedUp(Record):
    """How many times as fast: the median over rounds of seconds of the first / seconds of this one, in one round each.

    low, high: an interval that holds the median of such ratios with 95 % probability, whatever their distribution (two
    of the ordered ratios, by binomial tails); None where there are fewer than 6 rounds.
    """

    median: float
    low: float | None
    high: float | None
    rounds: int

    @classmethod
    def of(cls, first: Sequence[float], this: Sequence[float]) -> Self:
        ratios = sorted(a / b for a, b in zip(first, this, strict=True))
        rank = _rank(len(ratios))
        low, high = (None, None) if rank is None else (ratios[rank], ratios[-1 - rank])
        return cls(median=median(ratios), low=low, high=high, rounds=len(ratios))


def _rank(n: int) -> int | None:
    """The largest r such that the median lies between the values of rank r and n-1-r (from 0) in 95 of 100 cases."""
    fitting = [r for r in range(n // 2) if 2 * bdtr(r, n, 0.5) <= 1 - CONFIDENCE]
    return max(fitting, default=None)


def clock_of(device: torch.device) -> str:
    """How seconds are taken there.

    On the CPU with one thread, those in which this process computed: others that keep the machine busy do not count.
    """
    if device.type == "cuda":
        return "CUDA events"
    return "CPU seconds of one thread" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall clock"


class Clock:
    """Marks moments, on the device where it computes by itself; `seconds` waits for it and gives what lies between."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[Any]()
        self._now = time.process_time if clock_of(device).startswith("CPU") else time.perf_counter

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
            return
        if self._device.type == "mps":
            torch.mps.synchronize()
        self._marks.append(self._now())

    def seconds(self) -> list[float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class _Marking(StoppingCriteria):
    """Stops nothing; it is asked after each new token."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.clock.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Run:
    """One run: seconds to the first token, and seconds per token after it (None where there was none)."""

    prefill: float
    decode: float | None


@torch.no_grad()
def timed(model: Any, protocol: Protocol, inputs: dict[str, Tensor]) -> Run:
    """One run of `model`, a PreTrainedModel; one that writes nothing is called once on all tokens."""
    clock = Clock(model.device)
    if not model.can_generate():
        clock.mark()
        model(**inputs, **last_logits(model))
        clock.mark()
        return Run(clock.seconds()[0], None)
    settings = model.generation_config
    eos = settings.eos_token_id if isinstance(settings.eos_token_id, int) else None
    options: dict[str, Any] = {"pad_token_id": 0 if settings.pad_token_id is None else settings.pad_token_id}
    if model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
        options["decoder_start_token_id"] = eos or 0
    draw = {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.0} if protocol.sample else {}
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    clock.mark()
    model.generate(
        **given,
        max_new_tokens=protocol.new,
        min_new_tokens=protocol.new,
        stopping_criteria=StoppingCriteriaList([_Marking(clock)]),
        **({"do_sample": False, "num_beams": 1} | draw | options),
    )
    first, *others = clock.seconds()
    return Run(first, math.fsum(others) / len(others) if others else None)


def inputs_for(model: PreTrainedModel, protocol: Protocol) -> dict[str, Tensor]:
    """The random tokens of a protocol; InputError if the model's context is shorter."""
    longest = context(model)
    needed = protocol.context + (protocol.new if model.can_generate() else 0)
    if longest is not None and needed > longest:
        raise InputError(
            f"{protocol.context} tokens and {protocol.new} new ones are longer than the model's context of {longest}",
            fix="choose a smaller context, or fewer new tokens",
        )
    return random_inputs(model, protocol.batch, protocol.context)
