"""What models wrote and answered, as data, and how one stands beside another."""

import math
from collections.abc import Sequence

from blockpruner.artifacts import Estimate, Record
from blockpruner.evaluation.repetition import longest_loop, repeated_share


class Writing(Record):
    """One continuation. text, tokens: what was written; loss: mean nats per token by the reference, None until read."""

    text: str
    tokens: tuple[int, ...]
    loss: float | None = None


class Written(Record):
    """What one model wrote after each prompt, and which questions of each probe it answered right.

    tokenizer: a digest of how it reads the prompts; tokens of models for which it differs do not compare.
    """

    name: str
    dtype: str
    computation: str
    tokenizer: str
    writings: tuple[Writing, ...]
    answers: dict[str, tuple[bool, ...]]

    @property
    def probes(self) -> dict[str, Estimate]:
        """The share of right answers per probe."""
        return {
            name: Estimate.of([float(r) for r in right], "share of questions") for name, right in self.answers.items()
        }

    @property
    def repetition(self) -> list[float]:
        """rep-4 of each continuation."""
        return [repeated_share(writing.tokens) for writing in self.writings]

    @property
    def loops(self) -> list[float]:
        """The longest loop of each continuation as a share of it."""
        return [longest_loop(writing.tokens) / max(1, len(writing.tokens)) for writing in self.writings]

    @property
    def was_read(self) -> bool:
        return all(writing.loss is not None for writing in self.writings)

    @property
    def losses(self) -> list[float]:
        """The reference's loss on each continuation, in nats per token; NaN where it was not read."""
        return [math.nan if writing.loss is None else writing.loss for writing in self.writings]

    def agreement(self, reference: "Written") -> list[int]:
        """How many first tokens of each continuation are those of the reference; characters for another tokenizer."""
        pairs = zip(self.writings, reference.writings, strict=True)
        if self.tokenizer == reference.tokenizer:
            return [agreed(mine.tokens, its.tokens) for mine, its in pairs]
        return [agreed(mine.text, its.text) for mine, its in pairs]


def agreed(one: Sequence[object], other: Sequence[object]) -> int:
    """How many first elements of the two are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
