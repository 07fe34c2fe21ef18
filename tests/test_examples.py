"""Windows as questions: each kind of model is asked what it was trained for, and nothing is asked twice or lost."""

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import shared, token_ids

from blockpruner.errors import InputError
from blockpruner.texts.examples import IGNORED, MASKED, Examples, Signs, examples_of

T5 = Signs(last=1, sentinels=tuple(range(127, 107, -1)))
BERT = Signs(first=101, last=102, mask=103)


def seq2seq(name="seq2seq/t5"):
    model = zoo.build(name)
    model.config.decoder_start_token_id = 0
    return model


def test_a_decoder_predicts_every_next_token():
    windows = token_ids(3, 9)
    found = examples_of(shared("llama"), windows)
    assert found.question == "next token"
    assert torch.equal(found.inputs["input_ids"], windows)
    assert torch.equal(found.targets[:, :-1], windows[:, 1:])
    assert (found.targets[:, -1] == IGNORED).all()
    assert found.lengths == (1, 1, 1)


def test_an_encoder_with_a_head_predicts_the_masked_tokens():
    windows = token_ids(4, 42)
    found = examples_of(zoo.build("masked/bert"), windows, BERT, seed=3)
    ids, targets = found.inputs["input_ids"], found.targets
    assert ids.shape == windows.shape
    assert (ids[:, 0] == 101).all()
    assert (ids[:, -1] == 102).all()
    hidden = targets != IGNORED
    assert hidden.sum(dim=1).tolist() == [round(MASKED * 40)] * 4
    assert (ids[hidden] == 103).all()
    assert torch.equal(torch.where(hidden, targets, ids)[:, 1:-1], windows[:, :40])
    assert not hidden[:, [0, -1]].any()


def test_what_is_hidden_depends_on_the_seed_and_the_window_alone():
    model, windows = zoo.build("masked/bert"), token_ids(4, 42)
    found = examples_of(model, windows, BERT, seed=3)
    alone = examples_of(model, windows[:2], BERT, seed=3)
    assert torch.equal(found.targets[:2], alone.targets)
    assert not torch.equal(found.targets, examples_of(model, windows, BERT, seed=4).targets)
    places = {tuple(row.nonzero()[:, 0].tolist()) for row in found.targets != IGNORED}
    assert len(places) == 4, "each window its own"


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused_by_name():
    with pytest.raises(InputError, match="BertForMaskedLM predicts masked tokens, and its tokenizer has no mask"):
        examples_of(zoo.build("masked/bert"), token_ids(), Signs())


def restored(given_ids, wanted, sentinels, end):
    """The window that spans, put back at their sentinels, make."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in wanted[: len(wanted) - (end is not None)]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text = given_ids[: len(given_ids) - (end is not None)]
    return [piece for token in text for piece in (spans[token] if token in sentinels else [token])]


@given(length=st.integers(4, 90), seed=st.integers(0, 2**31), sentinels=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_spans_put_back_at_their_sentinels_make_the_window_again(length, seed, sentinels):
    signs = Signs(last=1, sentinels=T5.sentinels[:sentinels])
    windows = torch.arange(3, 3 + length).repeat(2, 1)
    found = examples_of(MODEL, windows % 100, signs, seed=seed)
    assert found.question == "corrupted spans"
    for ids, decoder, targets, window in zip(
        *(t.tolist() for t in (found.inputs["input_ids"], found.inputs["decoder_input_ids"], found.targets)),
        (windows % 100).tolist(),
        strict=True,
    ):
        assert restored(ids, targets, signs.sentinels, 1) == window
        assert decoder == [0, *targets[:-1]]
        assert ids[-1] == targets[-1] == 1
        hidden = sum(token not in signs.sentinels for token in targets) - 1
        assert hidden == max(1, round(MASKED * length))


MODEL = seq2seq()


def test_an_encoder_decoder_with_a_mask_token_restores_the_whole_text():
    windows = token_ids(3, 30)
    found = examples_of(seq2seq("seq2seq/bart"), windows, Signs(first=0, last=2, mask=103))
    assert found.question == "denoising"
    assert torch.equal(found.targets[:, 1:-1], windows[:, :28])
    changed = found.inputs["input_ids"] != found.targets
    assert (found.inputs["input_ids"][changed] == 103).all()
    assert changed.sum(dim=1).tolist() == [round(MASKED * 28)] * 3
    assert torch.equal(found.inputs["decoder_input_ids"][:, 1:], found.targets[:, :-1])


def test_any_other_encoder_decoder_goes_on_from_the_first_half():
    windows = token_ids(3, 31)
    found = examples_of(seq2seq("seq2seq/marian"), windows)
    assert found.question == "continuation"
    assert torch.equal(found.inputs["input_ids"], windows[:, :15])
    assert torch.equal(found.targets, windows[:, 15:])


def uneven():
    ids = torch.arange(7 * 5).view(7, 5)
    return Examples("choices", {"input_ids": ids}, ids, (2, 1, 3, 1), (0, 0, 2, 0))


def test_answers_are_not_padded_further_than_the_longest_beside_them():
    ids = torch.arange(3 * 6).view(3, 6)
    targets = torch.full_like(ids, IGNORED)
    targets[0, 1], targets[1, 2], targets[2, 4] = 7, 7, 7
    whole = Examples("choices", {"input_ids": ids}, targets, (2, 1), (0, 0))
    short, long = whole.batches(1)
    assert torch.equal(short.inputs["input_ids"], ids[:2, :4])
    assert torch.equal(short.targets, targets[:2, :4])
    assert torch.equal(long.targets, targets[2:])


@pytest.mark.parametrize("tokens", [1, 10, 15, 20, 1000])
def test_micro_batches_are_whole_units_in_order_and_nothing_is_lost(tokens):
    whole = uneven()
    parts = whole.batches(tokens)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in parts]), whole.inputs["input_ids"])
    assert [length for part in parts for length in part.lengths] == list(whole.lengths)
    assert [gold for part in parts for gold in part.gold] == list(whole.gold)
    assert all(sum(part.lengths) * 5 <= tokens or len(part) == 1 for part in parts)


def test_rows_are_the_examples_one_by_one():
    rows = list(uneven().rows())
    assert len(rows) == 7
    assert torch.equal(torch.cat([row.targets for row in rows]), uneven().targets)
