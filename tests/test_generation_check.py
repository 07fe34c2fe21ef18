"""What models write and answer, against greedy decoding written out plainly; and the verdict on made-up writings."""

import itertools
import math
import re

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.errors import InputError
from blockpruner.evaluation.generation import ask, check_writes, prompts_of, read_by, write, written_by
from blockpruner.evaluation.probes import PROBES, Question, questions
from blockpruner.evaluation.repetition import distinct_share, longest_loop, repeated_share
from blockpruner.evaluation.verdict import GenerationCheck, judged
from blockpruner.evaluation.writings import Writing, Written
from blockpruner.loading.models import load
from blockpruner.surgery.removal import skipped
from blockpruner.texts.calibration import load_calibration

PROMPTS = ("The quick brown fox", "A block is one", "and the dog", "The quick brown cat")
tokens = st.lists(st.integers(0, 2), max_size=14)


class Letters:
    """A tokenizer of one token a character, for models with a tiny vocabulary."""

    eos_token_id, pad_token_id = None, 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + token % 26) for token in ids)


@pytest.fixture(scope="module")
def opened(checkpoint):
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    return loaded.model, loaded.tokenizer


def greedy(model, ids, count, never=()):
    """The most likely tokens, one after another, without a cache and one text at a time."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[list(never)] = -math.inf
            ids = [*ids, int(logits.argmax())]
    return tuple(ids[-count:])


# Repetition


@given(tokens, st.integers(1, 4))
def test_repeated_share_counts_the_n_grams_that_were_there_before(found, n):
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    again = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert repeated_share(found, n) == pytest.approx(again / len(grams) if grams else 0)
    assert distinct_share(found, n) == pytest.approx(1 - repeated_share(found, n))


@given(tokens)
def test_the_longest_loop_is_the_longest_stretch_that_repeats_a_piece(found):
    longest = 0
    for start, end in itertools.combinations(range(len(found) + 1), 2):
        stretch = found[start:end]
        for period in range(1, len(stretch) // 2 + 1):
            if all(stretch[i] == stretch[i - period] for i in range(period, len(stretch))):
                longest = max(longest, len(stretch))
    assert longest_loop(found) == longest


# Probes


def test_questions_are_the_same_every_time_and_have_one_right_answer():
    for probe in PROBES:
        assert questions(probe, 1) == questions(probe, 1) != questions(probe, 2)
        assert all(one.answer.startswith(" ") and not one.prompt.endswith(" ") for one in questions(probe))
    for one in questions("arithmetic"):
        for a, b, c in re.findall(r"(\d) \+ (\d) = (\d+)", one.prompt + one.answer):
            assert int(a) + int(b) == int(c) < 10
    for one in questions("retrieval"):
        asked = one.prompt.rsplit("\n", 1)[1]
        assert one.prompt.count(f"{asked}{one.answer}.") == 1
    for one in questions("copying"):
        first, second, third = (one.prompt + one.answer).split("\n")
        assert first == second == third


def test_a_question_is_answered_if_greedy_decoding_writes_the_answer(opened):
    model, tokenizer = opened
    before = tokenizer(PROMPTS[0])["input_ids"]
    written = greedy(model, before, 3)
    right = Question(PROMPTS[0], tokenizer.decode(written))
    assert tokenizer(right.prompt + right.answer)["input_ids"] == [*before, *written], "else this shows nothing"
    assert ask(model, tokenizer, right)
    assert not ask(model, tokenizer, Question(PROMPTS[0], right.answer + " sleeps naïve"))
    assert not ask(model, tokenizer, Question(PROMPTS[0], " naïve" + right.answer))


# Writing and reading


def test_what_a_model_writes_are_the_most_likely_tokens_but_never_the_end(opened):
    model, tokenizer = opened
    found = write(model, tokenizer, PROMPTS, tokens=6)
    for prompt, writing in zip(PROMPTS, found, strict=True):
        expected = greedy(model, tokenizer(prompt)["input_ids"], 6, never=[model.generation_config.eos_token_id])
        assert writing.tokens == expected
        assert writing.text == tokenizer.decode(expected)


@pytest.mark.parametrize("name", ["causal/mamba", "causal/gpt2", "causal/gemma3_text", "causal/qwen2_moe"])
def test_prompts_of_other_lengths_do_not_touch_each_other_in_any_architecture(name):
    model, prompts = zoo.build(name), ("abcd", "abcdefg", "dcba")
    letters = Letters()
    found = write(model, letters, prompts, tokens=4)  # pyright: ignore[reportArgumentType]
    for prompt, writing in zip(prompts, found, strict=True):
        assert writing.tokens == greedy(model, letters(prompt)["input_ids"], 4)


def test_the_reference_reads_with_its_mean_loss_on_the_continuation(opened):
    model, tokenizer = opened
    mine = written_by(model, tokenizer, PROMPTS, name="dense", computation="x", tokens=5)
    assert not mine.was_read
    found = read_by(model, tokenizer, PROMPTS, mine)
    for prompt, writing in zip(PROMPTS, found.writings, strict=True):
        before = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *writing.tokens]])).logits[0].double().log_softmax(-1)
        picked = [float(logits[len(before) - 1 + i, token]) for i, token in enumerate(writing.tokens)]
        assert writing.loss == pytest.approx(-sum(picked) / 5, abs=1e-5)


def test_what_another_tokenizer_wrote_is_read_as_text(opened, make_tokenizer):
    model, tokenizer = opened
    bare = make_tokenizer("known")
    text = " jumps over the lazy dog"
    other = Written(
        name="other",
        dtype="float32",
        computation="",
        tokenizer="foreign",
        writings=(Writing(text=text, tokens=(7, 7, 7)),),
        answers={},
    )
    (found,) = read_by(model, tokenizer, PROMPTS[:1], other).losses
    same = other.model_copy(
        update={"writings": (Writing(text="", tokens=tuple(bare(text)["input_ids"])),), "tokenizer": ""}
    )
    own = written_by(model, tokenizer, PROMPTS[:1], name="own", computation="", tokens=1)
    (expected,) = read_by(model, tokenizer, PROMPTS[:1], same.model_copy(update={"tokenizer": own.tokenizer})).losses
    assert found == pytest.approx(expected)


def test_prompts_are_the_beginnings_of_windows_from_all_over_the_text(opened, prose):
    tokenizer = opened[1]
    data = load_calibration(str(prose), tokenizer, window=24, windows=20)
    found = prompts_of(data, tokenizer, count=4, tokens=10)
    starts = [
        tokenizer.decode(data.windows[number][:10], skip_special_tokens=True).rstrip() for number in (0, 5, 10, 15)
    ]
    assert list(found) == starts
    assert len(prompts_of(data, tokenizer, count=50)) == 20


def test_a_model_that_does_not_go_on_with_text_is_refused():
    with pytest.raises(InputError, match="nothing to write"):
        check_writes(zoo.build("masked/bert"))


def test_a_model_without_most_of_its_blocks_is_worse_than_itself(opened, prose):
    """End to end, on a tiny model that has learned its text."""
    model, tokenizer = opened
    prompts = prompts_of(load_calibration(str(prose), tokenizer, window=24, windows=20), tokenizer, tokens=10)
    anatomy = read_anatomy(model)
    found = {}
    for name, mask in {"dense": [], "again": ["attention.2"], "gutted": list(map(str, anatomy.parts))}.items():
        with skipped(model, mask, anatomy=anatomy):
            written = written_by(model, tokenizer, prompts, name=name, computation="", tokens=12)
        found[name] = read_by(model, tokenizer, prompts, written)
    check = GenerationCheck.of(prompts, list(found.values()))
    reference, again, gutted = check.judgements
    assert (reference.verdict, again.verdict) == ("reference", "ok"), "attention.2 of this model does nothing"
    assert again.agreement.value == again.length == 12
    assert gutted.verdict in ("worse", "collapsed")
    assert gutted.reasons


# The verdict


def made(name="other", losses=(1.0,) * 8, text=tuple(range(48)), **answers):
    writings = tuple(Writing(text="", tokens=text, loss=loss) for loss in losses)
    probes = {"copying": 12, "retrieval": 2, "arithmetic": 9} | answers
    return Written(
        name=name,
        dtype="float32",
        computation="",
        tokenizer="",
        writings=writings,
        answers={probe: tuple(n < right for n in range(12)) for probe, right in probes.items()},
    )


DENSE = made("dense")


@pytest.mark.parametrize(
    ("written", "verdict", "reason"),
    [
        (made(), "ok", None),
        (made(losses=(1.2, 0.9) * 4), "ok", None),
        (made(losses=(1.7, 1.6) * 4), "worse", "+0.65 nats"),
        (made(losses=(9.0, *(1.0,) * 7)), "ok", None),  # one text of eight: within two standard errors
        (made(losses=(4.0, 3.0) * 4), "collapsed", "+2.50 nats"),
        (made(text=(5, 6) * 24), "collapsed", "rep-4 +0.96"),
        (made(text=(*range(32), *range(16))), "worse", "rep-4 +0.29"),
        (made(copying=8), "ok", None),  # McNemar: 4 of 4 is chance at 1 %
        (made(copying=4), "worse", "copying: 4 of 12 right, 12 before"),
        (made(copying=0), "collapsed", "copying: 0 of 12 right, 12 before"),
        (made(retrieval=0), "ok", None),  # the dense model cannot do it either
        (made(losses=(0.1, 0.2) * 4, copying=12, arithmetic=12), "ok", None),
    ],
)
def test_the_verdict_follows_its_thresholds(written, verdict, reason):
    found = judged(DENSE, written)
    assert found.verdict == verdict, found
    assert found.silent == ("retrieval",)
    assert bool(found.reasons) == (reason is not None)
    assert reason is None or reason in found.reasons[0]


def test_a_check_is_read_back_as_it_was_written_and_judges_only_what_was_read(tmp_path):
    unread = made().model_copy(update={"name": "unread", "writings": (Writing(text="x", tokens=(1,)),) * 8})
    check = GenerationCheck.of(["a"] * 8, [DENSE, made(), unread])
    check.save(tmp_path / "generation.json")
    assert GenerationCheck.load(tmp_path / "generation.json") == check
    assert [one.name for one in check.judgements] == ["dense", "other"]
