"""Losses of single tokens, against their definition in double precision."""

import pytest
import torch

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
