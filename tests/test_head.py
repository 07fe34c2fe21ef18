"""Losses from the states before the head are those of the logits, and where they would not be, logits are made."""

import functools

import pytest
import torch
import zoo
from tiny import anatomy_of, shared, token_ids
from torch import nn

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.engine import head
from blockpruner.engine.head import Head, proved_head
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.metrics import token_losses
from blockpruner.objectives import parse_objective
from blockpruner.objectives.kl import KL
from blockpruner.objectives.loss import Loss
from blockpruner.objectives.sampled_loss import EVEN, SampledLoss
from blockpruner.texts.examples import examples_of


def planted(vocabulary=101, width=24, positions=17, dtype=torch.float32, bias=True, spread=3.0):
    generator = torch.Generator().manual_seed(vocabulary)
    linear = nn.Linear(width, vocabulary, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    states = torch.randn(positions, width, generator=generator)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return linear.to(dtype).requires_grad_(False), states.to(dtype), targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "positions"), [(101, 17), (64, 1), (7, 300), (300, 7)])
def test_losses_of_states_are_those_of_their_logits(monkeypatch, vocabulary, positions, dtype, bias):
    linear, states, targets = planted(vocabulary, positions=positions, dtype=dtype, bias=bias)
    expected = token_losses(linear(states), targets)
    for at_once in (1, 16 * positions, 2**18):  # a token of the vocabulary at a time, several, all of them
        monkeypatch.setitem(head._AT_ONCE, "cpu", at_once)
        found = Head("lm_head", linear).token_losses(states, targets)
        assert found.dtype == torch.float32
        # The sums are float32 in any order; a logit may round to the other side where a product is cut up differently.
        slack = 1e-4 if dtype == torch.float32 else 2 * float(expected.max()) * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=slack)


def test_logits_that_overflow_exponentials_or_are_ruled_out_keep_their_losses(monkeypatch):
    linear, states, targets = planted(spread=100.0)
    linear.bias[:40] = -torch.inf  # as for padding in a vocabulary
    targets = targets.clamp(min=40)
    monkeypatch.setitem(head._AT_ONCE, "cpu", len(states) * 10)
    found = Head("lm_head", linear).token_losses(states, targets)
    torch.testing.assert_close(found, token_losses(linear(states), targets), rtol=1e-4, atol=1e-3)


def test_a_state_that_is_not_a_number_spoils_its_own_loss_alone():
    linear, states, targets = planted(positions=3)
    states[1, 0] = torch.nan
    assert Head("lm_head", linear).token_losses(states, targets).isnan().tolist() == [False, True, False]


HEADS = {"llama": True, "gemma3": True, "mixtral": True, "gemma2": False, "cohere": False}


@pytest.mark.parametrize(("family", "plain"), HEADS.items(), ids=list(HEADS))
def test_a_head_with_something_behind_it_is_not_taken_for_the_whole(family, plain):
    model = zoo.build(f"causal/{family if family != 'gemma3' else 'gemma3_text'}")
    ids = token_ids()
    found = proved_head(model, lambda: model(input_ids=ids).logits, ids)
    assert (found is not None) == plain


def test_a_head_that_somebody_watches_or_has_wrapped_is_left_to_the_model():
    model, ids = zoo.build("causal/llama"), token_ids()
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert proved_head(model, lambda: model(input_ids=ids).logits, ids) is None
    handle.remove()
    model.lm_head.forward = functools.partial(model.lm_head.forward)
    assert proved_head(model, lambda: model(input_ids=ids).logits, ids) is None
    del model.lm_head.forward
    assert proved_head(model, lambda: model(input_ids=ids).logits, ids) is not None


def test_an_objective_of_losses_makes_no_logits_and_one_that_compares_them_does():
    model, windows = shared("llama"), token_ids(3, 12)
    for measure, calls in ((Loss(), False), (KL(), True)):
        made = []
        objective = ModelObjective(model, anatomy_of("llama"), examples_of(model, windows), measure)
        handle = model.lm_head.register_forward_hook(lambda *_, made=made: made.append(1))
        try:
            list(objective.batch_losses([parse_mask("mlp.1")], 0))
        finally:
            handle.remove()
        assert bool(made) == calls


def test_a_head_whose_weights_change_is_read_again():
    model = zoo.build("causal/llama")
    objective = ModelObjective(model, read_anatomy(model), examples_of(model, token_ids(3, 12)))
    before = list(objective.batch_losses([frozenset()], 0))
    model.lm_head.weight.data = model.lm_head.weight.data * 2
    assert list(objective.batch_losses([frozenset()], 0)) != before


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)])
def test_probabilities_are_added_up_over_states(monkeypatch, dtype, bias):
    linear, states, _ = planted(dtype=dtype, bias=bias)
    expected = linear(states).float().softmax(-1).double().sum(0)
    for at_once in (1, 16 * len(states), 2**18):
        monkeypatch.setitem(head._AT_ONCE, "cpu", at_once)
        found = Head("lm_head", linear).probabilities(states)
        assert found.device.type == "cpu"  # where there is float64: MPS has none
        torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_sampled_head_weigh_its_tokens_and_know_every_target(monkeypatch, dtype, bias):
    linear, states, targets = planted(dtype=dtype, bias=bias)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randperm(len(linear.weight), generator=generator)[:30].sort().values
    chances = torch.rand(30, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    logits = linear(states).float()
    weighed, right = logits[:, tokens] - chances.log()[None], logits.gather(1, targets[:, None])[:, 0]
    weighed[tokens[None] == targets[:, None]] = -torch.inf  # a target stands for itself
    expected = torch.logaddexp(weighed.logsumexp(-1).float(), right) - right
    assert 0 < int(torch.isin(targets, tokens).sum()) < len(targets)
    for at_once in (1, 16 * len(states), 2**18):
        monkeypatch.setitem(head._AT_ONCE, "cpu", at_once)
        found = Head("lm_head", linear).sampled(tokens, chances).token_losses(states, targets)
        slack = 1e-4 if dtype == torch.float32 else 0.3  # the target's logit is rounded once more or less
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=slack)
        assert float(found.min()) >= 0


def test_a_target_that_alone_was_drawn_has_no_loss():
    linear, states, targets = planted(positions=1)
    found = Head("lm_head", linear).sampled(targets, torch.tensor([0.3])).token_losses(states, targets)
    assert found.tolist() == [0.0]


def test_chances_of_a_draw_are_in_proportion_at_most_one_and_add_up():
    share = torch.rand(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 6
    for size in (1, 40, 300, 499):
        tokens, chances = SampledLoss(size).draw(share)
        assert len(tokens) == size == len(set(tokens.tolist()))
        q = ((1 - EVEN) * share / share.sum() + EVEN / 500)[tokens]
        rest = chances < 1
        assert (chances > 0).all()
        assert float(chances.max()) <= 1
        if rest.any():
            scale = chances[rest] / q[rest]
            torch.testing.assert_close(scale, scale[:1].expand_as(scale))
            assert bool((q[~rest] * scale[0] >= 1 - 1e-9).all())


@pytest.mark.parametrize("size", [500, 501, 10**6])
def test_a_draw_of_no_fewer_tokens_than_there_are_takes_all_for_certain(size):
    share = torch.rand(500, generator=torch.Generator().manual_seed(2))
    tokens, chances = SampledLoss(size).draw(share)
    assert tokens.tolist() == list(range(500))
    assert chances.tolist() == [1.0] * 500


def test_the_estimated_sum_over_the_vocabulary_is_unbiased_over_draws():
    linear, states, targets = planted(vocabulary=400, spread=0.7)
    whole = Head("lm_head", linear)
    logits = linear(states)
    truth = logits.exp().sum(-1).double()
    share = whole.probabilities(states)
    found = []
    for seed in range(600):
        losses = whole.sampled(*SampledLoss(60, seed).draw(share)).token_losses(states, targets)
        found.append((losses + logits.gather(1, targets[:, None])[:, 0]).double().exp() / truth)
    ratios = torch.stack(found)
    standard_error = ratios.std(0) / len(found) ** 0.5
    assert float(((ratios.mean(0) - 1).abs() / standard_error).max()) < 4
    assert float(ratios.std(0).max()) < 0.5


def test_a_draw_hardly_changes_with_the_last_digits_of_what_it_goes_by():
    share = torch.rand(5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 4
    noise = 1 + 1e-6 * torch.randn(5000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    first, other = (set(SampledLoss(500).draw(each)[0].tolist()) for each in (share, share * noise))
    assert len(first - other) <= 2
    assert first != set(SampledLoss(500, seed=1).draw(share)[0].tolist())


@pytest.mark.parametrize("wrong", ["vocabulary=0", f"seed={10**23}", "seed=-1"])
def test_a_draw_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="no loss has"):
        parse_objective(f"sampled-loss:{wrong}")


def test_heads_with_a_bias_are_known_in_half_precision():
    model, ids = zoo.build("causal/phi").to(torch.bfloat16), token_ids()
    assert model.lm_head.bias is not None
    with torch.no_grad():
        assert proved_head(model, lambda: model(input_ids=ids).logits, ids) is not None
