"""The engine: what a model puts out without each of many masks, every shared prefix of layers computed once.

Masks that agree on the first layers share the states up to there. The tree is walked breadth first, one layer at a
time: each layer of the model is called as it is, with stand-ins for the blocks it lacks, once per distinct prefix.
What a layer needs besides the stream (positions, masks, per-layer inputs) is recorded from the model's own forward,
run with layers that hand the stream through; the head is reached the same way, with the final state put in.
A greedy step over both blocks of L layers takes (L + 1) / (2L - 1) of the work of one full pass per candidate.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask
from blockpruner.parts import Anatomy, Layer, layer_stand_ins
from blockpruner.probing import Call, accepts, first_tensor, replaced, stood_in
from blockpruner.standin import StandIn, stand_in_for

Inputs = Mapping[str, Tensor]


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


class _Stop(Exception):
    """Leaves the model's forward once its layers are done."""


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
    than a call. inputs: by the names of the model's forward, [rows, tokens].
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        (stack,) = anatomy.stacks
        self.model = model
        self.layers = stack.layers
        self._extra = {"use_cache": False} if accepts(model, "use_cache") else {}
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
        calls = self._record(inputs)
        states = {frozenset[Any](): _stream(calls[0], self.layers[0])}
        for layer, call, branchings in zip(self.layers, calls, sweep_plan(self.layers, masks), strict=True):
            after: dict[Mask, Tensor] = {}
            for position, branching in enumerate(branchings):
                state = states[branching.parent]
                last_use = position + 1 == len(branchings) or branchings[position + 1].parent != branching.parent
                if last_use:
                    del states[branching.parent]
                after[branching.child] = self._step(layer, call, state, branching.removed)
            states = after
        return states

    def _step(self, layer: Layer, call: Call, state: Tensor, removed: Mask) -> Tensor:
        if len(removed) == len(layer.parts):
            return state  # proved: a layer without blocks is the identity
        with stood_in(self.model, layer_stand_ins(layer, removed)):
            # A copy: another child, or a prefix that skips this layer, may still need a state that is changed in place.
            output = first_tensor(call.again(self.model.get_submodule(layer.path), {layer.hidden: state.clone()}))
        assert output is not None  # read_anatomy has seen it
        return output

    def _record(self, inputs: Inputs) -> list[Call]:
        """The calls of all layers for these inputs, with the embedded tokens as the stream; costs the embedding."""
        last = self._recorders[self.layers[-1].path]
        handle = last.register_forward_hook(_stop)
        try:
            with replaced(self.model, self._recorders), contextlib.suppress(_Stop):
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


def _stop(*_: Any) -> None:
    raise _Stop


def _stream(call: Call, layer: Layer) -> Tensor:
    return dict(call.inputs())[layer.hidden]
