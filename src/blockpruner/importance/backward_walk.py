"""The backward pass of a model of one stack, layer by layer, so that only one layer's gradients exist at a time.

The model's own forward gives the stream between layers. Then, from the last layer down, each layer is called again,
window by window, with what the model gives it. Over the weights this takes the gradients of one layer, what one layer
keeps for one window, the logits of some positions, and L + 1 states [tokens, hidden] per window.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer
from blockpruner.anatomy.probing import (
    Call,
    Enough,
    enough,
    first_tensor,
    recorded,
    replaced,
    vocabulary_size,
    without_cache,
)
from blockpruner.searching.contract import Progress
from blockpruner.standin import stand_in_for
from blockpruner.texts.examples import IGNORED, Examples

LOGITS_AT_ONCE = 2**23  # float32 copies of so many logits at a time: 32 MiB


class Disagreement(Exception):
    """The walk is not what the model does; says where."""


class BackwardWalk:
    """The backward pass of a model of one stack, layer by layer, with the model's own layers, norms and head."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, logits: int = LOGITS_AT_ONCE) -> None:
        (stack,) = anatomy.stacks
        self.model, self.layers = model, stack.layers
        self.logits_at_once = logits
        self.modules = {layer.path: model.get_submodule(layer.path) for layer in self.layers}
        # In place of the layers while it is only asked what they are given, or what is made of the last state.
        self.through = {layer.path: stand_in_for(self.modules[layer.path], layer.through) for layer in self.layers}

    def run(
        self,
        rows: Sequence[Examples],
        begin: Callable[[int], None],
        done: Callable[[str], None],
        report: Progress,
    ) -> None:
        """Run backward from every window's loss; parameters that require a gradient in the layers get theirs.

        begin: called with the number of the window before each backward pass; done: called with a layer's path and a
        dot once no more gradients of that layer come. Disagreement, maybe half-way, if a layer called by itself is not
        what it is in the model. A window's loss is the mean over its predicted tokens.
        """
        total, count = len(rows) * (len(self.layers) + 1), 0
        states: list[list[Tensor]] = []
        slopes: list[Tensor] = []  # of the loss of each window with respect to the stream, where the walk is
        for row in rows:
            states.append(self._states(row))
            slopes.append(self._head(row, states[-1][-1]))
            report(count := count + 1, total, "forward pass")
        for place in reversed(range(len(self.layers))):
            for window, row in enumerate(rows):
                begin(window)
                slopes[window] = self._back(place, row, states[window].pop(), states[window][-1], slopes[window])
                report(count := count + 1, total, f"backward pass, layer {place}")
            done(f"{self.layers[place].path}.")

    @torch.no_grad()
    def _states(self, row: Examples) -> list[Tensor]:
        """The stream before each layer and after the last one, from the model's own forward."""
        found: list[Tensor] = []

        def before(key: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(dict(enumerate(args), **kwargs)[key].clone().cpu())  # some layers change it in place

        def after(_: nn.Module, __: object, output: Any) -> None:
            found.append(_tensor(output))
            raise Enough

        with contextlib.ExitStack() as hooks, contextlib.suppress(Enough):
            for layer in self.layers:
                hook = self.modules[layer.path].register_forward_pre_hook(
                    partial(before, layer.hidden), with_kwargs=True
                )
                hooks.callback(hook.remove)
            hooks.callback(self.modules[self.layers[-1].path].register_forward_hook(after).remove)
            self.model(**row.inputs, **without_cache(self.model))
        if len(found) != len(self.layers) + 1 or found[-1].shape[:2] != row.targets.shape or found[-1].ndim != 3:
            raise Disagreement("the stream does not run through the layers in order as [windows, tokens, hidden]")
        return found

    def _head(self, row: Examples, state: Tensor) -> Tensor:
        """The slope of the window's loss with respect to the last state, by the model's own norm and head."""
        tokens = state.shape[1]
        predicted = int((row.targets != IGNORED).sum())
        step = max(1, self.logits_at_once // vocabulary_size(self.model))
        slopes = []
        for start in range(0, tokens, step):
            piece = state[:, start : start + step].detach().requires_grad_()
            targets = row.targets[:, start : start + step]
            inputs = {k: v[:, start : start + step] if v.shape[1:2] == (tokens,) else v for k, v in row.inputs.items()}
            loss = nn.functional.cross_entropy(
                self._logits(piece, inputs).flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            (slope,) = torch.autograd.grad(loss / predicted, piece)
            slopes.append(slope)
        return torch.cat(slopes, dim=1)

    def _logits(self, state: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        first = self.layers[0]

        def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            changed = tuple(state if place == first.hidden else value for place, value in enumerate(args))
            return changed, {name: state if name == first.hidden else value for name, value in kwargs.items()}

        handle = self.through[first.path].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with replaced(self.model, self.through):
                return self.model(**inputs, **without_cache(self.model)).logits
        finally:
            handle.remove()

    def _back(self, place: int, row: Examples, after: Tensor, before: Tensor, slope: Tensor) -> Tensor:
        """From the slope after a layer to that before it; the gradients of its parameters are collected on the way."""
        layer = self.layers[place]
        before, after = before.to(slope.device), after.to(slope.device)
        stream = before.detach().requires_grad_()
        output = _tensor(self._call(layer, row).again(self.modules[layer.path], {layer.hidden: stream.clone()}))
        gap = float((output.detach() - after).abs().max() / after.abs().max())
        if not gap <= (1e-5 if after.dtype.itemsize >= 4 else 1e-2):
            raise Disagreement(f"called by itself, {layer.path} differs by {gap:.2g} from what it is in the model")
        output.backward(slope)
        assert stream.grad is not None
        return stream.grad

    @torch.no_grad()
    def _call(self, layer: Layer, row: Examples) -> Call:
        """What the model gives this layer beside the stream; costs the embedding of the window."""
        last = self.through[self.layers[-1].path]
        with replaced(self.model, self.through), recorded({"": self.through[layer.path]}) as calls:
            handle = last.register_forward_hook(enough)
            try:
                with contextlib.suppress(Enough):
                    self.model(**row.inputs, **without_cache(self.model))
            finally:
                handle.remove()
        return calls[""][0]


def _tensor(output: Any) -> Tensor:
    found = first_tensor(output)
    assert found is not None  # read_anatomy has seen it
    return found
