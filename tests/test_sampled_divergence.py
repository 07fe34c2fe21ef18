"""Teaching by a part of the vocabulary: the divergence itself where all is drawn, and right on average elsewhere."""

import copy
from typing import Any

import pytest
import torch
from labs import apart, examples, made
from test_fisher import FAMILIES
from test_training import gradients, whole_loss

from blockpruner.anatomy.probing import asking
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.recoveries import parse_chain
from blockpruner.repairs.at_the_head import AtTheHead, head_of
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.sampled_divergence import SampledDivergence
from blockpruner.repairs.taught import Taught
from blockpruner.surgery.gaps import UNREPAIRED, Repair


def plain(pupil, text, loss):
    """The loss itself."""
    return gradients(pupil, trainable(pupil.model), lambda: whole_loss(pupil, text, loss, 1.0, 0.0))[0]


def trainable(model):
    """All but the head, which the lesson does not look at."""
    head = {id(p) for p in head_of(model).parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in head and p.is_floating_point()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("name", "mask"), [each for each in FAMILIES if each[0] != "seq2seq/t5"])
def test_with_the_whole_vocabulary_it_is_the_divergence_and_its_slope(name, mask, temperature):
    model, anatomy = made(name)
    text = examples(model, 3, 16)
    numbers = trainable(model)
    pupil = Pupil(model, anatomy, parse_mask(mask), Repair({}, apart(numbers)))
    lesson = SampledDivergence(pupil, text, len(head_of(model).weight), temperature)
    with asking(model, [*numbers.values()]):  # the model is shared: no gradient is to stay
        lesson.probe(text, {})
    value, slopes = gradients(pupil, numbers, lambda: lesson.backward(text, 0.5))
    truth, steps = gradients(pupil, numbers, lambda: whole_loss(pupil, text, "kl", temperature, 0.0))
    assert value == pytest.approx(truth, rel=1e-4)
    mine, theirs = (torch.cat([each[n].flatten() for n in numbers]) for each in (slopes, steps))
    assert float((2 * mine - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sums_over_a_part_are_those_over_the_vocabulary_on_average(temperature):
    """Within four standard errors; those without what a token stands for are far off."""
    model, anatomy = made("causal/llama")
    text, weight = examples(model, 3, 16), model.lm_head.weight
    lesson = SampledDivergence(Pupil(model, anatomy, parse_mask("mlp.1")), text, len(weight) // 4, temperature)
    states = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    truth = (states @ weight.detach().T / temperature).exp().sum(-1)
    torch.manual_seed(0)
    found, bare = [], []
    for _ in range(400):
        lesson.prepare()
        found.append(lesson.logits(states).exp().sum(-1) / truth)
        bare.append((lesson.logits(states) + lesson.drawn[2]).exp().sum(-1) / truth)
    sums = torch.stack(found).detach()
    assert bool(((sums.mean(0) - 1).abs() < 4 * sums.std(0) / len(sums) ** 0.5).all())
    assert bool((torch.stack(bare).mean(0) < 0.7).all())


def test_every_pass_draws_anew_and_the_mean_is_near_the_divergence():
    model, anatomy = made("causal/llama")
    text = examples(model, 3, 16)
    pupil = Pupil(model, anatomy, parse_mask("mlp.1+attention.2"))
    numbers = {name: p for name, p in model.named_parameters() if "layers" in name}
    truth, steps = gradients(pupil, numbers, lambda: whole_loss(pupil, text, "kl", 1.0, 0.0))
    lesson = SampledDivergence(pupil, text, len(head_of(model).weight) // 2)
    torch.manual_seed(0)
    found = [gradients(pupil, numbers, lambda: lesson.backward(text, 1.0)) for _ in range(24)]
    values = torch.tensor([value for value, _ in found])
    assert len(set(values.tolist())) == len(values)
    assert float(values.mean()) == pytest.approx(truth, rel=0.05)
    mean = torch.stack([torch.cat([each[n].flatten() for n in numbers]) for _, each in found]).mean(0)
    theirs = torch.cat([steps[n].flatten() for n in numbers])
    assert torch.nn.functional.cosine_similarity(mean, theirs, dim=0) > 0.99


def test_pieces_of_tokens_give_what_all_at_once_give(monkeypatch):
    model, anatomy = made("causal/llama")
    text = examples(model, 3, 16)
    numbers = {name: p for name, p in model.named_parameters() if "layers" in name}
    pupil = Pupil(model, anatomy, parse_mask("mlp.1"))
    found = []
    for at_once in (10**6, 7):
        monkeypatch.setattr(SampledDivergence, "at_once", at_once)
        torch.manual_seed(1)
        lesson = SampledDivergence(pupil, text, 20)
        found.append(gradients(pupil, numbers, lambda lesson=lesson: lesson.backward(text, 1.0)))
    (value, slopes), (other, steps) = found
    assert value == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(slopes, steps, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora:rank=2,loss=kl", "distill"])
def test_a_training_by_it_lowers_the_divergence_and_leaves_the_head(method, tmp_path):
    model, anatomy = made("causal/llama")
    bench = Bench(model, anatomy, parse_mask("mlp.1"), examples(model, 8, 16), examples(model, 2, 16), force=True)
    (chain,) = parse_chain(f"{method}{',' if ':' in method else ':'}vocabulary=24,lr=0.003,batch=2,accumulate=1")
    repair: Any = chain.repair(bench)[0]
    assert repair is not UNREPAIRED
    assert "lm_head.weight" not in repair.weights
    before, after = (
        plain(Pupil(model, anatomy, bench.mask, each), bench.examples, "kl") for each in (UNREPAIRED, repair)
    )
    assert after < before
    assert chain.repair(bench)[0].digest() == repair.digest()  # drawn from the seed, not from what came before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal/gemma2", "causal/cohere"])
def test_what_stands_behind_a_head_is_not_left_out_in_silence(name, dtype):
    model, anatomy = made(name)
    model = copy.deepcopy(model).to(dtype)
    text = examples(model, 2, 12)
    lesson = SampledDivergence(Pupil(model, anatomy, parse_mask("mlp.1")), text, 16)
    with pytest.raises(UnsupportedModelError, match="stands behind the head"):
        lesson.probe(text, {})


@pytest.mark.parametrize("taught", [Taught("fisher"), Taught("kl", vocabulary=16)])
def test_a_head_that_was_trained_before_is_refused(taught):
    model, anatomy = made("causal/llama")
    head = {"lm_head.weight": model.lm_head.weight.data.clone()}
    with pytest.raises(InputError, match="has trained the head"):
        taught.lesson(Pupil(model, anatomy, parse_mask("mlp.1"), Repair({}, head)), examples(model, 2, 12))


@pytest.mark.parametrize(
    "options", ["loss=lm,vocabulary=16", "loss=kl,hidden=0.5,vocabulary=16", "loss=kl,vocabulary=-1"]
)
def test_what_is_not_estimated_from_a_part_is_refused(options):
    with pytest.raises(InputError, match="is estimated from vocabulary"):
        parse_chain(f"lora:{options}")


@pytest.mark.parametrize("first", ["distill", "continued"])
@pytest.mark.parametrize("second", ["lora:loss=fisher", "distill:vocabulary=16", "adapter:loss=fisher"])
def test_a_chain_that_trains_the_head_and_then_needs_it_is_refused_before_it_runs(first, second):
    with pytest.raises(InputError, match="needs the head that the dense model has"):
        parse_chain(f"{first},{second}")
    for fine in (f"{second},{first}", f"distill:loss=fisher,{second}", f"{first},lora:loss=kl"):
        assert len(parse_chain(fine)) == 2


def test_lessons_at_the_head_are_judged_by_predictions():
    model, anatomy = made("causal/llama")
    text = examples(model, 2, 12)
    lesson: AtTheHead = SampledDivergence(Pupil(model, anatomy, parse_mask("mlp.1")), text, 16)
    assert lesson.judge(text) == pytest.approx(plain(lesson.pupil, text, "lm"), rel=1e-5)
