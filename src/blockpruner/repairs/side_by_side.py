"""The dense model and the pruned one led through their layers side by side, once, over all text.

Of their states those before one layer exist, IN_MEMORY bytes of them in memory and the rest on disk. What a layer is
called with besides the stream is recorded again for each micro-batch (see `engine.masktree`), which costs the
embedding. Whether layers alone make what the model does is proved, on a row of the held-out text.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from blockpruner.anatomy.parts import Layer, Part
from blockpruner.anatomy.probing import Call, evaluating, stood_in
from blockpruner.engine.masktree import MaskTree
from blockpruner.engine.spilling import Spill
from blockpruner.errors import UnsupportedModelError
from blockpruner.repairs.closed_form import BATCH_TOKENS
from blockpruner.repairs.pupil import Ends
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.updates import tensor_of, token_axes
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired

IN_MEMORY = 2**30


class SideBySide:
    """Both models' streams before the layer that is next, by micro-batch.

    That of the pruned model is not kept as long as nothing makes it another (`same`). To be used within `states`.
    UnsupportedModelError if layers alone do not make what the model does.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.same = bench, not bench.start.weights
        if len(bench.anatomy.stacks) != 1:
            reason = f"{type(bench.model).__name__} has {len(bench.anatomy.stacks)} stacks of layers"
            raise UnsupportedModelError(reason, fix="use linear")
        self.tree = MaskTree(bench.model, bench.anatomy)
        fitted, held_out = (text.batches(BATCH_TOKENS) for text in (bench.examples, bench.held_out))
        self._parts, self._fitted = (*fitted, *held_out), len(fitted)
        self._axes = token_axes(bench.model)
        self.states: Spill[tuple[int, bool]] = Spill(IN_MEMORY)
        self._prove()
        first = self.tree.layers[0].hidden
        for batch in range(len(self._parts)):
            for dense in (True,) if self.same else (True, False):
                self.states.put((batch, dense), dict(self._call(batch, 0, dense, bench.start).inputs())[first])

    def batches(self, fitted: bool) -> range:
        """The micro-batches of the text to fit on, or of what is held out."""
        return range(self._fitted) if fitted else range(self._fitted, len(self._parts))

    def axis(self, number: int) -> int:
        """Which dimension of the stream counts tokens."""
        return self._axes.get(self.tree.layers[number].path, 1)

    def through(self, number: int, batch: int, dense: bool, repair: Repair, silent: Iterable[Part] = ()) -> Tensor:
        """The stream behind a layer, the next one, some of whose blocks add nothing."""
        layer, call, model = self.tree.layers[number], self._call(batch, number, dense, repair), self.bench.model
        specs = {path: spec for part in silent for path, spec in {**part.modules, **part.idle}.items()}
        with self._as(dense, repair), stood_in(model, specs):
            state = self.states.get((batch, dense or self.same)).clone()
            return tensor_of(call.again(model.get_submodule(layer.path), {layer.hidden: state}))

    def agree(self, layer: Layer, part: Part) -> bool:
        """Whether both models have the same stream behind a block that is left."""
        return self.same and not any(each.block in self.bench.mask for each in layer.parts[: layer.parts.index(part)])

    def advance(self, number: int, repair: Repair) -> None:
        """Lead both through one layer."""
        same = self.same and not any(part.block in self.bench.mask for part in self.tree.layers[number].parts)
        before, behind = ((True,) if alike else (True, False) for alike in (self.same, same))
        for batch in range(len(self._parts)):
            after = {dense: self.through(number, batch, dense, repair) for dense in behind}
            for dense in before:
                self.states.pop((batch, dense))
            for dense, state in after.items():
                self.states.put((batch, dense), state)
        self.same = same

    def _call(self, batch: int, number: int, dense: bool, repair: Repair) -> Call:
        """What a layer is called with, but for the stream."""
        with self._as(dense, repair):
            return self.tree.calls(self._parts[batch].to(self.bench.model.device).inputs)[number]

    def _as(self, dense: bool, repair: Repair) -> AbstractContextManager[None]:
        """While it is open, the model is the dense one, or the pruned one."""
        mask, made = (DENSE, UNREPAIRED) if dense else (self.bench.mask, repair)
        return repaired(self.bench.model, self.bench.anatomy, mask, made)

    def _prove(self) -> None:
        model, row = self.bench.model, next(self.bench.held_out.rows()).to(self.bench.model.device)
        for mask in (DENSE, self.bench.mask):
            with evaluating(model), torch.no_grad(), repaired(model, self.bench.anatomy, mask):
                plain, _ = Ends(model, self.bench.anatomy).body(row)
            with evaluating(model):
                led = self.tree.final_states([mask], row.inputs)[mask]
            room = (1e-4 if plain.dtype.itemsize >= 4 else 5e-2) * float(plain.abs().max())
            if led.shape != plain.shape or not float((led - plain).abs().max()) <= room:
                reason = f"{type(model).__name__} does more than lead a stream through its layers"
                raise UnsupportedModelError(reason, fix="use linear")
