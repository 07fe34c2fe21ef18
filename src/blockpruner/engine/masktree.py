"""The engine: what a model puts out without each of many masks, every shared prefix of layers computed once.

Masks that agree on the first layers share the states up to there. The tree is walked breadth first, one layer at a
time: each layer of the model is called as it is, with stand-ins for the blocks it lacks, once per distinct prefix.
What a layer needs besides the stream (positions, masks, per-layer inputs) is recorded from the model's own forward,
run with layers that hand the stream through; the head is reached the same way, with the final state put in.
A greedy step over both blocks of L layers takes (L + 1) / (2L - 1) of the work of one full pass per candidate.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer, layer_stand_ins
from blockpruner.anatomy.probing import Call, Enough, enough, first_tensor, replaced, stood_in, without_cache
from blockpruner.artifacts import Traffic, Work
from blockpruner.blocks import Mask
from blockpruner.engine.pace import now
from blockpruner.engine.spilling import Ledger, Spill
from blockpruner.loading.lending import at_hand
from blockpruner.standin import StandIn, stand_in_for
from blockpruner.surgery.gaps import Filling, attach

Inputs = Mapping[str, Tensor]
Asked = Mapping[int, tuple[Sequence[Mask], Inputs]]
Node = tuple[int, int, Mask]  # micro-batch, layers that are behind it, blocks it lacks so far


@dataclass(frozen=True)
class Branching:
    """One call of one layer: the prefix it continues, the prefix it makes, and what it lacks here."""

    parent: Mask
    child: Mask
    removed: Mask


def sweep_plan(layers: Sequence[Layer], masks: Sequence[Mask]) -> list[list[Branching]]:
    """Per layer, the distinct calls that these masks need, grouped by parent."""
    plan: list[list[Branching]] = []
    prefixes: dict[Mask, Mask] = {mask: frozenset() for mask in masks}
    for layer in layers:
        here = frozenset(part.block for part in layer.parts)
        children: dict[Mask, Branching] = {}
        for mask in prefixes:
            removed = mask & here
            child = prefixes[mask] | removed
            children.setdefault(child, Branching(prefixes[mask], child, removed))
            prefixes[mask] = child
        plan.append(sorted(children.values(), key=lambda b: _key(b.parent)))
    return plan


def _key(mask: Mask) -> list[str]:
    return sorted(map(str, mask))


def sweep_work(layers: Sequence[Layer], masks: Sequence[Mask], tokens: int) -> Work:
    """What the layers of a sweep over these masks cost on so many tokens, counted without running it."""
    counts: Counter[bool] = Counter()
    for layer, branchings in zip(layers, sweep_plan(layers, masks), strict=True):
        for branching in branchings:
            counts.update(p.block.kind == "mlp" for p in layer.parts if p.block not in branching.removed)
    return Work(attention_tokens=counts[False] * tokens, mlp_tokens=counts[True] * tokens)


def sweep_traffic(
    layers: Sequence[Layer], asked: Mapping[int, tuple[Sequence[Mask], int]], memory: int | None
) -> Traffic:
    """What `MaskTree.walk` holds and spills, counted without running it.

    asked: per micro-batch the masks, and the bytes of a state; memory: of the `Spill` that it is given.
    """
    states, plans = Ledger[Node](memory), {tuple(masks): _grouped(layers, masks) for masks, _ in asked.values()}
    mine = {batch: (plans[tuple(masks)], size) for batch, (masks, size) in asked.items()}
    for number in range(len(layers)):
        for batch, (plan, size) in mine.items():
            if number == 0:
                states.put((batch, 0, frozenset()), size)
            for parent, children in plan[number]:
                states.pop((batch, number, parent))
                for each in children:
                    states.put((batch, number + 1, each.child), size)
    return Traffic(spilled=states.spilled, held=states.most)


def _grouped(layers: Sequence[Layer], masks: Sequence[Mask]) -> list[list[tuple[Mask, list[Branching]]]]:
    """Per layer, the prefixes that go into it, each with its calls."""
    return [
        [(parent, list(children)) for parent, children in itertools.groupby(calls, lambda each: each.parent)]
        for calls in sweep_plan(layers, masks)
    ]


class _Recorder(StandIn):
    """Hands the stream through and remembers the call."""

    call: Call | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = Call(args, kwargs, None)
        return super().forward(*args, **kwargs)


class _Injector(StandIn):
    """Returns a given state instead of the stream it receives."""

    state: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.state is None:
            return super().forward(*args, **kwargs)
        return self._fill(self.spec["output"], self.state, args, kwargs)


class MaskTree:
    """Evaluates masks on batches of windows for a model with one stack of layers.

    Memory over the weights: one state [rows, tokens, hidden] per live prefix, at most one per mask and three more,
    and the logits of the positions that are asked for at once. The model is used as it is and never changed for longer
    than a call. inputs: by the names of the model's forward, [rows, tokens]. filling: of the gaps that masks leave.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, filling: Filling | None = None) -> None:
        (stack,) = anatomy.stacks
        self.model = model
        self.layers = stack.layers
        self._filling = filling
        self._extra = without_cache(model)
        self._recorders = self._layers_as(_Recorder)
        self._injectors = self._layers_as(_Injector)

    def _layers_as(self, kind: type[StandIn]) -> dict[str, StandIn]:
        """A stand-in of this kind for every whole layer, by path."""
        return {
            layer.path: stand_in_for(self.model.get_submodule(layer.path), layer.through, kind) for layer in self.layers
        }

    @torch.no_grad()
    def final_states(self, masks: Sequence[Mask], inputs: Inputs) -> dict[Mask, Tensor]:
        """The residual stream after the last layer, per distinct mask; bit for bit the same whatever the others are."""
        take = self.walk({0: (masks, inputs)}, Spill())
        return {mask: take(0, mask) for mask in dict.fromkeys(masks)}

    @torch.no_grad()
    def walk(self, asked: Asked, states: Spill[Node]) -> Callable[[int, Mask], Tensor]:
        """Lead micro-batches, by number, through the layers; gives what hands over each final state, once.

        Each layer sees all prefixes of all micro-batches before the next one does, so that its weights are read once.
        What it is to be called with is recorded again for each micro-batch then, not kept, when there are several.
        """
        plans = {tuple(masks): _grouped(self.layers, masks) for masks, _ in asked.values()}
        calls: list[Call] = []
        for number, layer in enumerate(self.layers):
            with at_hand(self.model.get_submodule(layer.path)):
                for batch, (masks, inputs) in asked.items():
                    if number == 0 or len(asked) > 1:
                        calls = self.calls(inputs)
                    if number == 0:
                        states.put((batch, 0, frozenset()), _stream(calls[0], layer))
                    for parent, children in plans[tuple(masks)][number]:
                        state = states.pop((batch, number, parent))
                        for each in children:
                            after = self._step(layer, calls[number], state, each.removed)
                            states.put((batch, number + 1, each.child), after)
        return lambda batch, mask: states.pop((batch, len(self.layers), mask))

    @torch.no_grad()
    def timed(self, inputs: Inputs) -> tuple[Tensor, float, float]:
        """The whole model's final state, the seconds its layers take for it, and those to have their weights at hand.

        Each layer is called twice, and what the first call takes longer is for weights that were not there yet.
        """
        calls = self.calls(inputs)
        state = _stream(calls[0], self.layers[0])
        computing = reading = 0.0
        for layer, call in zip(self.layers, calls, strict=True):
            start = now(self.model)
            with at_hand(self.model.get_submodule(layer.path)):
                self._step(layer, call, state, frozenset())
                middle = now(self.model)
                state = self._step(layer, call, state, frozenset())
                end = now(self.model)
            computing += end - middle
            reading += max(0.0, (middle - start) - (end - middle))
        return state, computing, reading

    def _step(self, layer: Layer, call: Call, state: Tensor, removed: Mask) -> Tensor:
        put = self._filling(layer, removed) if self._filling and removed else {}
        if len(removed) == len(layer.parts) and not layer.filled and not put:
            return state  # proved: a layer without blocks is the identity
        with stood_in(self.model, layer_stand_ins(layer, removed)):
            for path, replacement in put.items():
                attach(self.model, path, replacement)
            # A copy: another child, or a prefix that skips this layer, may still need a state that is changed in place.
            output = first_tensor(call.again(self.model.get_submodule(layer.path), {layer.hidden: state.clone()}))
        assert output is not None  # read_anatomy has seen it
        return output

    @torch.no_grad()
    def calls(self, inputs: Inputs) -> list[Call]:
        """What all layers are called with for these inputs, the embedded tokens as the stream; costs the embedding."""
        last = self._recorders[self.layers[-1].path]
        handle = last.register_forward_hook(enough)
        try:
            with replaced(self.model, self._recorders), contextlib.suppress(Enough):
                self.model(**inputs, **self._extra)
            return [r.call for r in self._recorders.values() if isinstance(r, _Recorder) and r.call]
        finally:
            handle.remove()
            for recorder in self._recorders.values():
                recorder.__dict__.pop("call", None)

    @torch.no_grad()
    def outputs(self, state: Tensor, inputs: Inputs, positions: Tensor) -> Tensor:
        """What the model makes of a final state at these positions: its own last norm, head and soft caps.

        state: [rows, tokens, hidden] -> [rows, positions, vocabulary]; of `inputs` only the shape counts here.
        """
        first = self._injectors[self.layers[0].path]
        first.state = state[:, positions]
        try:
            with replaced(self.model, self._injectors):
                given = {name: value[:, positions] for name, value in inputs.items()}
                return output_of(self.model(**given, **self._extra))
        finally:
            del first.state


def output_of(result: Any) -> Tensor:
    """The logits of a model with a head, else its last hidden states."""
    return result.logits if getattr(result, "logits", None) is not None else result[0]


def _stream(call: Call, layer: Layer) -> Tensor:
    return dict(call.inputs())[layer.hidden]
