"""Text to windows: the token sequences that criteria, searches and evaluations look at.

The *stream* of a source is its documents, joined by an empty line and tokenised as one text; what looks like a special
token in it stays text. Only chats (see `chats`) follow each other without a line between, and special tokens in them
are tokens, for with these a template marks who speaks. The stream is cut into windows of T tokens that do not overlap,
and the remainder is dropped. Where the beginning-of-sequence token (BOS) stands is a policy, because some models are
meaningless without it:

- `stream`: once, before the whole stream, as in BlockPruner's code;
- `window`: before every window, which then holds T - 1 tokens of the stream (Gemma needs this);
- `none`: nowhere;
- `auto`: as `window` if the tokenizer by itself puts a BOS before a text, else as `none`.
"""

import hashlib
import itertools
import random
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from blockpruner.artifacts import Record
from blockpruner.errors import InputError
from blockpruner.texts.chats import Chat, template_of
from blockpruner.texts.sources import Texts, open_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BosPolicy = Literal["stream", "window", "none"]
SEPARATOR = "\n\n"

# A first guess at how much text is enough; where it is not, twice as much is tokenised.
_CHARACTERS_PER_TOKEN = 6
# The last tokens before a cut in the text may not be those of the whole text, so that many more are asked for.
_SEAM = 64


class CalibrationRecord(Record):
    """What the windows are, in words and numbers; goes into every artifact that rests on them.

    source: as given, a file without its folders; documents: how many of them reach into the windows; window: T;
    windows: their number; tokens: windows * T, BOS included; bytes: the sum of `Calibration.bytes_per_window`;
    seed: of the order of the documents, None for the source's own; bos: the policy as resolved; separator: what
    stands between documents; fingerprint: see `fingerprint`.
    """

    source: str
    documents: int
    window: int
    windows: int
    tokens: int
    bytes: int
    seed: int | None
    bos: BosPolicy
    separator: str
    fingerprint: str


class TextOptions(TypedDict, total=False):
    """How text becomes windows; see this module, and `texts` for split, column and quiet.

    tokens: 16384 where left out, None takes all there is; window: 2048 (512 for searches that
    race), or the model's context, where left out.
    """

    tokens: int | None
    window: int | None
    bos: str
    split: str | None
    column: str | None
    quiet: bool


def check_options(text: Mapping[str, object]) -> None:
    """TypeError for what is none of `TextOptions`: functions that gather these take any name."""
    if unknown := sorted(text.keys() - TextOptions.__annotations__.keys()):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens and the record of what they are.

    windows: int64 [n, T]; bytes_per_window: per window, the UTF-8 bytes of source text that its predicted tokens
    (1 to T - 1) stand for, so that bits per byte = summed loss in nats / (ln 2 * bytes). A character that several
    tokens share counts with the first of them, text that a tokenizer drops with the token after it. Tokenizers that
    do not tell where a token comes from (`is_fast` is false) have the text spread evenly over its tokens.
    """

    windows: Tensor
    record: CalibrationRecord
    bytes_per_window: tuple[int, ...]


def load_calibration(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    window: int,
    windows: int | None = None,
    tokens: int | None = None,
    seed: int | None = 0,
    bos: str = "auto",
    split: str | None = None,
    column: str | None = None,
    quiet: bool = False,
) -> Calibration:
    """The first `windows` windows of T = `window` tokens in the stream of `source`; the same on every machine.

    source, split, column, quiet: see `sources`; tokens: instead of `windows`, as many as hold at least so many tokens;
    neither: all there are. seed: of the shuffle of the documents by `random.Random(seed)`; None keeps the source's
    own order, as the recipes `alpaca` and `wikitext2` always do. bos: a policy of this module.
    Cost: text is tokenised as far as the windows reach; it is read further only to be shuffled.
    InputError says why a source cannot be used, or how many windows it holds.
    """
    wanted = _wanted_windows(window, windows, tokens)
    policy = resolve_bos(tokenizer, bos)
    taken = window - 1 if policy == "window" else window
    texts = open_texts(source, split=split, column=column, quiet=quiet, render=template_of(tokenizer))
    seed = None if texts.recipe else seed
    stream = _tokenise(_ordered(texts, seed), tokenizer, None if wanted is None else wanted * taken)
    held = (len(stream.ids) + (policy == "stream")) // taken
    if held < (wanted or 1):
        raise _too_short(texts.label, len(stream.ids), held, wanted, window)
    ids, spans = _cut(stream, policy, _bos_token(tokenizer), taken, wanted or held)
    sizes = tuple(len(stream.text[start:end].encode()) for start, end in spans.tolist())
    record = CalibrationRecord(
        source=texts.label,
        documents=bisect_left(stream.starts, int(spans[-1, 1])),
        window=window,
        windows=len(ids),
        tokens=ids.numel(),
        bytes=sum(sizes),
        seed=seed,
        bos=policy,
        separator=stream.separator,
        fingerprint=fingerprint(ids, policy),
    )
    return Calibration(ids, record, sizes)


def check_bos(bos: str) -> None:
    """InputError if `bos` is no policy."""
    if bos not in ("auto", *get_args(BosPolicy)):
        raise InputError(f"{bos!r} is no BOS policy", fix="use auto, stream, window or none")


def resolve_bos(tokenizer: "PreTrainedTokenizerBase", bos: str) -> BosPolicy:
    """The policy that `bos` means for this tokenizer; InputError if it is none, or the tokenizer lacks the BOS."""
    check_bos(bos)
    token = _bos_token(tokenizer)
    if bos == "auto":
        return "window" if token is not None and tokenizer("a")["input_ids"][:1] == [token] else "none"
    if bos != "none" and token is None:
        raise InputError(f"BOS policy {bos}: this tokenizer has no BOS token", fix="use the policy none")
    return cast(BosPolicy, bos)


def fingerprint(windows: Tensor, bos: BosPolicy) -> str:
    """SHA-256 over the shape of `windows`, the policy and the token ids as little-endian int64, in hexadecimal."""
    count, length = windows.shape
    digest = hashlib.sha256(f"{count}x{length} {bos}\n".encode())
    digest.update(windows.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stream:
    """text; ids: its tokens [n]; ends: for each the characters of text up to its end [n]; starts: of the documents;
    separator: what stands between these."""

    text: str
    ids: Tensor
    ends: Tensor
    starts: list[int]
    separator: str


def _wanted_windows(window: int, windows: int | None, tokens: int | None) -> int | None:
    if window < 2:
        raise InputError(f"a window of {window} tokens predicts nothing", fix="use a window of at least 2 tokens")
    if windows is not None and tokens is not None:
        raise InputError("both a number of windows and of tokens were given", fix="give one of them")
    if any(number is not None and number < 1 for number in (windows, tokens)):
        raise InputError("fewer than one window or token was asked for", fix="ask for at least 1")
    return windows if tokens is None else -(-tokens // window)


def _too_short(label: str, tokens: int, held: int, wanted: int | None, window: int) -> InputError:
    asked = f", {wanted} were asked for" if wanted else ""
    return InputError(
        f"{label} is too short: its {tokens} tokens make {held} windows of {window}{asked}",
        fix="ask for fewer or shorter windows, or name a source with more text",
    )


def _bos_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    token = tokenizer.bos_token_id
    return token if isinstance(token, int) else None


def _ordered(texts: Texts, seed: int | None) -> Iterator[str]:
    if seed is None:
        return texts.documents
    documents = list(texts.documents)
    random.Random(seed).shuffle(documents)
    return iter(documents)


def _tokenise(documents: Iterator[str], tokenizer: "PreTrainedTokenizerBase", needed: int | None) -> _Stream:
    """The beginning of the stream with at least `needed` tokens (all of it: None), or as many as there are.

    The tokens are those of the whole stream: they are taken from a text that goes on for _SEAM tokens behind them.
    """
    pieces: list[str] = []
    starts: list[int] = []
    length, first = 0, next(documents, "")
    documents, chats = itertools.chain([first], documents), isinstance(first, Chat)
    separator = "" if chats else SEPARATOR
    reach = sys.maxsize if needed is None else _CHARACTERS_PER_TOKEN * (needed + _SEAM)
    while True:
        while length < reach and (document := next(documents, None)) is not None:
            if isinstance(document, Chat) != chats:
                raise InputError("some records are chats and others are text", fix="name one column with --column")
            starts.append(length + len(separator) if pieces else 0)
            pieces.append(document)
            length = starts[-1] + len(document)
        text = separator.join(pieces)[:reach]
        ids, ends = _encode(tokenizer, text, marked=chats)
        if length < reach or (needed is not None and len(ids) >= needed + _SEAM):
            return _Stream(text, ids, ends, starts, separator)
        reach *= 2


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, marked: bool) -> tuple[Tensor, Tensor]:
    """Token ids of `text`, and where in it each token ends; `marked`: what looks like a special token is one."""
    # mistral-common's tokenizers lack `is_fast`, refuse to be asked to split, and always do.
    exact, asked = getattr(tokenizer, "is_fast", False), hasattr(tokenizer, "is_fast")
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=asked and not marked,
        return_offsets_mapping=exact,
        return_attention_mask=False,
        verbose=False,
    )
    ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    if exact:
        return ids, torch.tensor([end for _, end in encoding["offset_mapping"]], dtype=torch.int64)
    return ids, torch.arange(1, len(ids) + 1) * len(text) // max(len(ids), 1)


def _cut(stream: _Stream, policy: BosPolicy, bos: int | None, taken: int, count: int) -> tuple[Tensor, Tensor]:
    """Windows [count, T], `taken` tokens of the stream in each, and the text that their predicted tokens span."""
    ids, ends = stream.ids, stream.ends
    if policy == "stream":
        ids, ends = pad(ids, (1, 0), value=bos), pad(ends, (1, 0))
    ids, ends = (tensor[: count * taken].view(count, taken) for tensor in (ids, ends))
    starts = ends[:, 0]
    if policy == "window":
        ids, starts = pad(ids, (1, 0), value=bos), pad(ends[:-1, -1], (1, 0))
    return ids.contiguous(), torch.stack((starts, ends[:, -1]), dim=1)
