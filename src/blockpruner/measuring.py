"""What an objective promises: a number from what a model puts out, lower = better."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Measure(Protocol):
    """What is measured: a frozen dataclass, its fields the options of the method, one file in `objectives/`.

    title, source: its name and paper; unit: of its values; reads: whether the data are windows of text or items with
    answers to choose from; of: whether it looks at the logits where a token is predicted, at nothing of them but the
    loss of that token (its `each` is `metrics.token_losses` then), or at the last hidden states, meant over the tokens
    of a row; compares: whether with those of the model as it was given.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    unit: ClassVar[str]
    reads: ClassVar[Literal["text", "items"]]
    of: ClassVar[Literal["logits", "losses", "states"]]
    compares: ClassVar[bool]

    def each(self, found: "Tensor", whole: "Tensor | None", targets: "Tensor") -> "Tensor":
        """The value [n] of each of n rows of logits (or states) [n, ...] beside those of the whole model."""
        ...

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        """The value of each unit, from the sums and numbers of the values in its rows; see `Examples`."""
        ...


class PerRow:
    """What measures have in common whose units are rows of text, each the mean of its values; they set what differs."""

    reads: ClassVar[Literal["text", "items"]] = "text"
    of: ClassVar[Literal["logits", "losses", "states"]] = "logits"
    compares: ClassVar[bool] = True

    def units(
        self, sums: Sequence[float], counts: Sequence[int], lengths: Sequence[int], gold: Sequence[int]
    ) -> tuple[float, ...]:
        return tuple(total / count if count else math.nan for total, count in zip(sums, counts, strict=True))
