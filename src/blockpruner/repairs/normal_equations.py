"""Least squares from sums: the best linear map from many tokens, of which none is kept.

Weighted sums over tokens of x x^T, x y^T, y^2, x and y, in float64, are all that a linear map y = x A + b, its error on
any text, and the best map of a lower rank depend on. Memory: inputs^2 + inputs * outputs numbers of 8 bytes, whatever
the number of tokens. Cost per token: as many multiply-adds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from blockpruner.errors import InputError

SMALLEST = 1e-13  # pivot beside the largest one at which a matrix of float64 sums is taken for singular


@dataclass(frozen=True)
class LinearMap:
    """y = x A + b in float64: A = down @ up where that is the smaller way to write it, else up is None.

    down: [inputs, rank] or A itself, [inputs, outputs]; up: [rank, outputs]; bias: [outputs].
    """

    down: Tensor
    up: Tensor | None
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """A, [inputs, outputs]."""
        return self.down if self.up is None else self.down @ self.up


class NormalEquations:
    """Sums over tokens of the inputs x and the outputs y of a map that is sought; what is added is forgotten."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        home = None if device is not None and device.type == "mps" else device  # it has no float64
        options = {"dtype": torch.float64, "device": home}
        self.tokens = 0  # with a weight above zero
        self._weight = torch.zeros((), **options)
        self._x, self._y = torch.zeros(inputs, **options), torch.zeros(outputs, **options)
        self._xx, self._xy = torch.zeros(inputs, inputs, **options), torch.zeros(inputs, outputs, **options)
        self._yy = torch.zeros(outputs, **options)

    @classmethod
    def of(cls, observed: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Self:
        """Of all that is observed: x, y and weights, of so many tokens at a time; at least once."""
        sums: Self | None = None
        for x, y, weights in observed:
            sums = sums or cls(x.shape[-1], y.shape[-1], x.device)
            sums.add(x, y, weights)
        assert sums is not None
        return sums

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take tokens in: x [tokens, inputs], y [tokens, outputs], weights [tokens], 1 where left out."""
        x, y = x.to(self._x), y.to(self._y)
        weights = torch.ones(len(x)).to(self._x) if weights is None else weights.to(self._x)
        weighted = x * weights[:, None]
        self.tokens += int((weights > 0).sum())
        self._weight += weights.sum()
        self._x += weighted.sum(0)
        self._y += weights @ y
        self._xx += weighted.T @ x
        self._xy += weighted.T @ y
        self._yy += weights @ y.square()

    @property
    def inputs(self) -> int:
        return len(self._x)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of x and of y."""
        return self._x / self._weight, self._y / self._weight

    def products(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Means of x x^T, [inputs, inputs], and of x y^T, [inputs, outputs]; `centred`: covariances."""
        xx, xy = self._xx / self._weight, self._xy / self._weight
        x, y = self.means
        return (xx - torch.outer(x, x), xy - torch.outer(x, y)) if centred else (xx, xy)

    def check(self, what: str) -> None:
        """InputError, naming `what`, if there was nothing to learn from, or numbers that are none."""
        if not self.tokens:
            raise InputError(f"no token says anything of {what}", fix="give longer windows, or sinks above 0")
        if not all(bool(torch.isfinite(part).all()) for part in (self._x, self._y, self._xx, self._xy, self._yy)):
            raise InputError(
                f"the states around {what} are NaN or infinite, so no map can be fitted to them",
                fix="load the model in float32 or bfloat16, or remove fewer blocks",
            )

    def power(self) -> float:
        """Mean over tokens of |y|^2: the error of adding nothing."""
        return float((self._yy / self._weight).sum())

    def error(self, found: LinearMap) -> float:
        """Mean over tokens of |x A + b - y|^2."""
        (x, y), (xx, xy) = self.means, self.products()
        around = (self._yy / self._weight - y.square()).sum()
        off = x @ found.weight + found.bias - y
        return float(around - 2 * (found.weight * xy).sum() + (found.weight * (xx @ found.weight)).sum() + off @ off)


def mean_map(sums: NormalEquations, what: str) -> LinearMap:
    """The best constant: A is zero, b the mean of y."""
    sums.check(what)
    _, xy = sums.products()
    return LinearMap(torch.zeros_like(xy), None, sums.means[1])


def ridge_map(
    sums: NormalEquations, what: str, *, ridge: float = 0.0, rank: int = 0, constant: bool = True, alike: bool = False
) -> LinearMap:
    """The map that minimises the mean of |x A + b - y|^2 + ridge * sum over i of d_i |A_i|^2.

    d_i is the variance of x_i, and at least the median of all variances: on x as it is, a few channels of a stream that
    are hundreds of times as large as the rest would set the price for all; by the variance alone, inputs that hardly
    vary would have large weights for nothing. alike: d is the mean variance instead, for all inputs.
    constant: whether there is a b, which is not penalised; without one it is zero, and variances are mean squares.
    rank: of A at most; 0 is full. The best A of rank r is A V V^T, where A is the best of all and V [outputs, r] the
    leading eigenvectors of C_yx (C_xx + ridge diag d)^-1 C_xy, the covariance of what A makes of x (and of the rows
    that stand for the ridge): what is kept is what matters in y, which a singular value decomposition of A does not
    see. Source: ridge regression on inputs of one variance, Hoerl and Kennard 1970; reduced-rank regression, Izenman
    1975.
    InputError, naming `what`, for too few tokens, and for inputs that are not independent where there is no ridge.
    """
    sums.check(what)
    _check_enough(sums, what, ridge, rank)
    xx, xy = sums.products(centred=constant)
    variances = xx.diagonal()
    mean = variances.mean()
    if not float(mean) > 0:
        raise InputError(f"what reaches {what} is the same for every token, so it tells nothing", fix="use bias")
    least = torch.maximum(variances.median(), SMALLEST * mean)
    scale = (mean.expand_as(variances) if alike else variances.clamp_min(least)).sqrt()
    xx, xy = xx / scale / scale[:, None], xy / scale[:, None]  # of x / scale, whose map is scale * A
    factor, failed = torch.linalg.cholesky_ex(xx + ridge * torch.eye(len(xx)).to(xx))
    pivots = factor.diagonal().square()
    if int(failed) or not float(pivots.min()) > SMALLEST * float(pivots.max()):
        raise InputError(
            f"the inputs of {what} are not independent, so ridge={ridge:g} leaves more than one best map",
            fix="give a larger ridge (1e-3), or more text",
        )
    best = torch.cholesky_solve(xy, factor)
    down, up = best, None
    if rank:
        leading = torch.linalg.eigh(xy.T @ best).eigenvectors[:, -rank:]
        down, up = best @ leading, leading.T
    down = down / scale[:, None]
    x, y = sums.means
    mapped = x @ down if up is None else x @ down @ up
    return LinearMap(down, up, y - mapped if constant else torch.zeros_like(y))


def _check_enough(sums: NormalEquations, what: str, ridge: float, rank: int) -> None:
    outputs = len(sums.means[1])
    if rank < 0 or ridge < 0 or rank >= min(sums.inputs, outputs):
        raise InputError(
            f"no map of {what} has rank {rank} and ridge {ridge:g}",
            fix=f"give a rank of 1 to {min(sums.inputs, outputs) - 1}, 0 for full rank, and a ridge of 0 or more",
        )
    needed = rank if rank and ridge else sums.inputs
    if sums.tokens <= needed:
        raise InputError(
            f"a map of {what} with {sums.inputs} inputs"
            f"{f' and rank {rank}' if rank else ''} takes more than {needed} tokens, and there are {sums.tokens}",
            fix="give more text, a lower rank, or use bias",
        )
