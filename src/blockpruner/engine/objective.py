"""What a search minimises: mask -> what a measure finds on a model's examples, lower = better."""

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import evaluating, first_tensor, vocabulary_size, without_cache
from blockpruner.artifacts import Traffic, Work
from blockpruner.blocks import Mask
from blockpruner.engine.head import Head, SampledHead, proved_head
from blockpruner.engine.limits import check_fits
from blockpruner.engine.masktree import Inputs, MaskTree, Node, output_of, sweep_traffic, sweep_work
from blockpruner.engine.pace import Pace, now
from blockpruner.engine.spilling import Spill
from blockpruner.engine.sums import Sums, marked, positions_of, tokens_of
from blockpruner.errors import InputError, is_out_of_memory
from blockpruner.loading.lending import lends
from blockpruner.measuring import Measure
from blockpruner.objectives.loss import Loss
from blockpruner.objectives.sampled_loss import SampledLoss
from blockpruner.searching.contract import DENSE, BatchByBatch, Found, Values
from blockpruner.surgery.gaps import Filling, filled, repaired
from blockpruner.texts.examples import IGNORED, Examples

BATCH_TOKENS = 2048
HEAD_POSITIONS = 256  # positions whose logits exist at once
HEADS = 8  # masks that share one look at the whole model's logits
PROBE_POSITIONS = 128
NOTHING = Traffic()
_LOSS = Loss()
_log = logging.getLogger("blockpruner")


class ModelObjective(BatchByBatch):
    """What `measure` finds of the model without the blocks of a mask, per unit of `examples`.

    Examples are evaluated in fixed micro-batches of about BATCH_TOKENS tokens, so the value of (mask, unit) has the
    same bits whatever else is asked. Uses the mask tree when a probe finds that it agrees with plain forward passes on
    this very model (states at full length, logits at PROBE_POSITIONS positions), else plain forward passes, a row at a
    time; `fallback` says why. InputError where the model has not what `measure` looks at.

    segment: values of so many positions of a window each, for searches that race; None: one value per window. They are
    weighted so that their mean is the window's value. Measures that do not add up over positions have none.

    memory: None: micro-batches one after the other; else all that are asked for at once go through a layer before the
    next one is wanted, with at most so many bytes of their states in memory and the others on disk: for models whose
    weights are streamed. The losses are the same bits, and are known when the last layer is done.

    filling: what stands in the gaps that masks leave, see `replaceable`; None: nothing. Counted work is without it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        examples: Examples,
        measure: Measure = _LOSS,
        *,
        batch_tokens: int = BATCH_TOKENS,
        segment: int | None = None,
        memory: int | None = None,
        filling: Filling | None = None,
    ) -> None:
        check_fits(model, examples, measure)
        self.model, self.anatomy, self.examples, self.measure = model, anatomy, examples, measure
        self.unit = measure.unit
        self.batch_tokens, self.memory, self.filling = batch_tokens, memory, filling
        adds_up = measure.reads == "text" and measure.of != "states"
        self.segment = min(segment, examples.targets.shape[1]) if segment and adds_up else examples.targets.shape[1]
        self.pieces = -(-examples.targets.shape[1] // self.segment)
        self._parts = examples.batches(batch_tokens)
        self.batches = len(self._parts)
        self.sizes = tuple(len(part) * self.pieces for part in self._parts)
        self._planned: tuple[Sequence[Sequence[Mask]], list[Work]] = ((), [])
        self._extra = without_cache(model)
        self._head: Head | None = None  # where losses come from states, without logits
        self._state_bytes = 0  # of one token, where there is a tree
        self.moved = Traffic()  # by now
        self.fallback = self._probe()
        if self.fallback:
            _log.warning("plain forward passes instead of the mask tree: %s", self.fallback)
        if self.sampling and (self.fallback or self._head is None):
            why = self.fallback or "there is more to its head than a linear layer"
            raise InputError(
                f"{type(model).__name__} cannot be judged by a part of its vocabulary: {why}",
                fix="use --objective loss",
            )

    @property
    def sampling(self) -> SampledLoss | None:
        """How the part of the vocabulary is drawn that losses come from, if they do; it takes a pass of the model."""
        return self.measure if isinstance(self.measure, SampledLoss) else None

    @cached_property
    def _losing(self) -> Head | None:
        """What losses come from, where no logits are made: the model's head, or a part of it."""
        if self._head is None or self.sampling is None:
            return self._head
        return self._head.sampled(*self.sampling.draw(self._probabilities(self._head)))

    @torch.no_grad()
    def _probabilities(self, head: Head) -> Tensor:
        """What the whole model thinks of each token, added up over all that is to be predicted: [vocabulary]."""
        parts = {batch: part.to(self.model.device) for batch, part in enumerate(self._parts)}
        found = torch.zeros(len(head.linear.weight), dtype=torch.float64)
        with evaluating(self.model):
            for some in [parts] if self.memory is not None else [{batch: parts[batch]} for batch in parts]:
                with Spill[Node](self.memory) as states:
                    take = self._tree.walk({batch: ([DENSE], part.inputs) for batch, part in some.items()}, states)
                    self.moved += Traffic(read=self._read_bytes, spilled=states.ledger.spilled, held=states.ledger.most)
                    for batch, part in some.items():
                        state = take(batch, DENSE)
                        for at in positions_of(part).split(max(1, HEAD_POSITIONS // len(part.targets))):
                            with head.left_out(self.model):
                                given = self._tree.outputs(state, part.inputs, at)
                            found += head.probabilities(marked(given, part.targets[:, at] != IGNORED))
        return found

    def losses(self, asked: Mapping[int, Sequence[Mask]]) -> Iterator[Found]:
        if self.memory is None or self.fallback:
            yield from super().losses(asked)
            return
        parts = {batch: self._parts[batch].to(self.model.device) for batch in asked}
        with evaluating(self.model):
            for batch, mask, (sums, counts) in self._rows_of_tree(asked, parts):
                yield batch, mask, self._values(sums, counts, parts[batch])

    def batch_losses(self, masks: Sequence[Mask], batch: int) -> Iterator[Values]:
        part = self._parts[batch].to(self.model.device)
        with evaluating(self.model):
            if self.fallback:
                rows = self._rows_of_passes(masks, part)
            else:
                rows = (found for _, _, found in self._rows_of_tree({batch: masks}, {batch: part}))
            for sums, counts in rows:
                yield self._values(sums, counts, part)

    def _values(self, sums: Tensor, counts: list[int], part: Examples) -> Values:
        return self.measure.units(sums.flatten().tolist(), counts, part.lengths, part.gold)

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        """What evaluating `masks` on one micro-batch costs, counted: shared prefixes once, if the tree is used."""
        part = self._parts[batch]
        alone = [[mask] for mask in masks]
        heads = math.ceil(part.targets.shape[0] * len(positions_of(part)) * self._share) * len(set(masks))
        groups = alone if self.fallback else [list(masks)]
        if self.measure.compares:
            heads += part.targets.shape[0] * len(positions_of(part)) * (1 if self.fallback else -(-len(masks) // HEADS))
            groups = [*alone, [DENSE]] if self.fallback else [[*masks, DENSE]]
        total = Work(head_tokens=heads)
        for stack, each in zip(self.anatomy.stacks, self._per_token(groups), strict=True):
            tokens = tokens_of(stack, part.inputs)
            mixing, mlp = each.attention_tokens * tokens, each.mlp_tokens * tokens
            total += Work(attention_tokens=mixing, mlp_tokens=mlp)
        return total

    def whole_pass(self, mask: Mask = DENSE) -> Work:
        """One forward pass over all data with the whole head, whatever part of it losses take."""
        once = sum((self.work([mask], batch) for batch in range(self.batches)), Work())
        heads = sum(len(part.targets) * len(positions_of(part)) for part in self._parts)
        return once.model_copy(update={"head_tokens": heads}) if self.sampling else once

    def drawing(self) -> tuple[Work, Traffic]:
        """What it costs to draw a part of the vocabulary, where losses come from one: a pass with the head twice."""
        if not self.sampling:
            return Work(), Traffic()
        once = self.whole_pass()
        return once + Work(head_tokens=once.head_tokens), self._pass_traffic()

    @property
    def drawn(self) -> str:
        """The tokens that losses come from, and their chances, by a digest. Cost: the draw, if it was not made yet."""
        held = self._losing
        assert isinstance(held, SampledHead)
        told = hashlib.sha256(held.tokens.cpu().numpy().tobytes())
        told.update(held.log_weights.cpu().numpy().tobytes())
        return f"{len(held.tokens)} tokens, {told.hexdigest()[:16]}"

    @property
    def _share(self) -> float:
        """Of the head's work that a loss takes."""
        if self._head is None or self.sampling is None:
            return 1.0
        return min(1.0, self.sampling.vocabulary / len(self._head.linear.weight))

    def _per_token(self, groups: Sequence[Sequence[Mask]]) -> list[Work]:
        """The blocks that one token passes in each stack; kept, for the micro-batches of a sweep ask the same."""
        if self._planned[0] != groups:
            layers = [stack.layers for stack in self.anatomy.stacks]
            found = [sum((sweep_work(each, group, 1) for group in groups), Work()) for each in layers]
            self._planned = (groups, found)
        return self._planned[1]

    def traffic(self, asked: Mapping[int, Sequence[Mask]]) -> Traffic:
        """What one request of `losses` moves and holds, counted: `moved` will have grown by it.

        A streamed model's layers are read once for a request, or for each row of each mask without the tree.
        """
        if self.fallback:
            passes = sum((len(masks) + self.measure.compares) * len(self._parts[b]) for b, masks in asked.items())
            return Traffic(read=self._read_bytes * passes)
        first, (stack,) = [DENSE] if self.measure.compares else [], self.anatomy.stacks
        sized = {
            b: ([*first, *masks], self._state_bytes * tokens_of(stack, self._parts[b].inputs))
            for b, masks in asked.items()
        }
        if self.memory is None:  # one micro-batch after the other
            most = {tuple(masks): (masks, 0) for masks, _ in sized.values()}
            for masks, size in sized.values():
                most[tuple(masks)] = (masks, max(size, most[tuple(masks)][1]))
            return sum((sweep_traffic(stack.layers, {0: each}, None) for each in most.values()), Traffic())
        return Traffic(read=self._read_bytes) + sweep_traffic(stack.layers, sized, self.memory)

    def held_bytes(self, traffic: Traffic) -> int:
        """The memory that a search takes: weights, states and logits; what a layer makes for itself is not in it."""
        row, each = self.examples.targets.shape[1], vocabulary_size(self.model) * (4 + self.model.dtype.itemsize)
        positions = row if self.fallback else HEAD_POSITIONS
        logits = 0 if self._head or self.measure.of == "states" else positions * (1 + self.measure.compares) * each
        copied = math.ceil(self._head.linear.weight.nbytes * self._share) if self._head and self.sampling else 0
        return self.weight_bytes + copied + self._lent_bytes + traffic.held + logits

    @property
    def weight_bytes(self) -> int:
        """Of the weights that stay in memory: where they are streamed, of what is in no layer."""
        return sum(value.nbytes for value in (*self.model.parameters(), *self.model.buffers())) - self._read_bytes

    @property
    def _lent_bytes(self) -> int:
        """Of the largest layer whose weights are lent, as it computes with them."""
        if not lends(self.model):
            return 0
        return max(sum(p.numel() for p in layer.parameters()) for layer in self._layers()) * self.model.dtype.itemsize

    @cached_property
    def _read_bytes(self) -> int:
        """Of the weights of all layers in their files, where they are streamed; else 0."""
        return 0 if self.memory is None else sum(p.nbytes for layer in self._layers() for p in layer.parameters())

    def _layers(self) -> list[torch.nn.Module]:
        return [self.model.get_submodule(layer.path) for stack in self.anatomy.stacks for layer in stack.layers]

    def seconds(self, work: Work, moved: Traffic = NOTHING) -> float:
        """How long `work`, with so much to be moved, takes in this process, from one micro-batch that was timed."""
        return self._pace.seconds(work, moved)

    def seconds_of_pass(self, mask: Mask = DENSE) -> float:
        """How long one forward pass over all data with the whole head takes."""
        return self.seconds(self.whole_pass(mask), self._pass_traffic(mask))

    def _pass_traffic(self, mask: Mask = DENSE) -> Traffic:
        return self.traffic({batch: [mask] for batch in range(self.batches)})

    @cached_property
    def _pace(self) -> Pace:
        """Cost: two passes of the whole model over one micro-batch; where weights are streamed, they are read once."""
        part, read = self._parts[0].to(self.model.device), self._read_bytes
        sides = 1 + self.measure.compares
        heads = len(part.targets) * len(positions_of(part)) * sides
        blocks = sum(
            len(layer.parts) * tokens_of(stack, part.inputs) for stack in self.anatomy.stacks for layer in stack.layers
        )
        with evaluating(self.model):
            if self.fallback:  # each pass reads the weights
                start = now(self.model)
                list(self._rows_of_passes([DENSE], part))
                rate = (now(self.model) - start) / (blocks * sides + heads)
                return Pace(rate, rate)
            state, computing, reading = self._tree.timed(part.inputs)
            start = now(self.model)
            self._sums({DENSE: state}, state if self.measure.compares else None, part, self._head)
            losing = now(self.model) - start
        return Pace(computing / max(1, blocks), losing / max(1, heads), reading / read if read else 0.0)

    def _rows_of_tree(
        self, asked: Mapping[int, Sequence[Mask]], parts: Mapping[int, Examples]
    ) -> Iterator[tuple[int, Mask, tuple[Tensor, list[int]]]]:
        """Per micro-batch and mask, in order, the sums and numbers of `_sums`."""
        compares, losing = self.measure.compares, self._losing
        first = [DENSE] if compares else []
        wanted = {batch: ([*first, *masks], parts[batch].inputs) for batch, masks in asked.items()}
        step = HEADS if compares else 1
        with Spill[Node](self.memory) as states:
            take = self._tree.walk(wanted, states)
            self.moved += Traffic(read=self._read_bytes, spilled=states.ledger.spilled, held=states.ledger.most)
            for batch, masks in asked.items():
                whole = take(batch, DENSE) if compares else None
                for start in range(0, len(masks), step):
                    group = {
                        mask: take(batch, mask) if whole is None or mask != DENSE else whole
                        for mask in masks[start : start + step]
                    }
                    for mask, rows in zip(group, self._sums(group, whole, parts[batch], losing), strict=True):
                        yield batch, mask, rows

    @torch.no_grad()
    def _sums(
        self, states: dict[Mask, Tensor], whole: Tensor | None, part: Examples, losing: Head | None
    ) -> list[tuple[Tensor, list[int]]]:
        """Per mask the sum and the number of the values in each row, some positions at a time."""
        positions = positions_of(part)
        sums = {mask: Sums(self.measure, part, self.segment, losing) for mask in states}
        for at in positions.split(max(1, HEAD_POSITIONS // len(part.targets))):
            beside = None if whole is None else self._tree.outputs(whole, part.inputs, at)
            for mask, state in states.items():
                with contextlib.nullcontext() if losing is None else losing.left_out(self.model):
                    found = self._tree.outputs(state, part.inputs, at)
                sums[mask].add(found, beside, at)
        return [each.done() for each in sums.values()]

    @torch.no_grad()
    def _rows_of_passes(self, masks: Sequence[Mask], part: Examples) -> Iterator[tuple[Tensor, list[int]]]:
        """Sums from ordinary forward passes, a row at a time."""
        found: dict[Mask, list[tuple[Tensor, list[int]]]] = {mask: [] for mask in masks}
        for row in part.rows():
            beside = self._pass(DENSE, row) if self.measure.compares else None
            for mask in masks:
                sums = Sums(self.measure, row, self.segment)
                sums.add(self._pass(mask, row), beside, positions_of(row))
                found[mask].append(sums.done())
        for rows in found.values():
            yield torch.cat([sums for sums, _ in rows]), [count for _, counts in rows for count in counts]

    def _pass(self, mask: Mask, part: Examples) -> Tensor:
        self.moved += Traffic(read=self._read_bytes)
        with self._without(mask):
            return output_of(self.model(**part.inputs, **self._extra))[:, positions_of(part)]

    def _without(self, mask: Mask) -> AbstractContextManager[None]:
        """The model as plain forward passes see it without a mask, with what stands in its gaps."""
        return repaired(self.model, self.anatomy, mask, filled(self.anatomy, mask, self.filling))

    def _probe(self) -> str:
        """Empty if the mask tree agrees with plain forward passes on the last unit, else why it is not used."""
        if len(self.anatomy.stacks) != 1:
            return f"the model has {len(self.anatomy.stacks)} stacks"
        self._tree = MaskTree(self.model, self.anatomy, self.filling)
        try:
            last = next(self.examples.part(len(self.examples) - 1, len(self.examples)).rows())
            with evaluating(self.model):
                return self._disagreement(last.to(self.model.device))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return f"it stops with {type(error).__name__}: {error}"

    @torch.no_grad()
    def _disagreement(self, row: Examples) -> str:
        """How far the tree is off where it may be: on the dense model, and without the first block of each kind.

        From the first block on, every layer is called for several prefixes in turn, so whatever a layer keeps or hands
        on outside of the stream is mixed up between them, and seen.
        """
        (stack,) = self.anatomy.stacks
        exact = self.model.dtype.itemsize >= 4
        first = {part.block.kind: part.block for layer in reversed(stack.layers) for part in reversed(layer.parts)}
        masks: list[Mask] = [DENSE, *(frozenset([block]) for block in first.values())]
        last = self.model.get_submodule(stack.layers[-1].path)
        positions = positions_of(row)[:PROBE_POSITIONS]
        for mask, state in self._tree.final_states(masks, row.inputs).items():
            with self._without(mask):
                plain, output = self._final(last, row.inputs)
            for what, found, expected in (
                ("the last state differs", state, plain),
                ("the output differs", self._tree.outputs(state, row.inputs, positions), output[:, positions]),
            ):
                gap = float((found - expected).abs().max() / expected.abs().max())
                if not gap <= (1e-5 if exact else 1e-2):
                    return f"without {next(iter(mask), 'nothing')} {what} by {gap:.2g} of its size"
            self._state_bytes = state.shape[-1] * state.itemsize
            if mask == DENSE and self.measure.of == "losses":
                asked = row.targets[:, positions].clamp(min=0)
                self._head = proved_head(
                    self.model, functools.partial(self._tree.outputs, state, row.inputs, positions), asked
                )
        return ""

    def _final(self, last: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The last state of the stream and the output, from an ordinary forward pass."""
        states: list[Tensor | None] = []
        handle = last.register_forward_hook(lambda _module, _args, output: states.append(first_tensor(output)))
        try:
            output = output_of(self.model(**inputs, **self._extra))
        finally:
            handle.remove()
        if not states or states[-1] is None:
            raise InputError(f"{type(self.model).__name__} does not call its last layer", fix="report the model's type")
        return states[-1], output
