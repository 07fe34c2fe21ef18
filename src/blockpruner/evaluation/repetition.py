"""How much a text repeats itself. Tokens are anything that can be compared."""

from collections.abc import Hashable, Sequence


def repeated_share(tokens: Sequence[Hashable], n: int = 4) -> float:
    """rep-n = 1 - (different n-grams) / (n-grams), from 0 to below 1, higher = more repetition; 0 below n + 1 tokens.

    Source: rep-n of Welleck et al. 2019 (arXiv 1908.04319) and Su et al. 2022 (arXiv 2202.06417), as a share.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(tokens: Sequence[Hashable], n: int = 1) -> float:
    """distinct-n = (different n-grams) / (n-grams), 1 = none occurs twice (Li et al. 2016, arXiv 1510.03055)."""
    return 1 - repeated_share(tokens, n)


def longest_loop(tokens: Sequence[Hashable]) -> int:
    """The length in tokens of the longest stretch that is one piece said at least twice in a row; 0 if there is none.

    A stretch with the period p has tokens[i] == tokens[i - p] behind its first p tokens. Cost: O(n^2).
    """
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = 0
        for i in range(period, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest
