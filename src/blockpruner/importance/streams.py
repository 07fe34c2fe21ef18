"""The residual stream before and after moves: what every criterion that compares states is made of.

One forward pass per micro-batch, of the model without `lab.mask`, and no further than the last state that is needed,
so that no logits are made. The state after block j of a layer is what the layer returns for the same input when the
blocks after j stand in (`parts.layer_stand_ins`); before its first block it is the layer's input, after its last one
the layer's output. Blocks count in the order of the anatomy, also where they run beside each other (parallel layers);
in layers with norms or scales on the stream (BERT) these are part of every state but the layer's input. Several streams
per token (hyper-connections) count as positions.

For a state inside a layer the layer is called once more, before its own call, whose writes to whatever is shared come
last. Memory over the model's: the states before moves that have not ended, those of one micro-batch.
Differences of two states carry the rounding of the model's dtype.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Layer, Spec, layer_stand_ins
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
from blockpruner.blocks import Block, Mask, Move, format_mask
from blockpruner.errors import UnsupportedModelError
from blockpruner.importance.criterion import Lab, run_of_blocks
from blockpruner.searching.contract import Scores
from blockpruner.searching.evaluations import estimate
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import IGNORED, Examples

# States before and after a move, float32 [rows, tokens, ..., hidden] -> a number per position; one row at a time.
Comparison = Callable[[Tensor, Tensor], Tensor]

BATCH_TOKENS = 2048
TINY = torch.finfo(torch.float32).tiny  # below every norm that is not zero, so that nothing by nothing is nothing


def scores_by_state(lab: Lab, moves: Sequence[Move], compare: Comparison, *, name: str, unit: str) -> Scores:
    """The mean of `compare` over all positions of an example, then over examples, for each move; in `unit`.

    name: of the criterion with its options, under which the numbers of each micro-batch are noted.
    InputError for a move that is not a run of blocks. Cost: `passes`.
    """
    if not (moves := tuple(dict.fromkeys(moves))):
        return {}
    reader = _Reader(lab, moves, compare)
    asked = hashlib.sha256("\n".join(map(str, moves)).encode()).hexdigest()[:16]
    title = f"{name} without {format_mask(lab.mask)} of moves {asked}"
    batches = lab.examples.batches(BATCH_TOKENS)
    values: list[list[float]] = [[] for _ in moves]
    lab.report(0, len(batches), name)
    for number, batch in enumerate(batches):
        noted = lab.notes.get(f"{title}: micro-batch {number}", functools.partial(reader.units, batch))
        for known, new in zip(values, noted, strict=True):
            known += [math.nan if value is None else value for value in new]
        lab.report(number + 1, len(batches), name)
    return {move: estimate(found, unit) for move, found in zip(moves, values, strict=True)}


def passes(lab: Lab, moves: Sequence[Move]) -> float:
    """Forward passes over all examples: one, and a share for the blocks that run again for states inside layers."""
    watches = _watches(lab, moves)
    again = sum(count for watch in watches for count in watch.places() if count < len(watch.left))
    return 1 + again / max(1, len(lab.anatomy.outline.blocks) - len(lab.mask))


def directions(states: Tensor) -> Tensor:
    """Each vector of `states` [..., hidden] at length one; zeros stay zeros."""
    return states / lengths(states)[..., None]


def lengths(states: Tensor, p: int = 2) -> Tensor:
    """The L1 or L2 norm of each vector of `states` [..., hidden], above zero."""
    return states.norm(p, dim=-1).clamp_min(TINY)


@dataclass(frozen=True)
class _Watch:
    """A layer in which moves begin or end, by the number of its blocks (of those that are left) that ran before."""

    layer: Layer
    left: tuple[Block, ...]
    begins: dict[int, list[Move]] = field(default_factory=dict)
    ends: dict[int, list[Move]] = field(default_factory=dict)

    def places(self) -> list[int]:
        return sorted(self.begins.keys() | self.ends.keys())

    def stand_ins(self, count: int, gone: Mask) -> dict[str, Spec]:
        """What takes the blocks after the first `count` out of a layer that is without `gone` already."""
        before = layer_stand_ins(self.layer, gone)
        after = layer_stand_ins(self.layer, gone | frozenset(self.left[count:]))
        return {path: spec for path, spec in after.items() if path not in before}


def _watches(lab: Lab, moves: Sequence[Move]) -> list[_Watch]:
    """The layers where `moves` begin or end."""
    watches, place = [], {}
    for stack in lab.anatomy.stacks:
        for layer in stack.layers:
            watch = _Watch(layer, tuple(part.block for part in layer.parts if part.block not in lab.mask))
            watches.append(watch)
            place |= {block: (watch, count) for count, block in enumerate(watch.left)}
    left = [block for block in lab.anatomy.outline.blocks if block not in lab.mask]
    for move in moves:
        first, last = run_of_blocks(lab, move)
        watch, count = place[left[first]]
        watch.begins.setdefault(count, []).append(move)
        watch, count = place[left[last]]
        watch.ends.setdefault(count + 1, []).append(move)
    return [watch for watch in watches if watch.begins or watch.ends]


def _axes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """By layer, the dimensions of the stream that count rows and tokens; from a pass in which these differ in size."""
    rows = 5
    with evaluating(model):
        stacks = find_stacks(model, example_inputs(model, batch=rows)).values()
    return {layer.path: (layer.stream.shape.index(rows), layer.token_axis) for seen in stacks for layer in seen}


def _ends(batch: Examples) -> list[int | None]:
    """How many tokens of each row count: items are padded, behind the last token that is to be predicted."""
    if batch.question != "choices":
        return [None] * len(batch.targets)
    places = (batch.targets != IGNORED) * torch.arange(batch.targets.shape[1], device=batch.targets.device)
    return [place + 2 for place in places.amax(1).tolist()]  # a target stands at the token before it


class _Reader:
    """Follows the stream through forward passes, and compares the states before and after a move as it ends."""

    def __init__(self, lab: Lab, moves: tuple[Move, ...], compare: Comparison) -> None:
        self.lab, self.moves, self.compare = lab, moves, compare
        self.watches = _watches(lab, moves)
        self._axes = _axes(lab.model)
        self.held: dict[Move, Tensor] = {}
        self.found: dict[Move, Tensor] = {}
        self._ends: list[int | None] = []
        self._inside = False

    def units(self, batch: Examples) -> list[list[float | None]]:
        """Per move, the mean of `compare` for each unit of `batch`; None where it is not finite."""
        model = self.lab.model
        inputs = batch.to(model.device).inputs
        without = skipped(model, self.lab.mask, anatomy=self.lab.anatomy)
        with torch.no_grad(), evaluating(model), without, self._watching(batch), contextlib.suppress(Enough):
            model(**inputs, **without_cache(model))
            missing = next(move for move in self.moves if move not in self.found)
            reason = f"{type(model).__name__} does not run {missing} on these examples"
            raise UnsupportedModelError(reason, fix="report the model's type and this message")
        units = [self.found[move].split(list(batch.lengths)) for move in self.moves]
        means = [[float(rows.mean()) for rows in found] for found in units]
        return [[mean if math.isfinite(mean) else None for mean in units] for units in means]

    @contextlib.contextmanager
    def _watching(self, batch: Examples) -> Iterator[None]:
        self.found, self._ends = {}, _ends(batch)
        with contextlib.ExitStack() as hooks:
            hooks.callback(self.held.clear)
            for watch in self.watches:
                module = self.lab.model.get_submodule(watch.layer.path)
                before, after = functools.partial(self._enter, watch), functools.partial(self._leave, watch)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            yield

    def _enter(self, watch: _Watch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer runs: its input, and the states inside it."""
        if self._inside:
            return
        call = Call(args, kwargs, None)
        stream = dict(call.inputs())[watch.layer.hidden].clone()  # layers may change what they are given
        for count in watch.places():
            if count < len(watch.left):
                inner = count or watch.layer.filled
                self._reached(watch, count, self._state(watch, count, call, stream, module) if inner else stream)

    def _leave(self, watch: _Watch, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not self._inside and len(watch.left) in watch.ends:
            self._reached(watch, len(watch.left), first_tensor(output))

    def _state(self, watch: _Watch, count: int, call: Call, stream: Tensor, module: nn.Module) -> Tensor | None:
        """The stream after the first `count` blocks of a layer."""
        self._inside = True
        try:
            with stood_in(self.lab.model, watch.stand_ins(count, self.lab.mask)):
                return first_tensor(call.again(module, {watch.layer.hidden: stream.clone()}))
        finally:
            self._inside = False

    def _reached(self, watch: _Watch, count: int, state: Tensor | None) -> None:
        assert state is not None  # read_anatomy has seen it
        for move in watch.ends.get(count, ()):
            self.found[move] = self._compared(watch, self.held.pop(move), state)
        self.held |= dict.fromkeys(watch.begins.get(count, ()), state)
        if len(self.found) == len(self.moves):
            raise Enough

    def _compared(self, watch: _Watch, before: Tensor, after: Tensor) -> Tensor:
        """The mean of `compare` over the positions of each row, [rows], float64 on the CPU."""
        axes = self._axes[watch.layer.path]
        states = [state.to(after.device).movedim(axes, (0, 1)) for state in (before, after)]
        rows = [[state[None, :end].float() for state in row] for *row, end in zip(*states, self._ends, strict=True)]
        return torch.stack([self.compare(*row).cpu().double().mean() for row in rows])
