"""What a search minimises: mask -> mean next-token loss over fixed calibration windows, in nats."""

import logging
import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask
from blockpruner.errors import InputError, is_out_of_memory
from blockpruner.masktree import MaskTree, sweep_work
from blockpruner.metrics import token_losses
from blockpruner.parts import Anatomy
from blockpruner.probing import accepts, first_tensor, vocabulary_size
from blockpruner.surgery import skipped

BATCH_TOKENS = 2048
PROBE_HEAD_TOKENS = 128
_log = logging.getLogger("blockpruner")


class LossObjective:
    """Language-modelling loss of the model without the blocks of a mask.

    loss(mask, window) = mean over positions 1..T-1 of -log p(token | tokens before it); BlockPruner's perplexity is the
    exponential of its mean over windows. Windows are evaluated in fixed micro-batches of about BATCH_TOKENS tokens, so
    the loss of (mask, window) has the same bits whatever else is asked.

    Uses the mask tree when a probe finds that it agrees with plain forward passes on this very model (states at full
    window length, losses on PROBE_HEAD_TOKENS positions), else plain forward passes; `fallback` says why.
    """

    unit = "nats per token"

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, *, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise InputError(
                f"{type(model).__name__} does not predict next tokens, so it has no language-modelling loss",
                fix="give a decoder-only model",
            )
        _check_fits(model, windows)
        self.model, self.anatomy, self.windows = model, anatomy, windows
        self.batch_tokens = batch_tokens
        self._size = max(1, batch_tokens // windows.shape[1])
        self.batches = -(-len(windows) // self._size)
        self.fallback = self._probe()
        if self.fallback:
            _log.warning("plain forward passes instead of the mask tree: %s", self.fallback)

    def losses(self, masks: Sequence[Mask], batch: int) -> Iterator[tuple[float, ...]]:
        """Per mask (each given once), as they become known, the loss of each window of one micro-batch."""
        windows = self.windows[batch * self._size : (batch + 1) * self._size]
        for _, found in self._token_losses(masks, windows):
            yield tuple(found.double().mean(dim=1).tolist())

    def work(self, masks: Sequence[Mask]) -> Work:
        """What evaluating `masks` on all windows costs, counted: shared prefixes once, unless the tree is not used."""
        layers = [layer for stack in self.anatomy.stacks for layer in stack.layers]
        count, length = self.windows.shape
        groups = [[mask] for mask in masks] if self.fallback else [list(masks)]
        return sum((sweep_work(layers, group, count, length) for group in groups), Work())

    def seconds(self, work: Work) -> float:
        """How long `work` takes here, from one timed pass of the whole model over one micro-batch."""
        body, head = self._rates
        return body * (work.attention_tokens + work.mlp_tokens) + head * work.head_tokens

    @cached_property
    def _rates(self) -> tuple[float, float]:
        """Seconds per block-token and per head-token."""
        windows = self.windows[: self._size].to(self.model.device)
        layers = [layer for stack in self.anatomy.stacks for layer in stack.layers]
        work = sweep_work(layers, [frozenset()], *windows.shape)
        start = time.perf_counter()
        if self.fallback:
            plain_losses(self.model, windows)
            rate = (time.perf_counter() - start) / (work.attention_tokens + work.mlp_tokens + work.head_tokens)
            return rate, rate
        (state,) = self._tree.final_states([frozenset()], windows).values()
        middle = time.perf_counter()
        self._tree.head_losses(state, windows)
        blocks = max(1, work.attention_tokens + work.mlp_tokens)
        return (middle - start) / blocks, (time.perf_counter() - middle) / work.head_tokens

    def _token_losses(self, masks: Sequence[Mask], windows: Tensor) -> Iterator[tuple[Mask, Tensor]]:
        if not self.fallback:
            yield from self._tree.losses(masks, windows)
            return
        for mask in masks:
            with skipped(self.model, mask, anatomy=self.anatomy):
                yield mask, plain_losses(self.model, windows)

    def _probe(self) -> str:
        """Empty if the mask tree agrees with plain forward passes on the last window, else why it is not used."""
        if len(self.anatomy.stacks) != 1:
            return f"the model has {len(self.anatomy.stacks)} stacks"
        self._tree = MaskTree(self.model, self.anatomy)
        try:
            return self._disagreement(self.windows[-1:].to(self.model.device))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return f"it stops with {type(error).__name__}: {error}"

    @torch.no_grad()
    def _disagreement(self, window: Tensor) -> str:
        """How far the tree is off where it may be: on the dense model, and without the first block of each kind.

        From the first block on, every layer is called for several prefixes in turn, so whatever a layer keeps or hands
        on outside of the stream is mixed up between them, and seen.
        """
        (stack,) = self.anatomy.stacks
        exact = self.model.dtype.itemsize >= 4
        first = {part.block.kind: part.block for layer in reversed(stack.layers) for part in reversed(layer.parts)}
        masks: list[Mask] = [frozenset(), *(frozenset([block]) for block in first.values())]
        last = self.model.get_submodule(stack.layers[-1].path)
        for mask, state in self._tree.final_states(masks, window).items():
            with skipped(self.model, mask, anatomy=self.anatomy):
                gap = float((_final_state(self.model, last, window) - state).abs().max() / state.abs().max())
            if not gap <= (1e-5 if exact else 1e-2):
                return f"without {next(iter(mask), 'nothing')} the last state differs by {gap:.2g} of its size"
        short = window[:, :PROBE_HEAD_TOKENS]
        for mask, found in self._tree.losses(masks, short):
            with skipped(self.model, mask, anatomy=self.anatomy):
                gaps = (plain_losses(self.model, short) - found).abs()
            gap = float(gaps.max() if exact else gaps.mean())
            if not gap <= (1e-4 if exact else 2e-2):
                return f"without {next(iter(mask), 'nothing')} token losses differ by {gap:.2g} nats"
        return ""


def context(model: PreTrainedModel) -> int | None:
    """The longest window the model was made for, where its configuration says it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def usual_window(model: PreTrainedModel) -> int:
    """The window to take when none is asked for: 2048 tokens, or the model's context if that is shorter."""
    return min(2048, context(model) or 2048)


def _check_fits(model: PreTrainedModel, windows: Tensor) -> None:
    """InputError if the windows hold tokens, or are of a length, that the model does not know."""
    rows = vocabulary_size(model)
    if int(windows.max()) >= rows:
        raise InputError(
            f"the text has token {int(windows.max())}, and the model's vocabulary ends at {rows - 1}",
            fix="use the tokenizer that belongs to the model",
        )
    longest = context(model)
    if longest is not None and windows.shape[1] > longest:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are longer than the model's context of {longest}",
            fix=f"choose --window {longest} or less",
        )


class _Seen(Exception):
    """Carries the output of the last layer out of a forward pass."""


def _final_state(model: PreTrainedModel, last: torch.nn.Module, window: Tensor) -> Tensor:
    def stop(_module: torch.nn.Module, _args: object, output: object) -> None:
        raise _Seen(first_tensor(output))

    handle = last.register_forward_hook(stop)
    try:
        model(input_ids=window, **({"use_cache": False} if accepts(model, "use_cache") else {}))
    except _Seen as seen:
        return seen.args[0]
    finally:
        handle.remove()
    raise InputError(f"{type(model).__name__} does not call its last layer", fix="report the model's type")


@torch.no_grad()
def plain_losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Token losses [windows, tokens - 1] from ordinary forward passes, one window at a time, on the CPU in float32."""
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    losses = []
    for window in windows.to(model.device):
        logits = model(input_ids=window[None], **extra).logits[0, :-1]
        losses.append(token_losses(logits, window[1:]).cpu())
    return torch.stack(losses)
