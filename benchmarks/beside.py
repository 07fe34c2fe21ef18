"""Figures of benchmarks beside each other on the same windows or items, with standard errors that are paired."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from blockpruner.artifacts import Estimate
from blockpruner.evaluation.paired import Comparison, compare
from blockpruner.searching.evaluations import estimate


def told(found: Estimate | None) -> dict[str, Any]:
    """A loss as rows have it; None where it is not finite."""
    return {
        "log_perplexity": found.value if found else None,
        "standard_error": found.stderr if found else None,
    }


def mean_of(windows: Sequence[float]) -> dict[str, Any]:
    """The mean over windows, which all have as many tokens."""
    return told(estimate(windows, "nats per token"))


def won(dense: float, pruned: float, recovered: float) -> float:
    """The share of what removing costs that is won back."""
    return (pruned - recovered) / (pruned - dense) if pruned != dense else math.nan


def jackknife(what: Callable[..., float], *columns: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """A figure of the means of columns over the same windows, and its standard error from leaving each window out."""
    n, sums = len(columns[0]), [math.fsum(column) for column in columns]
    if n < 2:
        return None, None
    left = [what(*((s - column[out]) / (n - 1) for s, column in zip(sums, columns, strict=True))) for out in range(n)]
    whole, middle = what(*(s / n for s in sums)), fmean(left)
    error = math.sqrt((n - 1) / n * math.fsum((each - middle) ** 2 for each in left))
    return (whole, error) if math.isfinite(whole) and math.isfinite(error) else (None, None)


def accuracy(answers: str) -> dict[str, Any]:
    """The share of right answers, each a digit, 1 where it is right."""
    n, right = len(answers), answers.count("1") / len(answers)
    return {"acc": right, "standard_error": math.sqrt(right * (1 - right) / (n - 1)) if n > 1 else None, "n": n}


def compared(reference: str, contestant: str) -> Comparison:
    """Answers to the same items, in the same order."""
    return compare([float(digit) for digit in reference], [float(digit) for digit in contestant])
