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
from blockpruner.metrics import token_losses
from blockpruner.objectives.kl import KL
from blockpruner.objectives.loss import Loss
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
