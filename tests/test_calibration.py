"""Calibration: the windows are the text that was named, all of it, once, and in an order that can be told."""

import json
import random
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from blockpruner.errors import InputError
from blockpruner.texts import calibration
from blockpruner.texts.calibration import BosPolicy, CalibrationRecord, fingerprint, load_calibration, resolve_bos

DOCUMENTS = [
    f"Document {number} tells of {number * number} foxes and a dog.\nThe naïve cat sleeps." for number in range(40)
]


def jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path / "forty.jsonl", DOCUMENTS)


def plain_tokens(tokenizer, documents):
    """The definition: all documents joined, tokenised at once, no special tokens."""
    return tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]


texts_of_people = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6)


class TestWindows:
    @settings(deadline=None, max_examples=60)
    @given(documents=texts_of_people, window=st.integers(2, 9), bos=st.sampled_from(["none", "window", "stream"]))
    def test_they_cut_the_stream_into_parts_that_follow_each_other(
        self, tmp_path_factory, tokenizer, documents, window, bos
    ):
        source = jsonl(tmp_path_factory.mktemp("texts") / "some.jsonl", documents)
        stream = plain_tokens(tokenizer, documents)
        taken = window - 1 if bos == "window" else window
        count = (len(stream) + (bos == "stream")) // taken
        if count == 0:
            with pytest.raises(InputError, match="0 windows"):
                load_calibration(source, tokenizer, window=window, seed=None, bos=bos)
            return
        found = load_calibration(source, tokenizer, window=window, seed=None, bos=bos)
        assert found.windows.dtype == torch.int64
        assert found.windows.shape == (count, window)
        rows = found.windows
        if bos == "window":
            assert (rows[:, 0] == tokenizer.bos_token_id).all()
            rows = rows[:, 1:]
        if bos == "stream":
            stream = [tokenizer.bos_token_id, *stream]
        assert rows.flatten().tolist() == stream[: count * taken]

    @pytest.mark.parametrize("bos", ["none", "window", "stream"])
    def test_fewer_of_them_are_the_first_of_all(self, tokenizer, source, bos):
        everything = load_calibration(source, tokenizer, window=16, bos=bos)
        assert len(everything.windows) > 50
        for count in (1, 2, 7, 40):
            some = load_calibration(source, tokenizer, window=16, windows=count, bos=bos)
            assert torch.equal(some.windows, everything.windows[:count])
            assert some.bytes_per_window == everything.bytes_per_window[:count]

    def test_they_do_not_depend_on_how_much_text_is_tried_first(self, tmp_path, tokenizer, monkeypatch):
        # About one token a character, so that a text ends close behind the tokens, and within words; then fewer.
        source = jsonl(tmp_path / "dogs.jsonl", [" dogéééé" * 30 + " dog and the lazy dog" * 20])
        everything = load_calibration(source, tokenizer, window=2, bos="none").windows
        monkeypatch.setattr(calibration, "_CHARACTERS_PER_TOKEN", 1)
        for count in range(1, len(everything)):
            some = load_calibration(source, tokenizer, window=2, bos="none", windows=count)
            assert torch.equal(some.windows, everything[:count])

    def test_a_long_text_is_tokenised_only_as_far_as_they_reach(self, tmp_path, tokenizer, monkeypatch):
        lengths = []
        encode = calibration._encode
        monkeypatch.setattr(
            calibration, "_encode", lambda _, text, **more: lengths.append(len(text)) or encode(_, text, **more)
        )
        (tmp_path / "long.txt").write_text("The quick brown fox. " * 50_000)
        load_calibration(str(tmp_path / "long.txt"), tokenizer, window=16, windows=4)
        assert sum(lengths) < 10_000

    def test_a_number_of_tokens_is_rounded_up_to_windows(self, tokenizer, source):
        assert len(load_calibration(source, tokenizer, window=16, tokens=64).windows) == 4
        assert len(load_calibration(source, tokenizer, window=16, tokens=65).windows) == 5

    def test_what_looks_like_a_special_token_stays_text(self, tmp_path, tokenizer):
        source = jsonl(tmp_path / "sly.jsonl", ["The dog <bos> and the <eos> cat " * 5])
        ids = load_calibration(source, tokenizer, window=20, windows=3).windows
        assert not (ids[:, 1:] <= tokenizer.eos_token_id).any()
        assert "<eos>" in tokenizer.decode(ids.flatten())

    def test_all_ids_are_in_the_vocabulary(self, tokenizer, source):
        ids = load_calibration(source, tokenizer, window=16).windows
        assert set(ids.unique().tolist()) <= set(tokenizer.get_vocab().values())

    def test_too_short_a_text_says_how_many_windows_there_are(self, tokenizer, source):
        held = len(load_calibration(source, tokenizer, window=64).windows)
        with pytest.raises(InputError, match=f"make {held} windows of 64, {held + 1} were asked for"):
            load_calibration(source, tokenizer, window=64, windows=held + 1)

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            ({"window": 1}, "predicts nothing"),
            ({"window": 8, "windows": 2, "tokens": 16}, "both"),
            ({"window": 8, "windows": 0}, "fewer than one"),
            ({"window": 8, "tokens": -5}, "fewer than one"),
        ],
    )
    def test_sizes_that_make_no_sense_are_refused(self, tokenizer, source, asked, reason):
        with pytest.raises(InputError, match=reason):
            load_calibration(source, tokenizer, **asked)


class TestOrder:
    def test_a_seed_decides_the_order_and_the_fingerprint(self, tokenizer, source):
        prints = [load_calibration(source, tokenizer, window=16, seed=seed).record.fingerprint for seed in range(5)]
        assert len(set(prints)) == 5
        assert load_calibration(source, tokenizer, window=16, seed=3).record.fingerprint == prints[3]

    def test_the_shuffle_is_that_of_the_standard_library(self, tokenizer, source):
        documents = list(DOCUMENTS)
        random.Random(7).shuffle(documents)
        found = load_calibration(source, tokenizer, window=16, seed=7, bos="none").windows
        assert found.flatten().tolist() == plain_tokens(tokenizer, documents)[: found.numel()]

    def test_a_slice_is_taken_before_the_shuffle(self, tokenizer, source):
        found = load_calibration(f"{source}[10:12]", tokenizer, window=8, seed=1, bos="none").windows
        text = tokenizer.decode(found.flatten())
        assert "Document 10 " in text
        assert "Document 11 " in text
        assert text.count("Document") == 2

    def test_a_recipe_keeps_its_own(self, tmp_path, tokenizer):
        path = tmp_path / "wiki.raw"
        path.write_text("".join(f" Line {number} of the text . \n" for number in range(50)))
        one, other = (load_calibration(f"wikitext2:{path}", tokenizer, window=16, seed=seed) for seed in (1, 2))
        assert one.record.fingerprint == other.record.fingerprint
        assert one.record.seed is None

    def test_without_a_shuffle_no_more_is_read_than_needed(self, tmp_path, tokenizer):
        path = tmp_path / "broken.jsonl"
        jsonl(path, ["The quick brown fox. " * 100] * 3)
        with path.open("a") as file:
            file.write("not JSON\n")
        assert len(load_calibration(str(path), tokenizer, window=8, windows=2, seed=None).windows) == 2
        with pytest.raises(InputError, match="line 4"):
            load_calibration(str(path), tokenizer, window=8, windows=2, seed=0)


class TestBos:
    @pytest.mark.parametrize(("bos", "policy"), [("added", "window"), ("known", "none"), ("none", "none")])
    def test_auto_does_what_the_tokenizer_does_by_itself(self, make_tokenizer, source, bos, policy):
        tokenizer = make_tokenizer(bos)
        assert resolve_bos(tokenizer, "auto") == policy
        assert load_calibration(source, tokenizer, window=16, windows=2).record.bos == policy

    @pytest.mark.parametrize("policy", ["stream", "window"])
    def test_a_policy_that_needs_a_bos_refuses_a_tokenizer_without(self, make_tokenizer, source, policy):
        with pytest.raises(InputError, match="no BOS token"):
            load_calibration(source, make_tokenizer("none"), window=16, bos=policy)

    def test_an_unknown_policy_is_refused(self, tokenizer, source):
        with pytest.raises(InputError, match="'always' is no BOS policy"):
            load_calibration(source, tokenizer, window=16, bos="always")


class TestRecord:
    def test_it_says_what_the_windows_are_and_no_folder(self, tokenizer, source):
        found = load_calibration(f"{source}[5:]", tokenizer, window=16, windows=3, seed=2)
        record = found.record
        assert record.source == "forty.jsonl[5:]"
        assert (record.window, record.windows, record.tokens, record.seed) == (16, 3, 48, 2)
        assert record.bytes == sum(found.bytes_per_window)
        assert CalibrationRecord.model_validate_json(record.model_dump_json()) == record

    def test_documents_are_counted_as_far_as_the_windows_reach(self, tokenizer, source):
        text = "\n\n".join(DOCUMENTS)
        ends = [
            end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        for count in (1, 5, 23):
            reached = text[: ends[count * 16 - 1]].count("D")
            record = load_calibration(source, tokenizer, window=16, windows=count, seed=None, bos="none").record
            assert record.documents == reached

    def test_the_fingerprint_is_the_same_on_every_machine(self):
        windows = torch.arange(6).view(2, 3)
        assert fingerprint(windows, "none") == "ade47d78d2649604197ad83ad20e85e31dc2176bfb530db01bd34ef11c7e7a6a"

    def test_the_fingerprint_sees_ids_shape_and_policy(self):
        windows = torch.arange(12).view(3, 4)
        others: list[tuple[torch.Tensor, BosPolicy]] = [
            (windows + 1, "none"),
            (windows.view(4, 3), "none"),
            (windows, "stream"),
            (windows[:2], "none"),
        ]
        assert len({fingerprint(ids, policy) for ids, policy in [(windows, "none"), *others]}) == 5

    def test_the_fingerprint_looks_at_values_not_at_memory(self):
        windows = torch.arange(12).view(4, 3)
        assert fingerprint(windows.t(), "none") == fingerprint(windows.t().contiguous(), "none")


class TestBytes:
    @settings(deadline=None, max_examples=60)
    @given(documents=texts_of_people, window=st.integers(2, 9))
    def test_with_a_bos_in_every_window_they_add_up_to_the_text(self, tmp_path_factory, tokenizer, documents, window):
        path = tmp_path_factory.mktemp("texts") / "some.jsonl"
        text = "\n\n".join(documents)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        count = len(offsets) // (window - 1)
        if count:
            found = load_calibration(jsonl(path, documents), tokenizer, window=window, seed=None, bos="window")
            assert found.record.bytes == len(text[: max(offsets[count * (window - 1) - 1])].encode())

    def test_they_are_those_of_the_predicted_tokens_alone(self, tokenizer, source):
        for bos in ("none", "stream"):
            found = load_calibration(source, tokenizer, window=16, bos=bos, seed=None)
            decoded = [tokenizer.decode(row[1:]) for row in found.windows]
            whole = [index for index, text in enumerate(decoded) if "\ufffd" not in text]
            assert len(whole) > 40
            assert [found.bytes_per_window[i] for i in whole] == [len(decoded[i].encode()) for i in whole]

    def test_a_tokenizer_without_offsets_has_the_text_spread_evenly(self, source):
        found = load_calibration(source, ByT5Tokenizer(), window=11, seed=None)
        assert found.record.bos == "none"
        assert all(abs(size - 10) <= 1 for size in found.bytes_per_window)
        assert found.record.documents == 40

    def test_a_tokenizer_that_cannot_be_asked_to_split_is_not_asked(self, tokenizer, source):
        class OnlyText:
            bos_token_id = tokenizer.bos_token_id

            def __call__(self, text, split_special_tokens=False, return_offsets_mapping=False, **options):
                assert not split_special_tokens
                assert not return_offsets_mapping
                return tokenizer(text, **options)

        found = load_calibration(source, cast(PreTrainedTokenizerBase, OnlyText()), window=16)
        assert torch.equal(found.windows, load_calibration(source, tokenizer, window=16).windows)
