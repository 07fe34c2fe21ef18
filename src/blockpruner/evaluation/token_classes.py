"""Losses of tokens by their class: rare or frequent, new or repeated, early or late in the window, word or number."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockpruner.artifacts import Estimate
from blockpruner.evaluation.explanation import ClassEffect
from blockpruner.objectives.loss import Loss
from blockpruner.texts.examples import IGNORED, Examples

DEFINITIONS = {
    "frequency": "frequent: the tokens that occur most often as targets in this text and make up half of it; rare: the "
    "others. Tokens that occur equally often are of one class",
    "occurrence": "new: not in what the model is given before (masked and restored text: anywhere in its input); "
    "repeated: is there; copied: is there right after the same token that it follows here (text read left to right)",
    "position": "of the predicted token in its window: the first eighth, the rest of the first half, the second half",
    "kind": "by its text: word (has a letter), number (a digit and no letter), whitespace, punctuation (all else that "
    "is text), other (special tokens, parts of a character)",
}


@dataclass(frozen=True, eq=False)
class TokenClass:
    """Predicted tokens of one class. where: bool [rows, positions], among the targets of some examples."""

    by: str
    name: str
    where: Tensor


def token_classes(examples: Examples, tokenizer: PreTrainedTokenizerBase | None = None) -> list[TokenClass]:
    """All predicted tokens, and their classes by each of DEFINITIONS, of which each token has one; no empty ones.

    By kind only with a tokenizer, which tells the text of a token.
    """
    targets = examples.targets.cpu()
    asked = targets != IGNORED
    labels = {
        "frequency": _frequency(targets, asked),
        "occurrence": _occurrence(examples),
        "position": _position(asked, 1 if examples.question == "next token" else 0),
    }
    if tokenizer is not None:
        labels["kind"] = _labelled(targets, asked, _kinds(tokenizer))
    found = [TokenClass("all", "all", asked)]
    for by, rows in labels.items():
        names = dict.fromkeys(name for name in _ORDER[by] if any(name in row for row in rows))
        found += [
            TokenClass(by, name, torch.tensor([[each == name for each in row] for row in rows])) for name in names
        ]
    return found


def effects(classes: Sequence[TokenClass], before: Tensor, after: Tensor) -> tuple[ClassEffect, ...]:
    """What each class loses when losses go from `before` to `after`, both float64 [rows, positions]."""
    total = int(classes[0].where.sum())
    return tuple(
        ClassEffect(
            by=each.by,
            name=each.name,
            tokens=int(each.where.sum()),
            share=int(each.where.sum()) / total,
            before=mean_over(before, each.where),
            change=mean_over(after - before, each.where),
        )
        for each in classes
    )


def mean_over(values: Tensor, where: Tensor) -> Estimate | None:
    """The mean of the marked values over the windows that have such: a ratio of sums, see `Estimate.ratio`.

    None where a value is not finite.
    """
    counts = where.sum(1).double()
    sums = torch.where(where, values, 0.0).sum(1)[counts > 0]
    counts = counts[counts > 0]
    if not len(counts) or not bool(torch.isfinite(sums).all()):
        return None
    return Estimate.ratio(sums.tolist(), counts.tolist(), Loss.unit)


_Labels = list[list[str]]  # [rows][positions], empty where nothing is predicted
_ORDER = {
    "frequency": ("frequent", "rare"),
    "occurrence": ("new", "repeated", "copied"),
    "position": ("first eighth", "rest of first half", "second half"),
    "kind": ("word", "number", "punctuation", "whitespace", "other"),
}


def _labelled(targets: Tensor, asked: Tensor, label: Callable[[int], str]) -> _Labels:
    pairs = zip(targets.tolist(), asked.tolist(), strict=True)
    return [[label(token) if one else "" for token, one in zip(*row, strict=True)] for row in pairs]


def _frequency(targets: Tensor, asked: Tensor) -> _Labels:
    counts = Counter(targets[asked].tolist())
    covered, least = 0, 0
    for least, size in sorted(Counter(counts.values()).items(), reverse=True):
        covered += least * size
        if 2 * covered >= int(asked.sum()):
            break
    return _labelled(targets, asked, lambda token: "frequent" if counts[token] >= least else "rare")


def _occurrence(examples: Examples) -> _Labels:
    """Whether each target was there before: in what the model has read by then."""
    targets = examples.targets.tolist()
    given = {name: ids.tolist() for name, ids in examples.inputs.items() if name.endswith("input_ids")}
    causal = "input_ids" if examples.question == "next token" else "decoder_input_ids"
    read = given.pop(causal, [[] for _ in targets])
    known = [[token for ids in given.values() for token in ids[row]] for row in range(len(targets))]
    return [_met(*row) for row in zip(targets, read, known, strict=True)]


def _met(targets: list[int], read: list[int], known: list[int]) -> list[str]:
    """read: token by token, in step with the targets; known: from the beginning."""
    seen, pairs, found = set(known), set[tuple[int, int]](), list[str]()
    for place, target in enumerate(targets):
        here = read[place] if place < len(read) else None
        if here is not None:
            seen.add(here)
        if target == IGNORED:
            found.append("")
            continue
        copied = here is not None and (here, target) in pairs
        found.append("copied" if copied else "repeated" if target in seen else "new")
        if here is not None:
            pairs.add((here, target))
    return found


def _position(asked: Tensor, ahead: int) -> _Labels:
    """By the place of the predicted token in its window, so many places behind the one that predicts it."""
    width = asked.shape[1]
    names = [
        "first eighth" if 8 * p < width else "rest of first half" if 2 * p < width else "second half"
        for p in range(ahead, ahead + width)
    ]
    return [[name if one else "" for name, one in zip(names, row, strict=True)] for row in asked.tolist()]


def _kinds(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    special = set(tokenizer.all_special_ids)

    @cache
    def kind(token: int) -> str:
        text = str(tokenizer.decode([token]))
        if token in special or "\N{REPLACEMENT CHARACTER}" in text:
            return "other"
        if any(map(str.isalpha, text)):
            return "word"
        if any(map(str.isdigit, text)):
            return "number"
        return "punctuation" if text.strip() else "whitespace"

    return kind
