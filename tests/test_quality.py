"""Quality figures against computations of their own, written out here from plain forward passes."""

import math
import statistics
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Estimate
from blockpruner.blocks import parse_mask
from blockpruner.errors import CheckFailedError
from blockpruner.evaluation import quality
from blockpruner.evaluation.quality import Evaluation, evaluate_masks, greedy_sample, load_text
from blockpruner.loading.models import load
from blockpruner.surgery.removal import prune_
from blockpruner.texts.calibration import load_calibration

WINDOW = 24
MASKS = {
    "dense": parse_mask("dense"),
    "pruned": parse_mask("attention.1+mlp.3"),
    "again": parse_mask("attention.1+mlp.3"),
    "deeper": parse_mask("attention.1+mlp.2+mlp.3"),
}


@pytest.fixture(scope="module")
def opened(checkpoint):
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    return loaded.model, read_anatomy(loaded.model), loaded.tokenizer


@pytest.fixture(scope="module")
def text(opened, prose):
    return load_calibration(str(prose), opened[2], window=WINDOW, windows=6)


@pytest.fixture(scope="module")
def found(opened, text):
    return {entry.name: entry for entry in evaluate_masks(opened[0], opened[1], text, MASKS)}


def plain_token_losses(model, windows):
    """The loss of each predicted token [windows, tokens - 1], by the definition."""
    with torch.no_grad():
        probabilities = model(windows).logits.double().softmax(dim=-1)
    return -probabilities[:, :-1].gather(2, windows[:, 1:, None]).squeeze(2).log()


def without(checkpoint, mask):
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    return prune_(loaded.model, mask)


@pytest.mark.parametrize("name", ["dense", "deeper"])
def test_perplexity_and_its_standard_error_are_those_of_the_windows(found, text, checkpoint, name):
    losses = plain_token_losses(without(checkpoint, MASKS[name]), text.windows).mean(dim=1).tolist()
    mean, stderr = statistics.mean(losses), statistics.stdev(losses) / len(losses) ** 0.5
    assert found[name].loss.value == pytest.approx(mean, abs=1e-5)
    assert found[name].loss.stderr == pytest.approx(stderr, abs=1e-5)
    assert found[name].perplexity.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found[name].perplexity.stderr == pytest.approx(math.exp(mean) * stderr, rel=1e-3)
    assert (found[name].loss.n, found[name].loss.unit) == (len(losses), "nats per token")


def test_bits_per_byte_is_the_information_of_the_text_over_its_size(found, text, opened, checkpoint):
    losses = plain_token_losses(opened[0], text.windows)
    size = sum(len(opened[2].decode(window[1:]).encode()) for window in text.windows)
    assert found["dense"].bits_per_byte.value == pytest.approx(float(losses.sum()) / math.log(2) / size, rel=1e-5)


def test_sizes_are_those_of_the_model_that_is_left(found, checkpoint):
    for name, mask in MASKS.items():
        model = without(checkpoint, mask)
        assert found[name].parameters == sum(parameter.numel() for parameter in model.parameters())
        attentions = 4 - sum(block.kind == "attention" for block in mask)
        assert found[name].cache_bytes == attentions * 2 * 2 * 8 * 4  # keys, values x heads x width x float32
    assert (found["deeper"].removed, found["dense"].removed) == ("attention.1+mlp.2+mlp.3", "dense")


def test_masks_in_one_sweep_are_evaluated_as_if_alone(found, opened, text):
    for name, mask in MASKS.items():
        (alone,) = evaluate_masks(opened[0], opened[1], text, {name: mask})
        assert alone == found[name]
    assert found["again"].loss == found["pruned"].loss


def test_what_the_numbers_rest_on_is_said_with_them(found, opened, text, tmp_path):
    assert {entry.fingerprint for entry in found.values()} == {text.record.fingerprint}
    assert {entry.dtype for entry in found.values()} == {"float32"}
    evaluation = Evaluation.of(list(found.values()), text.record)
    evaluation.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == evaluation


def test_one_window_has_no_standard_error_and_says_why(opened, prose):
    text = load_calibration(str(prose), opened[2], window=WINDOW, windows=1)
    (found,) = evaluate_masks(opened[0], opened[1], text, {"dense": frozenset()})
    assert found.loss.stderr is None
    assert found.perplexity.stderr is None
    assert found.perplexity.reason == "one unit has no spread"


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4])
def test_a_contestant_without_a_finite_perplexity_is_named(opened, text, monkeypatch, loss):
    bad = parse_mask("mlp.0")

    def batch_losses(objective, masks, batch):
        return [(loss if mask == bad else 1.0,) for mask in masks]

    monkeypatch.setattr(quality.ModelObjective, "batch_losses", batch_losses)
    with pytest.raises(CheckFailedError, match=r"^broken has no finite perplexity: .* (nan|inf|10000.0) nats"):
        evaluate_masks(opened[0], opened[1], text, {"dense": frozenset(), "broken": bad})


def test_progress_is_told_from_begin_to_end(opened, text):
    told = []
    evaluate_masks(opened[0], opened[1], text, MASKS, progress=lambda done, total, _: told.append((done, total)))
    total = len(set(MASKS.values()))
    assert told == [(done, total) for done in range(total + 1)]


@pytest.mark.parametrize(
    ("data", "given", "expected"),
    [
        ("wikitext2", None, "test"),
        ("wikitext2[0:10]", None, "test"),
        ("wikitext2", "validation", "validation"),
        ("wikitext2:wiki.test.raw", None, None),
        ("org/name", None, None),
    ],
)
def test_wikitext2_means_its_test_part(monkeypatch, data, given, expected):
    monkeypatch.setattr(quality, "load_calibration", lambda source, tokenizer, **options: (source, options["split"]))
    tokenizer: Any = None
    assert load_text(data, tokenizer, tiny.shared("llama"), split=given) == (data, expected)


def test_a_greedy_sample_goes_on_with_the_most_likely_tokens(opened):
    model, _, tokenizer = opened
    ids = tokenizer("The quick brown", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert greedy_sample(model, tokenizer, "The quick brown", tokens=5) == tokenizer.decode(ids[0, start:])


@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=12), st.integers(1, 500))
def test_with_windows_of_one_size_bits_per_byte_is_an_ordinary_mean(bits, size):
    found = Estimate.ratio(bits, [size] * len(bits), "bits per byte")
    each = [b / size for b in bits]
    assert found.value == pytest.approx(statistics.mean(each))
    assert found.stderr == pytest.approx(statistics.stdev(each) / len(each) ** 0.5, abs=1e-9)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=12), st.floats(0.1, 5))
def test_windows_that_agree_on_bits_per_byte_leave_no_doubt_about_it(sizes, rate):
    found = Estimate.ratio([rate * size for size in sizes], sizes, "bits per byte")
    assert found.value == pytest.approx(rate)
    assert found.stderr == pytest.approx(0, abs=1e-6)
