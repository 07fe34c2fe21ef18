"""Multiple-choice items: a question, answers to choose from, the right one; from files of the usual tasks.

A source is `FILE.jsonl` or `FILE.jsonl[start:stop]` (.json, .gz as well). A record is one of PIQA (goal, sol1, sol2,
label), ARC (question, choices {text, label}, answerKey), OpenBookQA (question_stem, ...), HellaSwag (ctx, endings,
label), MMLU (question, choices, answer; the letters are the answers), BoolQ (passage, question, label), WinoGrande
(sentence, option1, option2, answer), or of any task of your own: context, choices, gold. Prompts are those of
lm-evaluation-harness, zero-shot.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockpruner.errors import InputError
from blockpruner.texts.calibration import CalibrationRecord, fingerprint, resolve_bos
from blockpruner.texts.examples import IGNORED, Examples
from blockpruner.texts.files import holds_json, hub_rows, json_values
from blockpruner.texts.sources import HUB_NAME, parse_slice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """prompts: what stands before each answer, often the same; answers: with the space before them; gold: the right."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int


def read_items(source: str, *, split: str | None = None) -> tuple[str, list[Item]]:
    """The label of a source, a file by its name without folders, and its items; InputError names file and line.

    split: of a hub data set, `validation` unless named: test parts often come without labels.
    """
    name, start, stop = parse_slice(source)
    path = Path(name).expanduser()
    if holds_json(path):
        records, label = json_values(path), source.replace(name, path.name)
    elif hub := HUB_NAME.fullmatch(name):
        rows = hub_rows(hub[1], hub[2], split or "validation", stream=True)
        records, label = ((f"{name}, record {number}", row) for number, row in enumerate(rows)), source
    else:
        raise InputError(
            f"{source!r} is no source of multiple-choice items",
            fix="give FILE.jsonl, FILE.jsonl[0:200] or org/name[:config] of PIQA, ARC, MMLU, HellaSwag, BoolQ, "
            "WinoGrande, or with context, choices and gold",
        )
    items = [_item(record, where) for where, record in itertools.islice(records, start, stop)]
    if not items:
        raise InputError(f"{source} holds no items", fix="name another part of it")
    return label, items


def item_examples(
    items: list[Item],
    tokenizer: "PreTrainedTokenizerBase",
    label: str,
    *,
    bos: str = "auto",
    longest: int | None = None,
) -> tuple[Examples, CalibrationRecord]:
    """`items` as rows of question and answer, padded at their end, with the answers' tokens to be predicted.

    A unit is an item, with a row for each answer. Only for models that read from left to right: what stands after
    a row's end does not change what is said before it. InputError names an item that is longer than `longest` tokens.
    """
    policy = resolve_bos(tokenizer, bos)
    head = [tokenizer.bos_token_id] if policy != "none" else []
    rows, starts = [], []
    for item in items:
        for prompt, answer in zip(item.prompts, item.answers, strict=True):
            before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
            if not head and not before:
                raise InputError(
                    f"{label}: an item begins with its answer {answer!r}, and nothing stands before it",
                    fix="give it a question, or --bos window where the tokenizer has a BOS",
                )
            rows.append([*head, *whole])
            starts.append(len(head) + min(len(before), len(whole) - 1))
    width = max(map(len, rows))
    if longest is not None and width > longest:
        raise InputError(
            f"an item of {label} has {width} tokens, and the model's context is {longest}", fix="leave it out"
        )
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = torch.full_like(ids, IGNORED)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        targets[number, start - 1 : len(row) - 1] = ids[number, start : len(row)]
    lengths, gold = tuple(len(item.answers) for item in items), tuple(item.gold for item in items)
    record = CalibrationRecord(
        source=label,
        documents=len(items),
        window=width,
        windows=len(rows),
        tokens=sum(map(len, rows)),
        bytes=sum(len(answer.encode()) for item in items for answer in item.answers),
        seed=None,
        bos=policy,
        separator="",
        fingerprint=fingerprint(torch.cat((ids, targets)), policy),
    )
    return Examples("choices", {"input_ids": ids}, targets, lengths, gold), record


def _item(record: Any, where: str) -> Item:
    why, found = "", None
    try:
        found = _known(record) if isinstance(record, dict) else None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = f" ({type(error).__name__}: {error})"
    if found is None or not 0 <= found.gold < len(found.answers) or len(found.answers) < 2:
        fix = 'write {"context": ..., "choices": [...], "gold": 0}'
        raise InputError(f"{where} is no multiple-choice item{why}", fix=fix)
    return found


def _known(record: Mapping[str, Any]) -> Item | None:
    keys = record.keys()
    if {"context", "choices", "gold"} <= keys:
        return _asked(record["context"], record["choices"], int(record["gold"]))
    if {"goal", "sol1", "sol2"} <= keys:
        return _asked(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"]))
    if {"ctx", "endings"} <= keys:
        return _hellaswag(record)
    if {"passage", "question"} <= keys:
        question = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
        return _asked(question, ["no", "yes"], int(record["label" if "label" in keys else "answer"]))
    if {"sentence", "option1", "option2"} <= keys:
        before, after = record["sentence"].split("_", 1)
        prompts = tuple(before + record[option] for option in ("option1", "option2"))
        return Item(prompts, (" " + after.strip(),) * 2, int(record["answer"]) - 1)
    if "answerKey" in keys:
        choices = record["choices"]
        stem = record["question_stem"] if "question_stem" in keys else f"Question: {record['question']}\nAnswer:"
        return _asked(stem, choices["text"], choices["label"].index(record["answerKey"]))
    if {"question", "choices", "answer"} <= keys:
        letters = LETTERS[: len(record["choices"])]
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, record["choices"], strict=True))
        about = f" about {record['subject'].replace('_', ' ')}" if "subject" in keys else ""
        head = f"The following are multiple choice questions (with answers){about}.\n\n" if about else ""
        return _asked(f"{head}{record['question'].strip()}\n{listed}\nAnswer:", list(letters), int(record["answer"]))
    return None


def _hellaswag(record: Mapping[str, Any]) -> Item:
    context = record["ctx"]
    if {"activity_label", "ctx_a", "ctx_b"} <= record.keys():
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    context, *endings = (_unmarked(text) for text in (context, *record["endings"]))
    return _asked(context, endings, int(record["label"]))


def _unmarked(text: str) -> str:
    """Without WikiHow's marks in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _asked(question: str, answers: list[str], gold: int) -> Item:
    return Item((question,) * len(answers), tuple(f" {answer}" for answer in answers), gold)
