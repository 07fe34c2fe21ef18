"""Gates on the blocks of a model with frozen weights, and how they are learned.

A gate g per move turns each module whose output is a branch from what it computes (g = 1) to what its stand-in would
return (g = 0): (1 - g) * stand-in + g * output, exact at both ends. A layer that does more than hand the stream
through once its blocks are silent (norms on the stream) is gated as a whole by a move that empties it, since it
leaves with them. A block in several moves is open as far as all of their gates are: their product.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Spec
from blockpruner.anatomy.probing import asking, evaluating
from blockpruner.blocks import Mask, Move, format_mask
from blockpruner.errors import CheckFailedError
from blockpruner.importance.criterion import Lab
from blockpruner.importance.gradients import mean_loss, windows_of
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import Examples

NOTED_EVERY = 10  # steps
START = 2.0  # the logit of every gate at first: mostly open
_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam


class Options(Protocol):
    """How gates are learned; see the criterion `gates`, whose options these are."""

    @property
    def steps(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def seed(self) -> int: ...


class Gate(NamedTuple):
    """A kind of gate, in terms of its logit.

    sampled: from logits and numbers drawn evenly from 0 to 1; openness: the probability that it is not 0; settled: the
    value without noise, 0 where the gate is shut.
    """

    sampled: Callable[[Tensor, Tensor], Tensor]
    openness: Callable[[Tensor], Tensor]
    settled: Callable[[Tensor], Tensor]


def _stretched(share: Tensor) -> Tensor:
    return (share * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """1 with the probability of the logit, else 0; with the gradient of the probability."""
    share = logits.sigmoid()
    return (uniform < share).to(share.dtype) + share - share.detach()


GATES: dict[str, Gate] = {
    "hard-concrete": Gate(
        lambda logits, uniform: _stretched(((uniform.logit() + logits) / _TEMPERATURE).sigmoid()),
        lambda logits: (logits - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid(),
        lambda logits: _stretched(logits.sigmoid()),
    ),
    "straight-through": Gate(_drawn, torch.sigmoid, lambda logits: (logits > 0).to(logits.dtype)),
}


def learned(lab: Lab, moves: Sequence[Move], options: Options) -> Tensor:
    """The logits of the gates of `moves`, float64, after all steps; noted on the way, so a killed run goes on.

    CheckFailedError if the loss or its gradient stops being finite.
    """
    rows = windows_of(lab.model, lab.examples)
    zeros = [0.0] * len(moves)
    state = [[START] * len(moves), zeros, zeros]  # logits; Adam's means of the gradient and of its square
    with evaluating(lab.model), asking(lab.model), skipped(lab.model, lab.mask, anatomy=lab.anatomy):
        gated = Gated(lab.model, lab.anatomy, moves, lab.mask)
        for start in range(0, options.steps, NOTED_EVERY):
            stop = min(start + NOTED_EVERY, options.steps)

            def run(state: list[list[float]] = state, begin: int = start, end: int = stop) -> list[list[float]]:
                return _run(gated, rows, state, range(begin, end), options, lab)

            state = lab.notes.get(f"{_name(lab, moves, options)}, {stop} steps", run)
    return torch.tensor(state[0], dtype=torch.float64)


def shut(lab: Lab, moves: Sequence[Move], options: Options, logits: Tensor) -> list[Move]:
    """The moves whose gate is 0 without noise: the mask that was learned; noted as `gates shut ...`."""
    settled = GATES[options.kind].settled(logits).tolist()
    found = [move for move, gate in zip(moves, settled, strict=True) if gate == 0]
    lab.notes.get(f"{_name(lab, moves, options, 'gates shut')}", lambda: [str(move) for move in found])
    return found


def _name(lab: Lab, moves: Sequence[Move], options: Options, what: str = "gates") -> str:
    key = zlib.crc32(f"{options} {[str(move) for move in moves]}".encode())
    return f"{what} {key:08x} {format_mask(lab.mask)}"


def _run(
    gated: "Gated",
    rows: Sequence[Examples],
    state: list[list[float]],
    steps: range,
    options: Options,
    lab: Lab,
) -> list[list[float]]:
    """Adam's state after these steps; step k takes example k mod n and noise from (seed, k)."""
    logits, mean, square = (torch.tensor(numbers, dtype=torch.float64) for numbers in state)
    for step in steps:
        logits, mean, square = _step(gated, rows[step % len(rows)], (logits, mean, square), step, options)
        if not bool(torch.isfinite(logits).all()):
            raise CheckFailedError(
                f"learning gates, the loss of example {step % len(rows)} or its slope is not finite at step {step}",
                fix="learn them in float32 (--dtype float32)",
            )
        lab.report(step + 1, options.steps, "learning gates")
    return [logits.tolist(), mean.tolist(), square.tolist()]


def _step(
    gated: "Gated", row: Examples, state: tuple[Tensor, Tensor, Tensor], step: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    logits, mean, square = state
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    with torch.inference_mode(False), torch.enable_grad():
        logits = logits.clone().requires_grad_()
        gates = GATES[options.kind].sampled(logits, uniform)
        _, slope = gated.loss(row, gates.detach())
        # The slope of the loss, by the chain rule, and that of the price of open gates.
        total = (gates * slope).sum() + options.sparsity * GATES[options.kind].openness(logits).mean()
        (gradient,) = torch.autograd.grad(total, logits)
    mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
    square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient.square()
    direction = mean / (1 - _BETAS[0] ** (step + 1))
    spread = (square / (1 - _BETAS[1] ** (step + 1))).sqrt()
    return logits.detach() - options.rate * direction / (spread + _EPSILON), mean, square


class Gated:
    """A model, without the blocks of `mask` (skipped by the caller), whose `moves` each have a gate."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, moves: Sequence[Move], mask: Mask) -> None:
        self.model = model
        self.reached: set[str] = set()
        self.places: dict[str, tuple[Spec, list[int]]] = {}
        for index, move in enumerate(moves):
            for path, spec in _gated_modules(anatomy, move, mask).items():
                self.places.setdefault(path, (spec, []))[1].append(index)

    def loss(self, row: Examples, gates: Tensor) -> tuple[float, Tensor]:
        """The loss of one example in nats, and its slope with respect to each gate [moves], float64, on the CPU."""
        with torch.inference_mode(False), torch.enable_grad():
            values = gates.detach().to(self.model.device, torch.float32).requires_grad_()
            with self.gated(values):
                loss = mean_loss(self.model, row)
            if missed := sorted(self.places.keys() - self.reached):
                raise CheckFailedError(
                    f"{missed[0]} does its work without being called as a module, so it cannot be gated",
                    fix="choose another criterion, and report the model's type",
                )
            (slope,) = torch.autograd.grad(loss, values)
        return float(loss.detach()), slope.cpu().double()

    @contextlib.contextmanager
    def gated(self, gates: Tensor) -> Iterator[None]:
        """While the block runs, the model works with these gates, [moves]."""
        with contextlib.ExitStack() as hooks:
            for path, (spec, indices) in self.places.items():
                hook = partial(self._turned_down, path, spec, gates[indices].prod())
                module = self.model.get_submodule(path)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _turned_down(
        self,
        path: str,
        spec: Spec,
        gate: Tensor,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        self.reached.add(path)
        return _mixed(spec, spec["output"], gate, dict(enumerate(args), **kwargs), output)


def _gated_modules(anatomy: Anatomy, move: Move, mask: Mask) -> Mapping[str, Spec]:
    """path -> stand-in that a gate at 0 amounts to, for all that the gate of `move` acts on."""
    found: dict[str, Spec] = {}
    for layer in (layer for stack in anatomy.stacks for layer in stack.layers):
        here = [part for part in layer.parts if part.block in move.blocks]
        if (
            here
            and not (layer.identity or layer.shell)
            and all(part.block in mask | move.blocks for part in layer.parts)
        ):
            found[layer.path] = layer.through
        else:
            found |= {path: spec for part in here for path, spec in part.modules.items()}
    return found


def _mixed(spec: Spec, template: Any, gate: Tensor, given: Mapping[Any, Any], output: Any) -> Any:
    """`output` turned down towards what the stand-in of this template returns; what else a kept module makes stays."""
    if isinstance(output, Tensor):
        return _between(spec, template, gate, given, output)
    if not isinstance(output, (tuple, list)) or not isinstance(template, dict):
        return output
    (items,) = template.values()
    count = 1 if spec.get("keep") else len(items)
    mixed = [_mixed(spec, item, gate, given, value) for item, value in zip(items[:count], output, strict=False)]
    return type(output)([*mixed, *output[count:]])


def _between(spec: Spec, template: Any, gate: Tensor, given: Mapping[Any, Any], output: Tensor) -> Tensor:
    if isinstance(template, dict) and ("tuple" in template or "list" in template):
        template = next(iter(template.values()))[0]  # the module returns less than when it was seen
    gate = gate.to(output.device, output.dtype)
    if template == "zeros":
        return output * gate
    other = given.get(spec["input"] if template == "input" else template["given"]) if template else None
    if not isinstance(other, Tensor) or other.shape != output.shape or not output.is_floating_point():
        return output
    return torch.lerp(other, output, gate)
