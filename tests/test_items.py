"""Multiple-choice items: the usual files are read as their harness reads them, and scored as it scores them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import anatomy_of, shared

from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.objectives.accuracy import Accuracy
from blockpruner.texts.examples import IGNORED
from blockpruner.texts.items import Item, item_examples, read_items

RECORDS = [
    (
        {"goal": "Boil an egg.", "sol1": "In water.", "sol2": "In sand.", "label": 0},
        Item(("Question: Boil an egg.\nAnswer:",) * 2, (" In water.", " In sand."), 0),
    ),
    (
        {"question": "What is wet?", "choices": {"text": ["Sand", "Sea"], "label": ["1", "2"]}, "answerKey": "2"},
        Item(("Question: What is wet?\nAnswer:",) * 2, (" Sand", " Sea"), 1),
    ),
    (
        {"question_stem": "The sea is", "choices": {"text": ["dry", "wet"], "label": ["A", "B"]}, "answerKey": "B"},
        Item(("The sea is",) * 2, (" dry", " wet"), 1),
    ),
    (
        {"question": " Which? ", "choices": ["a", "b", "c"], "answer": 2, "subject": "high_school_biology"},
        Item(
            (
                "The following are multiple choice questions (with answers) about high school biology.\n\n"
                "Which?\nA. a\nB. b\nC. c\nAnswer:",
            )
            * 3,
            (" A", " B", " C"),
            2,
        ),
    ),
    (
        {"sentence": "The cup fell off _ since it was wet.", "option1": "Tom", "option2": "Ann", "answer": "2"},
        Item(("The cup fell off Tom", "The cup fell off Ann"), (" since it was wet.",) * 2, 1),
    ),
    (
        {"passage": "Seas are salty.", "question": "is the sea salty", "label": 1},
        Item(("Seas are salty.\nQuestion: is the sea salty?\nAnswer:",) * 2, (" no", " yes"), 1),
    ),
    (
        {
            "ctx": "x",
            "activity_label": "Cooking",
            "ctx_a": "He cooks. [header] How",
            "ctx_b": "then he",
            "endings": ["eats [substeps] it.", "runs."],
            "label": 1,
        },
        Item(("Cooking: He cooks. How Then he",) * 2, (" eats it.", " runs."), 1),
    ),
    ({"context": "One, two,", "choices": ["three", "six"], "gold": 0}, Item(("One, two,",) * 2, (" three", " six"), 0)),
]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(("record", "item"), RECORDS, ids=lambda value: "")
def test_a_record_of_a_known_task_is_read_as_its_harness_reads_it(record, item, tmp_path):
    label, items = read_items(written(tmp_path / "task.jsonl", [record]))
    assert (label, items) == ("task.jsonl", [item])


def test_a_part_of_a_file_is_named_by_its_records(tmp_path):
    source = written(tmp_path / "task.jsonl", [record for record, _ in RECORDS])
    label, items = read_items(f"{source}[1:3]")
    assert label == "task.jsonl[1:3]"
    assert items == [item for _, item in RECORDS[1:3]]


def test_a_file_of_items_may_be_longer_than_what_is_read_of_a_text(tmp_path, monkeypatch):
    source = written(tmp_path / "task.jsonl", [record for record, _ in RECORDS])
    monkeypatch.setattr("blockpruner.texts.files.MAX_TEXT", Path(source).stat().st_size // 2)
    assert read_items(source) == ("task.jsonl", [item for _, item in RECORDS])


@pytest.mark.parametrize(
    "record",
    [{"text": "prose"}, {"context": "x", "choices": ["a"], "gold": 0}, {"goal": "g", "sol1": "a", "sol2": "b"}, []],
)
def test_what_is_no_item_is_named_by_file_and_record(record, tmp_path):
    source = written(tmp_path / "task.jsonl", [RECORDS[0][0], record])
    with pytest.raises(InputError, match=r"task.jsonl, line 2 is no multiple-choice item"):
        read_items(source)
    with pytest.raises(InputError, match="no source of multiple-choice items"):
        read_items("builtin")


class Letters:
    """A tokenizer of single letters."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 120 for letter in text]}


LETTERS: Any = Letters()


@torch.no_grad()
@pytest.mark.parametrize("per", ["answer", "token"])
def test_the_likelier_answer_is_the_given_one_and_padding_changes_nothing(per):
    model, anatomy, letters = shared("llama"), anatomy_of("llama"), LETTERS
    items = [item for _, item in RECORDS if len(item.prompts[0]) < 40]
    examples, record = item_examples(items, letters, "letters")
    assert record.bos == "window"
    wrong = []
    for item in items:
        costs = []
        for prompt, answer in zip(item.prompts, item.answers, strict=True):
            before, whole = letters(prompt)["input_ids"], letters(prompt + answer)["input_ids"]
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            cost = -sum(float(scores[i - 1, whole[i]]) for i in range(len(before), len(whole)))
            costs.append(cost / len(answer) if per == "token" else cost)
        wrong.append(float(costs.index(min(costs)) != item.gold))
    assert 0 < sum(wrong) < len(wrong)
    found = ModelObjective(model, anatomy, examples, Accuracy(per), batch_tokens=100)
    assert found.batches > 1
    losses = [value for batch in range(found.batches) for value in next(iter(found.batch_losses([frozenset()], batch)))]
    assert losses == wrong


def test_another_right_answer_is_another_question():
    first, second = (item_examples([Item(("a?",) * 2, (" b", " c"), gold)], LETTERS, "x")[0] for gold in (0, 1))
    assert first.fingerprint != second.fingerprint


def test_an_answer_that_nothing_stands_before_is_refused(make_tokenizer):
    with pytest.raises(InputError, match="begins with its answer"):
        item_examples([Item(("", ""), (" b", " c"), 0)], make_tokenizer("none"), "x")


def test_only_the_tokens_of_the_answers_are_to_be_predicted():
    examples, _ = item_examples([RECORDS[2][1]], LETTERS, "letters")
    asked = examples.targets != IGNORED
    assert asked.sum(dim=1).tolist() == [len(" dry"), len(" wet")]
    assert examples.lengths == (2,)
    assert examples.gold == (1,)


def test_an_item_that_is_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match=r"an item of letters has \d+ tokens, and the model's context is 8"):
        item_examples([RECORDS[0][1]], LETTERS, "letters", longest=8)
