"""Chats: records of messages become what the model's own template makes of them, special tokens and all."""

import copy
import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from blockpruner.errors import InputError
from blockpruner.texts.calibration import load_calibration

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"How many foxes are {n}?"}, {"role": "assistant", "content": f"{n} foxes are {n}."}]
    for n in range(30)
]


@pytest.fixture
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def written(path, records: list[dict[str, Any]]):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rendered(tokenizer, chats):
    """The definition: each chat by the template, one after the other, the BOS of each left out."""
    ids = []
    for messages in chats:
        found = tokenizer.apply_chat_template(messages, return_dict=False)
        ids += found[1:] if found[0] == tokenizer.bos_token_id else found
    return ids


def test_the_stream_is_what_the_template_makes_of_each_chat(tmp_path, chatty):
    source = written(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    found = load_calibration(source, chatty, window=8, seed=None, bos="none")
    wanted = rendered(chatty, CHATS)
    assert found.windows.flatten().tolist() == wanted[: found.windows.numel()]
    assert found.windows.numel() > len(wanted) - 8
    assert (found.windows == chatty.eos_token_id).any()
    assert found.record.separator == ""


def test_a_policy_says_where_bos_stands_and_not_the_template(tmp_path, chatty):
    source = written(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    found = load_calibration(source, chatty, window=8, seed=None, bos="window")
    assert (found.windows[:, 0] == chatty.bos_token_id).all()
    assert not (found.windows[:, 1:] == chatty.bos_token_id).any()


def test_the_words_of_sharegpt_mean_the_same(tmp_path, chatty):
    names = {"user": "human", "assistant": "gpt"}
    other = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    ours = written(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    theirs = written(tmp_path / "shared.jsonl", [{"id": "x", "conversations": chat} for chat in other])
    one, two = (load_calibration(source, chatty, window=8) for source in (ours, theirs))
    assert one.record.fingerprint == two.record.fingerprint


def test_parquet_holds_chats_too_and_a_column_names_them(tmp_path, chatty):
    table = pyarrow.table({"text": ["no chat"] * len(CHATS), "talk": CHATS})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    lines = written(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    one = load_calibration(str(tmp_path / "chats.parquet"), chatty, window=8, column="talk")
    assert one.record.fingerprint == load_calibration(lines, chatty, window=8).record.fingerprint


def test_what_looks_like_a_special_token_stays_text_where_it_is_no_chat(tmp_path, chatty):
    words = [f"{n} foxes {chatty.eos_token} and a dog" for n in range(30)]
    source = written(tmp_path / "texts.jsonl", [{"text": text} for text in words])
    found = load_calibration(source, chatty, window=8, bos="none")
    assert not (found.windows == chatty.eos_token_id).any()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "holds no message"),
        ({"messages": ["hello"]}, "message 0 is not a role and its content"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 is not a role and its content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "no tools"),
        ({"text": "no chat"}, "some records are chats and others are text"),
    ],
)
def test_a_record_that_cannot_be_formatted_is_refused_by_place_and_reason(tmp_path, chatty, record, reason):
    source = written(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}, record])
    with pytest.raises(InputError, match=reason) as caught:
        load_calibration(source, chatty, window=8, seed=None)
    assert "others" in reason or "line 2" in caught.value.what


def test_without_a_template_there_is_no_chat(tmp_path, tokenizer):
    source = written(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(InputError, match=r"line 1.*has no chat template"):
        load_calibration(source, tokenizer, window=8)
