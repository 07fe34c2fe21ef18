"""What a training is: the numbers that are trained, by what, on which windows at which step, and how it went."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from blockpruner.artifacts import Artifact
from blockpruner.repairs.recovery import Judged, Trained
from blockpruner.searching.contract import Progress
from blockpruner.texts.examples import Examples

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class Number(NamedTuple):
    """What is trained: the parameter that gets the gradient, and the tensor that the model computes with then."""

    parameter: nn.Parameter
    value: Tensor


def numbers_in(modules: Mapping[str, nn.Module]) -> dict[str, Number]:
    """All parameters of these modules, each by its path and name."""
    return {f"{at}.{name}": Number(p, p.data) for at, part in modules.items() for name, p in part.named_parameters()}


class Lesson(Protocol):
    """What a step makes smaller."""

    def weigh(self, part: Examples) -> float:
        """How much these windows count in the mean over a step."""
        ...

    def backward(self, part: Examples, scale: float) -> float:
        """Add the gradient of scale times the loss summed over these windows; returns that sum."""
        ...


@dataclass(frozen=True)
class Course:
    """One training: what is trained and how, and by what it is judged.

    judge: the sum of the held-out loss over some windows, and what that is to be divided by; noise: switches dropout;
    identity: all that the result depends on beside the options and the text; folder: of the checkpoints, None for none.
    """

    options: Trained
    numbers: Mapping[str, Number]
    lesson: Lesson
    judge: Callable[[Examples], tuple[float, float]]
    examples: Examples
    held_out: Examples
    identity: str
    noise: Callable[[bool], None] = lambda on: None
    force: bool = False
    folder: Path | None = None
    report: Progress = lambda done, total, message: None


class Trace(Artifact):
    """How a training went: looks at the held-out loss, and the step whose numbers are kept (0: as it began)."""

    FORMAT: ClassVar[str] = "blockpruner.training"
    VERSION: ClassVar[int] = 2

    identity: str
    step: int
    curve: tuple[Judged, ...]

    def best(self, force: bool = False) -> int:
        """The step of the smallest loss, the first of several; with `force` the beginning is not asked."""
        known = [(look.loss, look.step) for look in self.curve if look.loss is not None and (look.step or not force)]
        return min(known)[1] if known else (self.step if force else 0)


def windows_of_step(options: Trained, examples: Examples, step: int) -> list[int]:
    """The windows of one step, counted from 0; every epoch has an order of its own, from (seed, epoch)."""
    held, each = len(examples), options.batch * options.accumulate
    total = options.windows(held, examples.tokens)
    places = [divmod(place, held) for place in range(step * each, min((step + 1) * each, total))]
    orders = {epoch: order_of(options, held, epoch) for epoch in {epoch for epoch, _ in places}}
    return [int(orders[epoch][at]) for epoch, at in places]


def order_of(options: Trained, held: int, epoch: int) -> Tensor:
    """The order in which an epoch sees its windows, [held]."""
    return torch.randperm(held, generator=torch.Generator().manual_seed((options.seed * 1_000_003 + epoch) % 2**63))


def rates(options: Trained, steps: int) -> Callable[[int], float]:
    """The step size at each step, by transformers' schedules, none of whose steps is 0 long."""
    schedule = get_scheduler(
        SCHEDULES[options.schedule],
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.lr),
        num_warmup_steps=min(options.warmup, steps // 10),
        num_training_steps=steps + 1,
    )
    shape: Any = schedule
    return lambda step: options.lr * shape.lr_lambdas[0](step + 1)


def rows_of(examples: Examples, chosen: list[int]) -> Examples:
    """The windows of these numbers, in this order."""
    inputs = {name: value[chosen] for name, value in examples.inputs.items()}
    windows = None if examples.windows is None else examples.windows[chosen]
    return Examples(examples.question, inputs, examples.targets[chosen], (1,) * len(chosen), windows=windows)
