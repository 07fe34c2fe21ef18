"""Teaching without logits: the metric is the mean Fisher information of the head, and near the truth it is the KL."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from labs import apart, examples, made
from test_training import gradients, whole_loss

from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.recoveries import parse_chain
from blockpruner.repairs import fisher
from blockpruner.repairs.at_the_head import before_head, head_of
from blockpruner.repairs.fisher import FisherMetric
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench
from blockpruner.surgery.gaps import UNREPAIRED, Repair
from blockpruner.texts.examples import IGNORED

FAMILIES = [
    ("causal/llama", "mlp.1+attention.2"),
    ("causal/gpt2", "attention.3+mlp.3"),
    ("causal/mixtral", "mlp.1"),
    ("causal/mamba", "mixer.1"),
    ("masked/bert", "attention.2+mlp.2"),
    ("seq2seq/t5", "encoder.mlp.1+decoder.cross_attention.2"),
]


@pytest.mark.parametrize(("name", "mask"), FAMILIES)
def test_it_is_the_quadratic_form_of_the_mean_over_tokens(name, mask, monkeypatch):
    monkeypatch.setattr(fisher, "ROWS", 50)  # which does not divide the vocabulary
    model, anatomy = made(name)
    text = examples(model, 3, 16)
    asked = text.targets != IGNORED
    pupil = Pupil(model, anatomy, parse_mask(mask))
    lesson = FisherMetric(pupil, text)
    found, _ = gradients(pupil, dict(model.named_parameters()), lambda: lesson.backward(text, 1.0))
    with torch.no_grad():
        weight = head_of(model).weight.double()
        chances = model(**text.inputs).logits[asked].double().softmax(-1)
        whole = [weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight for p in chances]
        metric = torch.stack(whole).mean(0)
        there = before_head(model, text)
        with pupil.pruned():
            apart = (before_head(model, text) - there)[asked].double()
    torch.testing.assert_close(lesson.metric.double(), metric, atol=1e-6, rtol=1e-4)
    assert found == pytest.approx(0.5 * float(((apart @ metric) * apart).sum()), rel=1e-4)
    assert found > 0


@pytest.mark.parametrize(("name", "mask"), [*FAMILIES, ("causal/gemma2", "mlp.0")])
def test_where_predictions_are_close_it_is_their_divergence_and_so_is_its_slope(name, mask):
    """Of one token alone, for which the mean over tokens is its own."""
    model, anatomy = made(name)
    text = examples(model, 1, 16)
    first = int((text.targets != IGNORED).nonzero()[-1, 1])
    targets = torch.full_like(text.targets, IGNORED)
    targets[0, first] = text.targets[0, first]
    text = replace(text, targets=targets)
    numbers = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    close = {
        n: p.data + 2e-3 * p.data.std(unbiased=False) * torch.randn(p.shape, generator=generator)
        for n, p in numbers.items()
        if id(p) not in map(id, head_of(model).parameters()) and p.is_floating_point()
    }
    pupil = Pupil(model, anatomy, frozenset(), Repair({}, close))
    lesson = FisherMetric(pupil, text)
    value, slopes = gradients(pupil, numbers, lambda: lesson.backward(text, 1.0))
    truth, steps = gradients(pupil, numbers, lambda: whole_loss(pupil, text, "kl", 1.0, 0.0))
    assert value == pytest.approx(truth, rel=0.05)
    mine, theirs = (torch.cat([each[n].flatten() for n in close]) for each in (slopes, steps))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.99


@pytest.mark.parametrize(("name", "mask"), FAMILIES)
def test_its_slope_is_that_of_the_pruned_model_with_its_own_weights(name, mask):
    """Which are far from the dense ones: these must not be seen on the way back."""
    model, anatomy = made(name)
    text = examples(model, 2, 12)
    asked = text.targets != IGNORED
    head = [id(p) for p in head_of(model).parameters()]
    numbers = {n: p for n, p in model.named_parameters() if id(p) not in head and p.is_floating_point()}
    pupil = Pupil(model, anatomy, parse_mask(mask), Repair({}, apart(numbers)))
    lesson = FisherMetric(pupil, text)

    def plain():
        with torch.no_grad():
            there = before_head(model, text)
        with pupil.pruned():
            off = (before_head(model, text) - there)[asked]
            value = 0.5 * torch.einsum("ti,ij,tj->", off, lesson.metric, off)
            value.backward()
        return float(value.detach())

    value, slopes = gradients(pupil, numbers, lambda: lesson.backward(text, 1.0))
    truth, steps = gradients(pupil, numbers, plain)
    assert value == pytest.approx(truth, rel=1e-5)
    mine, theirs = (torch.cat([each[n].flatten() for n in numbers]) for each in (slopes, steps))
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_no_logits_are_made_once_the_metric_is_known():
    model, anatomy = made("causal/llama")
    text = examples(model, 2, 12)
    lesson = FisherMetric(Pupil(model, anatomy, parse_mask("mlp.1")), text)
    _ = lesson.metric
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    numbers = {name: p for name, p in model.named_parameters() if "layers" in name}
    _, found = gradients(lesson.pupil, numbers, lambda: lesson.backward(text, 1.0))
    handle.remove()
    assert not calls
    assert any(bool(gradient.any()) for gradient in found.values())


def test_a_distillation_by_it_leaves_the_head_as_it_is():
    model, anatomy = made("causal/llama")
    bench = Bench(model, anatomy, parse_mask("mlp.1"), examples(model, 4, 16), examples(model, 2, 16), force=True)
    (method,) = parse_chain("distill:loss=fisher,lr=0.01,batch=1,accumulate=1")
    repair: Any = method.repair(bench)[0]
    assert repair is not UNREPAIRED
    assert "lm_head.weight" not in repair.weights
    assert not torch.equal(repair.weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_a_head_that_is_no_linear_map_is_refused():
    model, anatomy = made("causal/llama")
    pupil = Pupil(model, anatomy, parse_mask("mlp.1"))
    head, model.lm_head = model.lm_head, torch.nn.Sequential(model.lm_head)
    try:
        with pytest.raises(UnsupportedModelError, match="no linear map"):
            FisherMetric(pupil, examples(model, 2, 12))
    finally:
        model.lm_head = head


def test_what_it_has_no_use_for_is_refused():
    for options in ("hidden=0.5", "temperature=2"):
        with pytest.raises(InputError, match="loss=fisher has no temperature and no hidden states"):
            parse_chain(f"distill:loss=fisher,{options}")
