"""What two texts have in common, told from the text itself and from a sketch of it."""

import base64

import numpy as np
import pytest
import torch
from labs import SIGNS, made

from blockpruner.repairs.courses import rows_of
from blockpruner.texts.examples import Signs, examples_of
from blockpruner.texts.overlap import KEPT, RUN, share_known, sketch, tokens_of, windows_in_common


def windows(count, tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 50_000, (count, tokens))


def known_of(known, rows):
    found = share_known(known, rows)
    assert found is not None
    assert found.stderr is not None
    return found.value, found.stderr


def test_text_that_was_seen_is_known_whole_however_it_is_cut():
    text = windows(20, 128)
    known = sketch([text])
    cuts = (text, text[:, :64], text[:, 7:100], windows(20, 128, seed=1))
    assert [known_of(known, cut) for cut in cuts] == [(1, 0), (1, 0), (1, 0), (0, 0)]


def test_the_share_is_that_of_the_runs_that_are_in_both_as_counted_one_by_one():
    text, other = windows(8, 100), windows(8, 100, seed=1)
    other[2, 10:70], other[5] = text[3, 5:65], text[0]
    held = {tuple(row[i : i + RUN]) for row in text for i in range(100 - RUN + 1)}
    asked = [tuple(row[i : i + RUN]) for row in other for i in range(100 - RUN + 1)]
    share, error = known_of(sketch([text]), other)
    assert share == pytest.approx(sum(run in held for run in asked) / len(asked))
    assert share > 0.1
    assert error == 0


def test_of_much_text_a_part_is_kept_and_the_share_is_near():
    text, other = windows(2000, 256), windows(100, 256, seed=1)
    known = sketch([text[:1200], text[1200:]])
    assert known == sketch([text])
    assert len(base64.b64decode(known)) == 8 * KEPT
    other[:40] = text[700:740]
    share, error = known_of(known, other)
    assert error == pytest.approx((0.24 / (100 * KEPT / 2000)) ** 0.5, rel=0.2)
    assert abs(share - 0.4) < 4 * error
    assert share_known(known, other[:5]) is None, "too few of these runs are in question"


@pytest.mark.parametrize("known", ["", "no sketch!", "AAAA", sketch([windows(3, RUN - 1)])])
def test_where_nothing_is_known_there_is_no_share(known):
    assert share_known(known, windows(2, 64)) is None


def test_windows_shorter_than_a_run_have_no_share():
    assert share_known(sketch([windows(3, 64)]), windows(3, RUN - 1)) is None


def test_a_sketch_says_the_same_of_any_kind_of_integers():
    text = windows(3, 64)
    assert sketch([text]) == sketch([text.astype(np.int32)]) == sketch([np.asfortranarray(text)])


def test_windows_in_common_are_those_with_two_runs_of_the_other_text():
    text, other = windows(4, 128), windows(4, 128, seed=1)
    other[1], other[2, 20:110] = text[0], text[3, 10:100]
    assert windows_in_common(text, other) == {1, 2}


@pytest.mark.parametrize("name", ["causal/llama", "masked/bert", "seq2seq/t5", "seq2seq/bart", "seq2seq/marian"])
def test_the_text_of_examples_is_that_which_was_cut_whatever_is_asked(name):
    model, _ = made(name)
    text = torch.randint(20, 60, (6, 64), generator=torch.Generator().manual_seed(0))
    signs = SIGNS if name != "seq2seq/marian" else Signs(last=0)
    one, other = (examples_of(model, rows, signs, seed=seed) for seed, rows in enumerate((text, text.flip(0))))
    assert windows_in_common(tokens_of(one), tokens_of(other)) == set(range(6))
    assert known_of(sketch([tokens_of(one)]), tokens_of(rows_of(other, [2, 3]))) == (1, 0)
    assert known_of(sketch([tokens_of(one.part(0, 3))]), tokens_of(other))[0] == pytest.approx(0.5)
