"""Least squares from sums: against what sees all tokens at once, and against what others minimise."""

import pytest
import torch

from blockpruner.errors import InputError
from blockpruner.repairs.normal_equations import NormalEquations, mean_map, ridge_map


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(tokens=200, inputs=12, outputs=8, seed=0):
    """Inputs of unequal spread around a mean that is not zero, outputs that depend on them, and noise."""
    x = draw(tokens, inputs, seed=seed) @ draw(inputs, inputs, seed=seed + 1) + 3
    y = x @ draw(inputs, outputs, seed=seed + 2) + draw(tokens, outputs, seed=seed + 3) - 1
    return x, y


def sums_of(x, y, weights=None, pieces=1):
    sums = NormalEquations(x.shape[1], y.shape[1])
    weights = torch.ones(len(x)) if weights is None else weights
    for part in zip(x.chunk(pieces), y.chunk(pieces), weights.chunk(pieces), strict=True):
        sums.add(*part)
    return sums


def mean_square(x, y, found, weights=None):
    """The same error from all tokens."""
    weights = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    return float((weights * (x @ found.weight + found.bias - y).square().sum(1)).sum() / weights.sum())


def test_streamed_sums_are_those_of_all_tokens_at_once():
    x, y = planted()
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(5)).double()
    sums = sums_of(x, y, weights, pieces=7)
    total = weights.sum()
    mean_x, mean_y = (weights @ x) / total, (weights @ y) / total
    torch.testing.assert_close(sums.means, (mean_x, mean_y))
    around = (x - mean_x) * weights[:, None]
    torch.testing.assert_close(sums.products(), (around.T @ (x - mean_x) / total, around.T @ (y - mean_y) / total))
    found = ridge_map(sums, "it", ridge=0.1)
    assert sums.error(found) == pytest.approx(mean_square(x, y, found, weights), rel=1e-9)
    assert sums.power() == pytest.approx(float((weights * y.square().sum(1)).sum() / total), rel=1e-12)


def test_float32_tokens_far_from_zero_lose_nothing_in_the_sums():
    x, y = planted(tokens=2000)
    x, y = (x + 300).float(), y.float()
    found = ridge_map(sums_of(x, y, pieces=20), "it")
    with_one = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(with_one, y.double()).solution
    torch.testing.assert_close(found.weight, expected[:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constant", [True, False])
def test_without_a_ridge_it_is_the_least_squares_solution(constant):
    x, y = planted()
    found = ridge_map(sums_of(x, y, pieces=3), "it", constant=constant)
    ones = torch.ones(len(x), int(constant), dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, ones], dim=1), y).solution
    torch.testing.assert_close(found.weight, expected[: x.shape[1]])
    torch.testing.assert_close(found.bias, expected[-1] if constant else torch.zeros_like(found.bias))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_the_gradient_of_the_penalised_error_vanishes_at_the_map(constant, alike):
    x, y = planted()
    ridge = 0.3
    found = ridge_map(sums_of(x, y), "it", ridge=ridge, constant=constant, alike=alike)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    spread = (x - x.mean(0) if constant else x).square().mean(0)
    spread = torch.full_like(spread, float(spread.mean())) if alike else spread.clamp_min(spread.median())
    loss = (x @ weight + bias - y).square().sum(1).mean() + ridge * (spread @ weight.square()).sum()
    slopes = torch.autograd.grad(loss, [weight, bias])
    assert float(slopes[0].abs().max()) < 1e-9
    assert not constant or float(slopes[1].abs().max()) < 1e-9


@pytest.mark.parametrize("rank", [0, 2])
def test_a_few_inputs_that_are_much_larger_than_the_rest_do_not_set_the_price_for_all(rank):
    x, y = planted()
    variances = x.var(0)
    units = torch.where(variances > variances.median(), 1e3, 1.0).double()
    plain, scaled = (ridge_map(sums_of(each, y), "it", ridge=0.3, rank=rank) for each in (x, x * units))
    torch.testing.assert_close(scaled.weight * units[:, None], plain.weight)
    torch.testing.assert_close(scaled.bias, plain.bias)


def test_inputs_that_hardly_vary_have_no_large_weights():
    x, y = planted()
    faint = torch.cat([x, 1e-6 * draw(len(x), 2, seed=7)], dim=1)
    found = ridge_map(sums_of(faint, y), "it", ridge=1e-3)
    assert float(found.weight[-2:].abs().max()) < 1e-3 * float(found.weight.abs().max())


def truncated(found, rank, x_mean, y_mean):
    """The full map cut by the singular values of its own: the mistake."""
    u, s, v = torch.linalg.svd(found.weight)
    weight = u[:, :rank] * s[:rank] @ v[:rank]
    return type(found)(weight, None, y_mean - x_mean @ weight)


def test_a_map_of_lower_rank_is_better_than_the_full_one_cut_by_its_singular_values():
    x = draw(500, 6) * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    weight = torch.zeros(6, 6, dtype=torch.float64)
    weight[0, 0], weight[1, 1] = 0.1, 1.0  # a small weight on a large input counts for more than the large one
    y = x @ weight + 0.01 * draw(500, 6, seed=1)
    sums = sums_of(x, y)
    reduced = ridge_map(sums, "it", rank=1)
    cut = truncated(ridge_map(sums, "it"), 1, *sums.means)
    assert sums.error(reduced) == pytest.approx(1, rel=0.2)  # what the second input does
    assert sums.error(cut) == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_descent_from_anywhere_finds_a_better_map_of_that_rank(rank, ridge):
    x, y = planted(inputs=6, outputs=5)
    found = ridge_map(sums_of(x, y), "it", ridge=ridge, rank=rank)
    spread = (x - x.mean(0)).square().mean(0)
    penalty = ridge * spread.clamp_min(spread.median())
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)

    def value(weight):
        return (centred_x @ weight - centred_y).square().sum(1).mean() + (penalty @ weight.square()).sum()

    best = float(value(found.weight))
    for seed in range(3):
        down, up = (draw(*shape, seed=seed).requires_grad_() for shape in ((6, rank), (rank, 5)))
        optimizer = torch.optim.LBFGS([down, up], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure(down=down, up=up, optimizer=optimizer):
            optimizer.zero_grad()
            loss = value(down @ up)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert float(value(down @ up).detach()) >= best - 1e-9
    assert torch.linalg.matrix_rank(found.weight) == rank


def test_the_constant_is_the_weighted_mean_of_the_outputs():
    x, y = planted()
    weights = torch.arange(len(x)).double()
    sums = sums_of(x[:, :0], y, weights, pieces=4)
    found = mean_map(sums, "it")
    torch.testing.assert_close(found.bias, (weights @ y) / weights.sum())
    assert sums.error(found) == pytest.approx(mean_square(x[:, :0], y, found, weights))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"tokens": 12}, {}, "takes more than 12 tokens, and there are 12"),
        ({"tokens": 3}, {"rank": 3, "ridge": 0.1}, "rank 3 takes more than 3 tokens"),
        ({}, {"rank": 8}, "no map of attention.1 has rank 8"),
        ({}, {"ridge": -1.0}, "and ridge -1"),
        ({"same": True}, {}, "not independent"),
        ({"flat": True}, {"ridge": 0.1}, "the same for every token"),
        ({"broken": True}, {}, "NaN or infinite"),
        ({"unweighted": True}, {}, "no token says anything of attention.1"),
    ],
)
def test_numbers_that_no_map_follows_from_are_refused_by_name(change, options, message):
    x, y = planted(tokens=change.get("tokens", 200))
    if change.get("same"):
        x[:, 1] = x[:, 0]
    if change.get("flat"):
        x[:] = 0.5
    if change.get("broken"):
        x[3, 2] = float("nan")
    weights = torch.zeros(len(x)) if change.get("unweighted") else None
    with pytest.raises(InputError, match=message):
        ridge_map(sums_of(x, y, weights), "attention.1", **options)


def test_a_ridge_makes_inputs_that_depend_on_each_other_work():
    x, y = planted()
    x[:, 1] = x[:, 0]
    found = ridge_map(sums_of(x, y), "it", ridge=1e-3)
    torch.testing.assert_close(found.weight[0], found.weight[1])


def test_a_token_that_weighs_nothing_is_not_there():
    x, y = planted()
    x[0], y[0] = 1e6, -1e6
    weights = torch.ones(len(x))
    weights[0] = 0
    found = ridge_map(sums_of(x, y, weights), "it")
    torch.testing.assert_close(found.weight, ridge_map(sums_of(x[1:], y[1:]), "it").weight)
