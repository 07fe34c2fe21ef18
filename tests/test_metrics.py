"""Losses of single tokens, against their definition in double precision."""

import pytest
import torch

from blockpruner import metrics
from blockpruner.metrics import token_losses


def draw(positions: int, vocabulary: int, scale: float = 3.0):
    generator = torch.Generator().manual_seed(positions)
    logits = scale * torch.randn(positions, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (positions,), generator=generator)


def by_definition(logits, targets):
    exact = logits.double()
    return exact.logsumexp(-1) - exact[torch.arange(len(targets)), targets]


# The last of these is more than is read at once.
@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 1), (1, 50), (7, 128), (1100, 8192)])
def test_token_losses_are_the_negative_log_likelihood_of_each_target(positions, vocabulary):
    logits, targets = draw(positions, vocabulary)
    found = token_losses(logits, targets)
    torch.testing.assert_close(found.double(), by_definition(logits, targets), atol=1e-5, rtol=0)


def test_token_losses_stay_exact_where_exponentials_overflow():
    logits, targets = draw(20, 64, scale=1e4)
    found = token_losses(logits, targets)
    torch.testing.assert_close(found.double(), by_definition(logits, targets), atol=1e-2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_read_in_float32(dtype):
    logits, targets = draw(5, 40)
    narrow = logits.to(dtype)
    assert token_losses(narrow, targets).dtype == torch.float32
    assert torch.equal(token_losses(narrow, targets), token_losses(narrow.float(), targets))


def test_an_impossible_number_is_not_hidden():
    logits, targets = draw(3, 10)
    logits[1, 4] = float("nan")
    assert token_losses(logits, targets).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("positions", [0, 1, 7])
def test_token_losses_have_the_bits_of_one_softmax_over_everything(dtype, positions, monkeypatch):
    logits = (torch.randn(positions, 50, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    targets = torch.randint(0, 50, (positions,), generator=torch.Generator().manual_seed(4))
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    for buffered in (1, 100, 2**20):
        monkeypatch.setattr(metrics, "_BUFFERED", buffered)
        assert torch.equal(token_losses(logits, targets), expected)


def test_token_losses_can_be_differentiated():
    logits = torch.randn(3, 5, requires_grad=True)
    token_losses(logits, torch.tensor([0, 1, 2])).sum().backward()
    assert logits.grad is not None
