"""A task instead of text: how often the wrong answer is the likelier one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Share of multiple-choice items that are answered wrongly: 1 - accuracy; per item 0 or 1.

    The answer given is the one of highest log-likelihood after the question, the `acc` of lm-evaluation-harness but for
    the BOS, which it leaves out for most models, and here `--bos none` does. per="token": of highest log-likelihood per
    token of the answer (its `acc_norm` divides by characters). Of equals the first.
    """

    per: Literal["answer", "token"] = "answer"

    title: ClassVar[str] = "Error on multiple-choice items"
    source: ClassVar[str] = "Siddiqui et al. 2024 (A deeper look at depth pruning), arXiv 2407.16286"
    unit: ClassVar[str] = "share of items wrong"
    reads: ClassVar[Literal["text", "items"]] = "items"
    of: ClassVar[Literal["logits", "losses", "states"]] = "losses"
    compares: ClassVar[bool] = False

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        from blockpruner.metrics import token_losses

        return token_losses(found, targets)

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        costs = [s / c if self.per == "token" else s for s, c in zip(sums, counts, strict=True)]
        wrong, start = [], 0
        for length, right in zip(lengths, gold, strict=True):
            answers = costs[start : start + length]
            start += length
            known = all(map(math.isfinite, answers))
            wrong.append(float(answers.index(min(answers)) != right) if known else math.nan)
        return tuple(wrong)
