"""What removed blocks would have added, and what reaches their places: the two sides of every closed-form recovery.

Read on the pruned and so far recovered model: its forward pass runs to the layer of the gap and no further, and there
the layer is called again with what it was given, once with the gap and once with the block. So a micro-batch costs the
layers below, and three calls of that one; nothing is kept of it. Where an update enters the stream is not assumed but
proved: on the first micro-batch the layer must do with the update put in by hand what it does with the block.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer, Part, layer_stand_ins
from blockpruner.anatomy.probing import (
    Call,
    Enough,
    evaluating,
    example_inputs,
    find_stacks,
    first_tensor,
    stood_in,
    without_cache,
)
from blockpruner.blocks import Block, Mask
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.arrivals import Giving, Taking, arrival, tensor_of
from blockpruner.searching.contract import DENSE
from blockpruner.surgery.gaps import UNREPAIRED, Gap, Repair, attach, repaired
from blockpruner.texts.examples import Examples

T = TypeVar("T")


@dataclass(frozen=True)
class Observed:
    """Tokens at a gap: x [tokens, inputs] reaches it, y [tokens, outputs] is missing, weights [tokens]."""

    x: Tensor
    y: Tensor
    weights: Tensor


@torch.no_grad()
def at_layer(model: PreTrainedModel, path: str, batch: Examples, look: Callable[[nn.Module, Call], T]) -> T:
    """What `look` finds, given the layer at `path` and its call, in a forward pass that goes no further."""
    found: list[T] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        found.append(look(module, Call(args, kwargs, None)))
        raise Enough

    handle = model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)
    try:
        with evaluating(model), contextlib.suppress(Enough):
            model(**batch.to(model.device).inputs, **without_cache(model))
    finally:
        handle.remove()
    if not found:
        reason = f"{type(model).__name__} does not run {path} on these examples"
        raise UnsupportedModelError(reason, fix="report the model's type and this message")
    return found[0]


class Reach(Protocol):
    """A way to a layer of the model without some blocks, and with a repair."""

    def at(self, layer: Layer, batch: Examples, mask: Mask, repair: Repair, look: Callable[[nn.Module, Call], T]) -> T:
        """What `look` finds, given the layer and its call in that model, which it is as long as `look` runs."""
        ...


@dataclass(frozen=True)
class Afresh:
    """By a forward pass up to the layer, each time."""

    model: PreTrainedModel
    anatomy: Anatomy

    def at(self, layer: Layer, batch: Examples, mask: Mask, repair: Repair, look: Callable[[nn.Module, Call], T]) -> T:
        with repaired(self.model, self.anatomy, mask, repair):
            return at_layer(self.model, layer.path, batch, look)


def stream_after(
    model: PreTrainedModel,
    anatomy: Anatomy,
    block: Block,
    mask: Mask,
    batch: Examples,
    repair: Repair = UNREPAIRED,
    reach: Reach | None = None,
) -> Tensor:
    """The stream right behind the place of `block`, in the model without `mask`: what the layer returns without what
    follows in it. Only where blocks are added to an untouched stream (`Layer.identity`)."""
    layer = layer_of(anatomy, block)
    later = layer.parts[[part.block for part in layer.parts].index(block) + 1 :]
    return (reach or Afresh(model, anatomy)).at(layer, batch, mask, repair, behind(model, layer, later))


def behind(model: PreTrainedModel, layer: Layer, silent: Iterable[Part] = ()) -> Callable[[nn.Module, Call], Tensor]:
    """A look at the stream behind a layer, some of whose blocks add nothing."""
    specs = {path: spec for part in silent for path, spec in {**part.modules, **part.idle}.items()}

    def look(module: nn.Module, call: Call) -> Tensor:
        stream = dict(call.inputs())[layer.hidden]
        with stood_in(model, specs):
            return tensor_of(call.again(module, {layer.hidden: stream.clone()})).clone()

    return look


def contribution(
    model: PreTrainedModel, anatomy: Anatomy, block: Block, mask: Mask, batch: Examples, repair: Repair
) -> tuple[Tensor, Tensor]:
    """The stream right behind `block` in the model without `mask`, and what `block` has added to it."""
    behind = stream_after(model, anatomy, block, mask, batch, repair)
    return behind, behind - stream_after(model, anatomy, block, mask | {block}, batch, repair)


def layer_of(anatomy: Anatomy, block: Block) -> Layer:
    """The layer that `block` is in."""
    return next(
        layer for stack in anatomy.stacks for layer in stack.layers if block in {part.block for part in layer.parts}
    )


def token_axes(model: PreTrainedModel) -> dict[str, int]:
    """By layer, the dimension of the stream that counts tokens. Cost: one short forward pass of the whole model."""
    with evaluating(model):
        stacks = find_stacks(model, example_inputs(model)).values()
    return {layer.path: layer.token_axis for seen in stacks for layer in seen}


class UpdatesAt:
    """Reads, micro-batch by micro-batch, what is missing at one gap of a pruned model.

    mask: all that is gone; repair: what was recovered before this gap; sinks: the weight of the first position of every
    row, whose states are unlike all others (attention sinks, BOS); dense: y is what is missing to the dense model's
    stream behind the gap, instead of what the block would add to this one's. axes: see `token_axes`; reach: the way to
    the layer of the gap.
    InputError for `dense` where norms or scales stand on the stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        mask: Mask,
        gap: Gap,
        repair: Repair,
        *,
        sinks: float,
        dense: bool,
        axes: Mapping[str, int],
        reach: Reach | None = None,
    ) -> None:
        self.model, self.anatomy, self.mask, self.gap, self.repair = model, anatomy, mask, gap, repair
        self.reach = reach or Afresh(model, anatomy)
        self.sinks, self.dense, self.axis = sinks, dense, axes.get(gap.layer.path, 1)
        without, before = layer_stand_ins(gap.layer, mask), layer_stand_ins(gap.layer, mask - gap.blocks)
        self._opening = {path: spec for path, spec in without.items() if path not in before}
        self._proved = ""
        self._scale = 0.0  # of what is put in the gap, as it arrives in the stream; 0 as long as it is not known
        if dense and gap.part and not gap.layer.identity:
            raise InputError(
                f"{gap.path}: norms or scales stand on the stream, so the dense model's stream is not a sum there",
                fix="use target=block",
            )

    def observe(self, batch: Examples) -> Observed:
        """x, y and weights of the tokens of one micro-batch, in the dtype of the model."""
        left, look = self.mask - self.gap.blocks, self._layer if self.gap.part is None else self._part
        seen = self.reach.at(self.gap.layer, batch, left, self.repair, look)
        return Observed(seen.x, self._to_dense(batch, seen), seen.weights) if self.dense else seen

    def _to_dense(self, batch: Examples, seen: Observed) -> Tensor:
        last = max(self.gap.blocks, key=[part.block for part in self.gap.layer.parts].index)
        here = (self.model, self.anatomy, last)
        whole = stream_after(*here, DENSE, batch, reach=self.reach)
        if self.gap.part is None:
            return whole.reshape(seen.x.shape) - seen.x
        missing = whole - stream_after(*here, self.mask, batch, self.repair, self.reach)
        if not self._scale:
            look = functools.partial(arrival, self.model, self.gap)
            scale = self.reach.at(self.gap.layer, batch, self.mask, self.repair, look)
            if scale is None:
                raise self._unproved("what is put there does not come out of the layer as it went in")
            self._scale = scale
        return missing.reshape(seen.y.shape) / self._scale

    def _layer(self, module: nn.Module, call: Call) -> Observed:
        """Of a layer that left whole: what reaches it is the stream, and what is missing is what it does to that."""
        stream = dict(call.inputs())[self.gap.layer.hidden].clone()
        update = tensor_of(call.again(module, {self.gap.layer.hidden: stream.clone()})) - stream
        return Observed(flat(stream), flat(update), self._weights(stream, stream))

    def _part(self, module: nn.Module, call: Call) -> Observed:
        stream = dict(call.inputs())[self.gap.layer.hidden].clone()

        def again() -> Tensor:
            return tensor_of(call.again(module, {self.gap.layer.hidden: stream.clone()}))

        given = self._given(again)
        if not torch.isfinite(given).all():
            raise InputError(
                f"the states before {self.gap} are NaN or infinite, so nothing can be fitted to them",
                fix="load the model in float32 or bfloat16, or remove fewer blocks",
            )
        update = self._update(again)
        if update.shape[:-1].numel() != given.shape[:-1].numel():
            raise self._unproved("it does not see the tokens that it returns")
        return Observed(flat(given), flat(update), self._weights(given, stream))

    def _given(self, again: Callable[[], Tensor]) -> Tensor:
        """What a replacement in the gap would be given."""
        taking = Taking()
        with stood_in(self.model, self._opening), contextlib.suppress(Enough):
            attach(self.model, self.gap.path, taking)
            again()
        if taking.seen is None:
            raise self._unproved("its place is not run")
        return taking.seen

    def _update(self, again: Callable[[], Tensor]) -> Tensor:
        """What the block adds to the stream: what the last of its modules returns that proves to be that."""
        returned, whole = self._returned(again)
        order = list(returned)
        for path in reversed(order[order.index(self.gap.path) :]):
            update = returned[path]
            if self._proved == path or (not self._proved and self._puts_back(update, again, whole)):
                self._proved = path
                return update
        raise self._unproved("no output of its modules, put in its place, gives what the layer returns with it")

    def _returned(self, again: Callable[[], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What each module of the block returns, in the order they end, less what it passes on; and the layer."""
        assert self.gap.part is not None
        found: dict[str, Tensor] = {}

        def take(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            update = first_tensor(output)
            if update is not None and path == self.gap.path and not self._adds_zeros():
                found[path] = update - dict(enumerate(args), **kwargs)[self._opening[path]["input"]]
            elif update is not None:
                found[path] = update.clone()  # some layers go on to add to it in place

        with contextlib.ExitStack() as hooks:
            for path in (self.gap.path, *self.gap.part.idle):
                hook = functools.partial(take, path)
                module = self.model.get_submodule(path)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            return found, again()

    def _adds_zeros(self) -> bool:
        output = self._opening[self.gap.path]["output"]
        first = output if isinstance(output, str) else next(iter(output.values()))[0]
        return first == "zeros"

    def _puts_back(self, update: Tensor, again: Callable[[], Tensor], whole: Tensor) -> bool:
        """Whether the layer with the gap, and `update` in it, returns what it returns with the block."""
        assert self.gap.part is not None
        # Not what leaves with all blocks of a layer: what stands in the other gaps must get what it got for `whole`.
        with stood_in(self.model, {**self.gap.part.modules, **self.gap.part.idle}):
            attach(self.model, self.gap.path, Giving(update))
            try:
                found = again()
            except RuntimeError:  # of a shape that does not fit there
                return False
        exact = whole.dtype.itemsize >= 4
        rounding = (1e-5 if exact else 2e-2) * float(whole.abs().max())
        return float((found - whole).abs().max()) <= (1e-4 if exact else 2e-2) * float(update.abs().max()) + rounding

    def _weights(self, given: Tensor, stream: Tensor) -> Tensor:
        same = given.ndim == stream.ndim or given.shape[:-1].numel() != stream.shape[:-1].numel()
        return token_weights(given if same else stream, self.axis, self.sinks)

    def _unproved(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"what {self.gap} adds to the stream at {self.gap.path} is not understood: {reason}",
            fix="recover the model without a replacement for it",
        )


def token_weights(states: Tensor, axis: int, sinks: float) -> Tensor:
    """Per token of `states` [..., width], in their order: `sinks` at the first position of `axis`, else 1."""
    weights = torch.ones(states.shape[:-1], device=states.device)
    if axis < weights.ndim:  # else they are one list of all tokens, and where each stood is not known
        weights.select(axis, 0).fill_(sinks)
    return weights.flatten()


def flat(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])
