"""What a model is asked on calibration windows, by what it was trained for: inputs, and the tokens it is to predict."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from blockpruner.errors import InputError
from blockpruner.standin import unpruned

Question = Literal["next token", "masked tokens", "corrupted spans", "denoising", "continuation", "states", "choices"]
IGNORED = -100  # in `targets`: nothing is predicted here
MASKED = 0.15  # share of the tokens that are masked or corrupted, as these models were trained with
SPAN = 3  # mean length of a corrupted span


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs for the model, and what it is to predict.

    inputs: by the names of the model's forward, each [rows, ...]; targets: [rows, positions], the token that output
    position p is to predict, IGNORED where none; lengths: rows per unit, for a unit (a window, or an item with its
    answers) is what losses are means over; gold: per unit, the row in it that is right, where rows are answers;
    windows: [rows, T], the text, where neither inputs nor targets have it whole.
    """

    question: Question
    inputs: Mapping[str, Tensor]
    targets: Tensor
    lengths: tuple[int, ...]
    gold: tuple[int, ...] = ()
    windows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that is asked: inputs, targets, units, right answers; in hexadecimal."""
        digest = hashlib.sha256(f"{self.question} {self.lengths} {self.gold}".encode())
        for name, value in sorted({**self.inputs, "targets": self.targets}.items()):
            digest.update(f" {name} {tuple(value.shape)} ".encode())
            digest.update(value.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens per row that the model reads and writes."""
        return sum(ids.shape[1] for name, ids in self.inputs.items() if name.endswith("input_ids"))

    def batches(self, tokens: int) -> list["Examples"]:
        """Micro-batches of about so many tokens, of whole units, in order; the same whoever asks."""
        found, start = [], 0
        while start < len(self):
            stop, rows = start + 1, self.lengths[start]
            while stop < len(self) and (rows + self.lengths[stop]) * self.tokens <= tokens:
                rows += self.lengths[stop]
                stop += 1
            found.append(self.part(start, stop))
            start = stop
        return found

    def part(self, start: int, stop: int) -> "Examples":
        """Units `start` to `stop` - 1; answers without the padding that none of them needs."""
        first, last = sum(self.lengths[:start]), sum(self.lengths[:stop])
        inputs = {name: value[first:last] for name, value in self.inputs.items()}
        targets = self.targets[first:last]
        if self.question == "choices":
            width = int((targets != IGNORED).any(dim=0).nonzero().max()) + 2
            inputs, targets = {name: value[:, :width] for name, value in inputs.items()}, targets[:, :width]
        return Examples(
            self.question,
            inputs,
            targets,
            self.lengths[start:stop],
            self.gold[start:stop],
            None if self.windows is None else self.windows[first:last],
        )

    def rows(self) -> Iterator["Examples"]:
        """Row by row, for passes that have memory for one."""
        for row in range(len(self.targets)):
            inputs = {name: value[row : row + 1] for name, value in self.inputs.items()}
            yield Examples(self.question, inputs, self.targets[row : row + 1], (1,))

    def to(self, device: torch.device) -> "Examples":
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Examples(self.question, inputs, self.targets.to(device), self.lengths, self.gold)


@dataclass(frozen=True)
class Signs:
    """Token ids with a meaning; None, or none, where the tokenizer has no such token.

    first, last: what stands before and after every text; sentinels: what stands for the spans that T5 left out.
    """

    first: int | None = None
    last: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "Signs":
        """Those of a tokenizer of transformers."""
        whole = list(tokenizer("a")["input_ids"])
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        head = whole[0] if whole[:1] != plain[:1] else None
        tail = whole[-1] if whole[-1:] != plain[-1:] else None
        names = (f"<extra_id_{number}>" for number in range(100))
        ids = tuple(i for i in map(tokenizer.get_vocab().get, names) if i is not None)
        return cls(head, tail, tokenizer.mask_token_id, ids)


def examples_of(model: PreTrainedModel, windows: Tensor, signs: Signs = Signs(), *, seed: int = 0) -> Examples:
    """`windows` [n, T] of token ids as questions of the kind that `model` was trained for.

    A decoder predicts every next token. A model with a masked-language-modelling head predicts MASKED of the tokens,
    each replaced by the mask token. An encoder-decoder restores spans: after sentinels (T5) where its tokenizer has
    these, the whole text where it has a mask token (BART), else the second half of the window from the first. A model
    without a head is asked nothing: its states are compared. Which tokens are hidden depends on (seed, window) alone.
    InputError where the tokenizer lacks the token that is needed.
    """
    kind = question(model)
    if kind == "next token":
        targets = torch.nn.functional.pad(windows[:, 1:], (0, 1), value=IGNORED)
        return _windows(kind, {"input_ids": windows}, targets)
    if kind == "continuation":
        return _restored(model, windows, signs, seed)
    framed = _framed(windows, signs)
    if kind == "states":
        return _windows(kind, {"input_ids": framed}, torch.full_like(framed, IGNORED))
    return _masked(framed, signs, seed, type(model).__name__)


def question(model: PreTrainedModel) -> Question:
    """What `model` can be asked; `continuation` for every encoder-decoder."""
    if model.config.is_encoder_decoder:
        return "continuation"
    masked = unpruned(type(model)).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    if masked and not getattr(model.config, "is_decoder", False):  # some can generate too, but see what comes next
        return "masked tokens"
    return "next token" if model.can_generate() else "states"


def _windows(kind: Question, inputs: dict[str, Tensor], targets: Tensor) -> Examples:
    return Examples(kind, inputs, targets, (1,) * len(targets))


def _framed(windows: Tensor, signs: Signs) -> Tensor:
    """Windows of the same length that begin and end as the tokenizer has a text begin and end."""
    ends = [sign for sign in (signs.first, signs.last) if sign is not None]
    kept = windows[:, : windows.shape[1] - len(ends)]
    parts = [signs.first, kept, signs.last]
    full = [
        kept.new_full((len(kept), 1), part) if isinstance(part, int) else part for part in parts if part is not None
    ]
    return torch.cat(full, dim=1)


def _masked(windows: Tensor, signs: Signs, seed: int, name: str) -> Examples:
    if signs.mask is None:
        raise InputError(f"{name} predicts masked tokens, and its tokenizer has no mask token", fix="add its tokenizer")
    hidden = torch.zeros_like(windows, dtype=torch.bool)
    free = _free(windows, signs)
    count = max(1, round(MASKED * free.stop - MASKED * free.start))
    for row in range(len(windows)):
        order = torch.randperm(free.stop - free.start, generator=_generator(seed, row))
        hidden[row, free.start + order[:count]] = True
    return _windows(
        "masked tokens",
        {"input_ids": windows.masked_fill(hidden, signs.mask)},
        windows.masked_fill(~hidden, IGNORED),
    )


def _free(windows: Tensor, signs: Signs) -> range:
    return range(int(signs.first is not None), windows.shape[1] - int(signs.last is not None))


def _generator(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)


def _restored(model: PreTrainedModel, windows: Tensor, signs: Signs, seed: int) -> Examples:
    """Questions for an encoder-decoder, with the decoder's inputs shifted right by its start token."""
    if signs.sentinels:
        pairs = [_spans(row, signs, _generator(seed, i)) for i, row in enumerate(windows.tolist())]
        kind: Question = "corrupted spans"
    elif signs.mask is not None:
        framed = _framed(windows, signs)
        masked = _masked(framed, signs, seed, type(model).__name__).inputs["input_ids"]
        pairs, kind = list(zip(masked.tolist(), framed.tolist(), strict=True)), "denoising"
    else:
        half = windows.shape[1] // 2
        given, wanted = _framed(windows[:, :half], signs), _framed(windows[:, half:], Signs(last=signs.last))
        pairs, kind = list(zip(given.tolist(), wanted.tolist(), strict=True)), "continuation"
    given, wanted = (torch.tensor(side, device=windows.device) for side in zip(*pairs, strict=True))
    start = _decoder_start(model)
    shifted = torch.nn.functional.pad(wanted[:, :-1], (1, 0), value=start)
    found = _windows(kind, {"input_ids": given, "decoder_input_ids": shifted}, wanted)
    return found if kind == "denoising" else replace(found, windows=windows)


def _decoder_start(model: PreTrainedModel) -> int:
    """What the decoder begins with: as the configuration says, else its BOS, else its padding, as T5 does."""
    named = "decoder_start_token_id"
    places = [(model.config, named), (model.generation_config, named)]
    places += [(model.config, "bos_token_id"), (model.config, "pad_token_id")]
    found = [token for holder, name in places if isinstance(token := getattr(holder, name, None), int)]
    if not found:
        raise InputError(
            f"{type(model).__name__} names no token for its decoder to start with",
            fix="set decoder_start_token_id in its config.json",
        )
    return found[0]


def _spans(tokens: Sequence[int], signs: Signs, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """T5's corruption of one window: (what is left, a sentinel for each span; the spans, each after its sentinel).

    The number of spans and of hidden tokens depends on the length alone, so that all windows give the same shapes.
    """
    hidden = max(1, round(MASKED * len(tokens)))
    spans = max(1, min(round(hidden / SPAN), len(signs.sentinels), len(tokens) - hidden))
    left, out = _pieces(len(tokens) - hidden, spans, generator), _pieces(hidden, spans, generator)
    given, wanted, at = [], [], 0
    for sentinel, keep, drop in zip(signs.sentinels, left, out, strict=False):
        given += [*tokens[at : at + keep], sentinel]
        wanted += [sentinel, *tokens[at + keep : at + keep + drop]]
        at += keep + drop
    end = [] if signs.last is None else [signs.last]
    return given + end, wanted + end


def _pieces(total: int, count: int, generator: torch.Generator) -> list[int]:
    """`total` cut at random into `count` pieces of at least one."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]
