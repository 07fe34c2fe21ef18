"""The text of a recovery on its way through the dense model and the pruned one, layer by layer, side by side.

A recovery in closed form looks at one layer after the other, in both models or in the pruned one. Where layers alone
make what the model does, which is proved on two rows of the held-out text, the streams before one layer are held, and
led on when the next one is wanted: IN_MEMORY bytes of them in memory, the rest on disk. So all looks together cost one
pass through each model, beside the layers that are looked at. What a layer is called with besides the stream is
recorded again for each micro-batch (see `engine.masktree`), which costs the embedding. Elsewhere, as with an encoder
before the decoder, every look takes a forward pass up to its layer.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from blockpruner.anatomy.parts import Layer
from blockpruner.anatomy.probing import MISFIT, Call, evaluating
from blockpruner.blocks import Mask
from blockpruner.engine.masktree import MaskTree
from blockpruner.engine.spilling import Spill
from blockpruner.errors import is_out_of_memory
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.updates import Afresh, behind, token_axes
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import Examples

BATCH_TOKENS = 2048
IN_MEMORY = 2**30

T = TypeVar("T")


class Walk:
    """All text in micro-batches, and a way to each layer for them; here by a forward pass each time.

    axes: see `updates.token_axes`.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.fit, self.held_out = (text.batches(BATCH_TOKENS) for text in (bench.examples, bench.held_out))
        self.layers = [layer for stack in bench.anatomy.stacks for layer in stack.layers]
        self.axes = token_axes(bench.model)
        self._reach = Afresh(bench.model, bench.anatomy)

    def lead_to(self, layer: Layer, repair: Repair) -> None:
        """From here on it is this layer that is looked at; `repair` is what stands in those before it for good."""

    def passed(self, layer: Layer) -> bool:
        """Whether it is too late to look at this layer."""
        return False

    def close(self) -> None:
        """Let go of what is held."""

    def at(self, layer: Layer, batch: Examples, mask: Mask, repair: Repair, look: Callable[[nn.Module, Call], T]) -> T:
        """See `updates.Reach`. batch: one of `fit` or `held_out`; mask: DENSE, or what is gone, but for blocks here."""
        return self._reach.at(layer, batch, mask, repair, look)


class Led(Walk):
    """The same from the streams before the layer that is looked at, for models with one stack.

    dense: whether the dense model is asked for. Its stream is kept beside the pruned one's from where they part.
    """

    def __init__(self, bench: Bench, dense: bool) -> None:
        super().__init__(bench)
        self.tree = MaskTree(bench.model, bench.anatomy)
        self._parts = [*self.fit, *self.held_out]
        self._numbers = {id(part): number for number, part in enumerate(self._parts)}
        self._next, self._dense, self._parted = 0, dense, dense and bool(bench.start.weights)
        self.states: Spill[tuple[int, bool]] = Spill(IN_MEMORY, fix="free some disk space, or fit on less text")

    def begin(self) -> None:
        """Put in what reaches the first layer."""
        first, pruned, dense = self.layers[0].hidden, (self.bench.mask, self.bench.start), (DENSE, UNREPAIRED)
        with evaluating(self.bench.model):
            for number, part in enumerate(self._parts):
                for mask, repair in (pruned, dense) if self._parted else (pruned,):
                    with repaired(self.bench.model, self.bench.anatomy, mask, repair):
                        state = dict(self._call(part, 0).inputs())[first]
                    self.states.put((number, repair is not self.bench.start), state)

    def at(self, layer: Layer, batch: Examples, mask: Mask, repair: Repair, look: Callable[[nn.Module, Call], T]) -> T:
        assert layer is self.layers[self._next]
        model = self.bench.model
        with evaluating(model), torch.no_grad(), repaired(model, self.bench.anatomy, mask, repair):
            dense = self._parted and mask == DENSE and repair is UNREPAIRED
            state = self.states.get((self._numbers[id(batch)], dense))
            return look(model.get_submodule(layer.path), self._call(batch, self._next).given({layer.hidden: state}))

    def lead_to(self, layer: Layer, repair: Repair) -> None:
        while self.layers[self._next] is not layer:
            self._advance(repair)

    def passed(self, layer: Layer) -> bool:
        return self.layers.index(layer) < self._next

    def close(self) -> None:
        self.states.close()

    def _advance(self, repair: Repair) -> None:
        layer = self.layers[self._next]
        before, gone = self._parted, any(part.block in self.bench.mask for part in layer.parts)
        parted = before or (self._dense and gone)
        for number, part in enumerate(self._parts):
            after = {False: self.at(layer, part, self.bench.mask, repair, behind(self.bench.model, layer))}
            if parted:
                after[True] = self.at(layer, part, DENSE, UNREPAIRED, behind(self.bench.model, layer))
            for dense in (False, True) if before else (False,):
                self.states.pop((number, dense))
            for dense, state in after.items():
                self.states.put((number, dense), state)
        self._next, self._parted = self._next + 1, parted

    def _call(self, part: Examples, number: int) -> Call:
        return self.tree.calls(part.to(self.bench.model.device).inputs)[number]


def proved(bench: Bench) -> bool:
    """Whether two rows of text, led side by side, end as in one pass: in the dense model and in the pruned one.

    Led as they are going to be: what layers hand on beside the stream is not there then.
    """
    rows = list(itertools.islice(bench.held_out.rows(), 2))
    led = Led(replace(bench, examples=rows[0], held_out=rows[-1], start=UNREPAIRED), dense=True)
    last = led.layers[-1]
    try:
        with led.states:
            led.begin()
            led.lead_to(last, UNREPAIRED)
            both = [(row, mask) for row in (*led.fit, *led.held_out) for mask in dict.fromkeys((DENSE, bench.mask))]
            return all(_agrees(led, last, row, mask) for row, mask in both)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return False


def _agrees(led: Led, last: Layer, row: Examples, mask: Mask) -> bool:
    look = behind(led.bench.model, last)
    found = led.at(last, row, mask, UNREPAIRED, look)
    plain = Walk.at(led, last, row, mask, UNREPAIRED, look)
    room = (1e-4 if plain.dtype.itemsize >= 4 else 5e-2) * float(plain.abs().max())
    return found.shape == plain.shape and float((found - plain).abs().max()) <= room


def begun(bench: Bench, dense: bool) -> Walk:
    """The cheapest walk that this model allows, to be closed. dense: whether the dense model is asked for too."""
    if len(bench.anatomy.stacks) != 1 or not proved(bench):
        return Walk(bench)
    led = Led(bench, dense)
    led.begin()
    return led


def side_by_side(bench: Bench, dense: bool) -> contextlib.closing[Walk]:
    """The same as a context."""
    return contextlib.closing(begun(bench, dense))
