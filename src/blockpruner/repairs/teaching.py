"""What a pruned model is taught, by text or by the dense model: exact gradients, without all logits at once.

A pass goes through the layers first. Then, some positions at a time, the model's own norm and head make logits of the
last state, their loss is taken back to that state, and what was gathered there goes back through the layers in one
backward pass. A probe on PROBE_TOKENS tokens compares the gradients with those of a whole pass on this very model;
where they differ, or cannot be had, all logits of one window at a time are held, and that is said.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import MISFIT, vocabulary_size
from blockpruner.errors import InputError, is_out_of_memory
from blockpruner.metrics import divergences, token_losses
from blockpruner.repairs.pupil import Ends, Pupil, States, watched
from blockpruner.texts.examples import IGNORED, Examples

LOGITS_AT_ONCE = 2**24  # of one model, over all rows of a pass: 64 MiB in float32; with fewer, products are slow
PROBE_TOKENS = 64
_log = logging.getLogger("blockpruner")


def check_predicts(model: PreTrainedModel, examples: Examples) -> None:
    """InputError for a model that predicts nothing."""
    if not bool((examples.targets != IGNORED).any()):
        raise InputError(
            f"{type(model).__name__} has no head that predicts tokens, so it has no loss to train on",
            fix="use adapter:loss=block, which compares states, or load the model with its head",
        )


class Predictions:
    """Losses of a pruned model's predictions, summed over predicted tokens.

    loss: `lm`, cross entropy with the targets, or `kl`, temperature^2 KL(dense || pruned) of the predictions at that
    temperature; hidden: weight of the hidden states' term, see the recovery `distill`. Memory: what the layers keep for
    the rows of one pass, and the logits of some positions of it (of the dense model as well, for `kl`).
    """

    def __init__(
        self, pupil: Pupil, loss: Literal["lm", "kl"] = "lm", temperature: float = 1.0, hidden: float = 0.0
    ) -> None:
        self.pupil, self.loss, self.temperature, self.hidden = pupil, loss, temperature, hidden
        self.ends = Ends(pupil.model, pupil.anatomy)
        left = [layer for stack in pupil.anatomy.stacks for layer in stack.layers]
        kept = [layer.path for layer in left if any(part.block not in pupil.mask for part in layer.parts)]
        self.paths = kept if hidden else []
        self.whole = False  # whether all logits of a window are held at once

    def weigh(self, part: Examples) -> float:
        """Tokens that are predicted."""
        return float((part.targets != IGNORED).sum())

    def backward(self, part: Examples, scale: float) -> float:
        """Add the gradient of scale * loss to whatever asks for one; the sum of the loss over tokens."""
        part = part.to(self.pupil.model.device)
        with torch.inference_mode(False), torch.enable_grad():
            if self.whole:
                return sum(self._whole(row, scale) for row in part.rows())
            taught = None
            if self.loss == "kl" or self.hidden:
                with torch.no_grad():
                    taught = self.ends.body(part, self.paths)
            with self.pupil.pruned() as dense:
                return self._in_pieces(part, scale, taught, dense)

    def _in_pieces(
        self,
        part: Examples,
        scale: float,
        taught: tuple[Tensor, States] | None,
        dense: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> float:
        last, states = self.ends.body(part, self.paths)
        slope, total = torch.zeros_like(last), 0.0
        for at in self._pieces(part):
            wanted = None
            if taught is not None and self.loss == "kl":
                with dense(), torch.no_grad():
                    wanted = self.ends.logits(taught[0][:, at], part, at)
            piece = last.detach()[:, at].requires_grad_()
            value = self._values(self.ends.logits(piece, part, at), wanted, part.targets[:, at])
            (value * scale).backward()
            assert piece.grad is not None
            slope[:, at] = piece.grad
            total += float(value.detach())
        extra = self._hidden(states, taught[1], part) if taught is not None and self.hidden else None
        ends, slopes = ([last], [slope]) if last.requires_grad else ([], [])
        if extra is not None and extra.requires_grad:
            ends, slopes = [*ends, extra], [*slopes, torch.tensor(scale).to(extra)]
        if ends:
            torch.autograd.backward(ends, slopes)
        return total + (0.0 if extra is None else float(extra.detach()))

    def _whole(self, row: Examples, scale: float) -> float:
        """The same with all logits of one row at once."""
        model, wanted, behind = self.pupil.model, None, {}
        if self.loss == "kl" or self.hidden:
            with torch.no_grad(), watched(model, self.paths) as behind:
                wanted = model(**row.inputs, **self.ends.extra).logits
        with self.pupil.pruned():
            with watched(model, self.paths) as states:
                logits = model(**row.inputs, **self.ends.extra).logits
            value = self._values(logits, wanted if self.loss == "kl" else None, row.targets)
            value = value + self._hidden(states, behind, row) if self.hidden else value
            (value * scale).backward()
        return float(value.detach())

    def _values(self, logits: Tensor, wanted: Tensor | None, targets: Tensor) -> Tensor:
        targets = targets.to(logits.device)
        asked = targets != IGNORED
        if wanted is None:
            return token_losses(logits[asked], targets[asked]).sum()
        cold = self.temperature
        return cold**2 * divergences(wanted[asked].to(logits) / cold, logits[asked] / cold).sum()

    def _hidden(self, states: States, behind: States, part: Examples) -> Tensor:
        """hidden * (mean over layers and tokens of |s - t|^2 / |t|^2), once per predicted token."""
        gaps = [
            ((states[path] - behind[path]).float().square().sum(-1) / behind[path].float().square().sum(-1)).mean()
            for path in self.paths
        ]
        return self.hidden * self.weigh(part) * torch.stack([gap.to(gaps[0].device) for gap in gaps]).mean()

    def _pieces(self, part: Examples) -> Sequence[Tensor]:
        """Positions that are predicted in some row, so many at a time that their logits fit."""
        at = (part.targets != IGNORED).any(dim=0).nonzero()[:, 0]
        return at.split(max(1, LOGITS_AT_ONCE // (vocabulary_size(self.pupil.model) * len(part.targets))))

    @torch.no_grad()
    def judge(self, part: Examples) -> float:
        """The sum of cross entropy over the predicted tokens, in nats, with dropout off."""
        with self.pupil.pruned():
            found = self.predicted(part.to(self.pupil.model.device))
            return sum(float(token_losses(logits, targets).double().sum()) for logits, targets in found)

    def predicted(self, part: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits [n, vocabulary] and targets [n] of all that is predicted, by the model as it is now, in parts."""
        if self.whole:
            for row in part.rows():
                here = row.targets != IGNORED
                yield self.pupil.model(**row.inputs, **self.ends.extra).logits[here], row.targets[here]
            return
        last, _ = self.ends.body(part)
        for at in self._pieces(part):
            here = part.targets[:, at] != IGNORED
            yield self.ends.logits(last[:, at], part, at)[here], part.targets[:, at][here]

    def probe(self, examples: Examples, numbers: Mapping[str, nn.Parameter]) -> None:
        """Hold all logits of a window at once from now on, and say so, if pieces do not give the same gradients."""
        self.pupil.train(False)
        reason = self._why_whole(short_of(next(examples.rows())), numbers)
        if reason:
            self.whole = True
            _log.warning("all logits of a window are held at once: %s", reason)

    def _why_whole(self, row: Examples, numbers: Mapping[str, nn.Parameter]) -> str:
        found: list[tuple[float, dict[str, tuple[float, float]]]] = []
        for whole in (False, True):
            self.whole = whole
            try:
                value = self.backward(row, 1.0)
            except MISFIT as error:
                if whole or is_out_of_memory(error):
                    raise
                return f"in pieces it stops with {type(error).__name__}: {error}"
            finally:
                self.whole = False
                sizes = {name: _size(p) for name, p in numbers.items()}
                for p in numbers.values():
                    p.grad = None
            found.append((value, sizes))
        (value, sizes), (plain, truth) = found
        bound = 1e-3 if self.pupil.model.dtype.itemsize >= 4 else 5e-2
        if not abs(value - plain) <= bound * max(1.0, abs(plain)):
            return f"in pieces the loss is {value:.4g} instead of {plain:.4g}"
        largest = max((length for length, _ in truth.values()), default=0.0)
        for name, (length, along) in truth.items():
            gap = max(abs(sizes[name][0] - length), abs(sizes[name][1] - along))
            if not gap <= bound * max(length, 1e-2 * largest):
                return f"in pieces the gradient of {name} is off by {gap:.2g} of {length:.2g}"
        return ""


def short_of(row: Examples) -> Examples:
    """The first PROBE_TOKENS positions of one row, or so many that one of them is predicted."""
    first = int((row.targets != IGNORED).nonzero()[0, 1])
    length, cut = row.targets.shape[1], max(PROBE_TOKENS, first + 1)
    inputs = {name: value[:, :cut] if value.shape[1:2] == (length,) else value for name, value in row.inputs.items()}
    return replace(row, inputs=inputs, targets=row.targets[:, :cut])


def _size(parameter: nn.Parameter) -> tuple[float, float]:
    """The length of a gradient, and how far it goes along a fixed direction: to tell gradients apart."""
    if parameter.grad is None:
        return 0.0, 0.0
    flat = parameter.grad.detach().flatten().float()
    signs = torch.arange(len(flat), device=flat.device).remainder(7).float() - 3
    return float(flat.norm()), float(torch.dot(flat, signs)) / 3
