"""The engine: the losses of many masks on one batch of windows, every shared prefix of layers computed once.

Masks that agree on the first layers share the states up to there. The tree is walked breadth first, one layer at a
time: each layer of the model is called as it is, with stand-ins for the blocks it lacks, once per distinct prefix.
What a layer needs besides the stream (positions, masks, per-layer inputs) is recorded from the model's own forward,
run with layers that hand the stream through; the head is reached the same way, with the final state put in.
A greedy step over both blocks of L layers takes (L + 1) / (2L - 1) of the work of one full pass per candidate.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask
from blockpruner.metrics import token_losses
from blockpruner.parts import Anatomy, Layer, layer_stand_ins
from blockpruner.probing import Call, accepts, first_tensor, replaced, stood_in
from blockpruner.standin import StandIn, stand_in_for

HEAD_POSITIONS = 256  # positions whose logits exist at once


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


def sweep_work(layers: Sequence[Layer], masks: Sequence[Mask], windows: int, length: int) -> Work:
    """What a sweep over these masks costs, counted without running it."""
    counts: Counter[bool] = Counter()
    for layer, branchings in zip(layers, sweep_plan(layers, masks), strict=True):
        for branching in branchings:
            counts.update(p.block.kind == "mlp" for p in layer.parts if p.block not in branching.removed)
    tokens = windows * length
    return Work(
        attention_tokens=counts[False] * tokens,
        mlp_tokens=counts[True] * tokens,
        head_tokens=len(set(masks)) * windows * (length - 1),
    )


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

    Memory over the weights: one state [windows, tokens, hidden] per live prefix, at most one per mask and three more,
    and the logits of HEAD_POSITIONS positions. The model is used as it is and never changed for longer than a call.
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
    def losses(self, masks: Sequence[Mask], windows: Tensor) -> Iterator[tuple[Mask, Tensor]]:
        """Each distinct mask, in order, with its token losses [windows, tokens - 1] in nats, float32, on the CPU.

        windows: token ids [windows, tokens]. The numbers of a mask do not depend on the other masks, bit for bit.
        """
        windows = windows.to(self.model.device)
        states = self.final_states(masks, windows)
        for mask in dict.fromkeys(masks):
            yield mask, self.head_losses(states.pop(mask), windows)

    @torch.no_grad()
    def final_states(self, masks: Sequence[Mask], windows: Tensor) -> dict[Mask, Tensor]:
        """The residual stream after the last layer, per distinct mask."""
        calls = self._record(windows)
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

    def _record(self, windows: Tensor) -> list[Call]:
        """The calls of all layers for these windows, with the embedded tokens as the stream; costs the embedding."""
        last = self._recorders[self.layers[-1].path]
        handle = last.register_forward_hook(_stop)
        try:
            with replaced(self.model, self._recorders), contextlib.suppress(_Stop):
                self.model(input_ids=windows, **self._extra)
            return [r.call for r in self._recorders.values() if isinstance(r, _Recorder) and r.call]
        finally:
            handle.remove()
            for recorder in self._recorders.values():
                recorder.__dict__.pop("call", None)

    @torch.no_grad()
    def head_losses(self, state: Tensor, windows: Tensor) -> Tensor:
        """Token losses [windows, tokens - 1] from final states [windows, tokens, hidden], some positions at a time."""
        step = max(1, HEAD_POSITIONS // len(windows))
        losses = []
        for start in range(0, windows.shape[1] - 1, step):
            stop = min(start + step, windows.shape[1] - 1)
            logits = self._logits(state[:, start:stop], windows[:, start:stop])
            found = token_losses(logits.flatten(0, 1), windows[:, start + 1 : stop + 1].flatten())
            losses.append(found.view(len(windows), -1).cpu())
        return torch.cat(losses, dim=1)

    def _logits(self, state: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of a final state: its own last norm, head and soft caps. `ids` only give the shape."""
        first = self._injectors[self.layers[0].path]
        first.state = state
        try:
            with replaced(self.model, self._injectors):
                return self.model(input_ids=ids, **self._extra).logits
        finally:
            del first.state


def _stop(*_: Any) -> None:
    raise _Stop


def _stream(call: Call, layer: Layer) -> Tensor:
    return dict(call.inputs())[layer.hidden]
