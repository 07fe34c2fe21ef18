"""Replacements that a search carries along, so that it finds blocks that are replaceable and not only useless.

Whatever a mask takes out of a layer is scored with what closed forms put there. They are fitted on the dense model's
states: what a layer's gaps get depends on that layer alone, so that a fit is made once, when a mask first asks for it,
and prefixes of masks go on being shared. After the search a recovery is fitted again, on the pruned model's own states.
Cost: a search asks for layers in order of depth, so that the streams before one layer lead on to the next: a forward
pass over the text for all fits of the first step, and the layer that is looked at for each; in later steps a pass up to
the layer that lost a block before, since what reaches its other gap may change with the norms that leave. Where layers
cannot be led through one by one (`side_by_side`), a pass up to its layer for each fit. A replacement adds next to
nothing to a block's forward pass, and counted work leaves it out. Memory: the replacements of all that was tried, and
see `side_by_side`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, runtime_checkable

from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer
from blockpruner.blocks import Mask, Move
from blockpruner.errors import InputError
from blockpruner.recoveries import RECOVERIES
from blockpruner.registry import format_method
from blockpruner.repairs.closed_form import ClosedForm, fill_along
from blockpruner.repairs.recovery import Bench, Recovery, stream_width
from blockpruner.repairs.side_by_side import IN_MEMORY, Walk, begun
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import gaps
from blockpruner.texts.examples import Examples


@runtime_checkable
class Closed(Protocol):
    """A recovery that fills each gap by itself."""

    def form(self) -> ClosedForm: ...


@dataclass(frozen=True)
class Replacing:
    """A `gaps.Filling`: what the closed form of a recovery puts in the gaps of a layer, fitted when first asked for.

    fit: text; held_out: other text, by which ridges are chosen and gaps left empty where that is better.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    text: str
    form: ClosedForm
    fit: Examples
    held_out: Examples
    _made: dict[tuple[str, Mask], Mapping[str, Replacement]] = field(default_factory=dict, repr=False, compare=False)
    _walks: list[Walk] = field(default_factory=list[Walk], repr=False, compare=False)  # the last one, if any

    @classmethod
    def of(cls, model: PreTrainedModel, anatomy: Anatomy, recovery: Recovery, examples: Examples) -> Self:
        """Fitted on the first half of the examples, so that a search looks at losses of the other half.

        InputError for recoveries that do not fill gaps one by one, for items, and for less than two windows.
        """
        if not isinstance(recovery, Closed):
            names = " or ".join(name for name, kind in RECOVERIES.items() if issubclass(kind, Closed))
            raise InputError(f"{recovery.title!r} cannot be fitted inside a search", fix=f"use {names}")
        if examples.question == "choices":
            raise InputError("a recovery is fitted on windows of text, not on items with answers", fix="give text")
        half = len(examples) // 2
        if not half:
            raise InputError("one window cannot be both fitted on and searched on", fix="give more --tokens")
        fit, others = examples.part(0, half), examples.part(half, len(examples))
        return cls(model, anatomy, format_method(recovery, RECOVERIES), recovery.form(), fit, others)

    def __call__(self, layer: Layer, removed: Mask) -> Mapping[str, Replacement]:
        """What stands in the gaps of a layer without the blocks `removed`; the model must be whole."""
        key = (layer.path, removed)
        if key not in self._made:
            try:
                self._made[key] = fill_along(self._walk(layer, removed), self.form)[0].replacements
            except BaseException:  # some streams may be a layer further than others
                self.close()
                raise
        return self._made[key]

    def _walk(self, layer: Layer, removed: Mask) -> Walk:
        """One that has not passed this layer: the last, or a new one. All before the layer is whole."""
        if not self._walks or self._walks[0].passed(layer):
            self.close()
            bench = Bench(self.model, self.anatomy, removed, self.fit, self.held_out)
            self._walks.append(begun(bench, dense=self.form.target == "dense"))
        (walk,) = self._walks
        walk.bench = replace(walk.bench, mask=removed)
        return walk

    def close(self) -> None:
        """Let go of the streams that lead on to the next fit."""
        while self._walks:
            self._walks.pop().close()

    @property
    def windows(self) -> tuple[int, int]:
        """Those of all windows, from the first up to the second, that losses are of."""
        return len(self.fit), len(self.fit) + len(self.held_out)

    @property
    def identity(self) -> str:
        """What a loss depends on beside the mask and the examples."""
        return f"{self.text}, fitted on the first {len(self.fit)} windows, losses of the other {len(self.held_out)}"

    @property
    def held_bytes(self) -> int:
        """Memory for streams on their way from one fit to the next, at most."""
        tokens = sum(text.targets.numel() for text in (self.fit, self.held_out))
        return min(IN_MEMORY, tokens * stream_width(self.model) * self.model.dtype.itemsize)

    def passes(self, moves: Sequence[Move], steps: int) -> float:
        """About how many forward passes over all examples the fits of a search of so many steps from these moves take.

        The way to a layer is half a pass on average.
        """
        looks = sum(len(gaps(self.anatomy, move.blocks)) for move in moves)
        if len(self.anatomy.stacks) != 1:
            return looks / 2
        return 1 + looks / len(self.anatomy.stacks[0].layers) + max(0, steps - 1) / 2
