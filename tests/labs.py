"""Labs around tiny models, for the criteria that look at weights and gradients; each model and anatomy made once."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import zoo
from toys import Toy, additive

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.importance.criterion import Lab
from blockpruner.searching.evaluations import Evaluations, Notes
from blockpruner.searching.moves import GRANULARITIES
from blockpruner.texts.examples import Examples, Signs, examples_of

SIGNS = Signs(mask=5, sentinels=(6, 7, 8, 9, 10, 11), last=4)


@functools.cache
def made(name: str) -> Any:
    """A tiny model of the zoo that all tests share, and its anatomy."""
    model = zoo.build(name)
    return model, read_anatomy(model)


def examples(model: Any, windows: int = 3, tokens: int = 12) -> Examples:
    return examples_of(model, zoo.inputs(model, windows, tokens, seed=1)["input_ids"], SIGNS)


def lab_of(name: str, mask: str = "dense", **more: Any) -> Lab:
    """A lab with three windows, on a model without the blocks of `mask`; no loss of a mask may be asked for."""
    model, anatomy = made(name)
    given: dict[str, Any] = {"examples": examples(model), "evaluations": Evaluations(Toy(additive({})))} | more
    return Lab(model, anatomy, mask=parse_mask(mask), **given)


def moves_of(lab: Lab, kind: str = "block") -> Any:
    return list(GRANULARITIES[kind](lab.anatomy.outline, lab.mask))


def scored(criterion: Any, lab: Lab, moves: Any) -> Any:
    return criterion.scores(lab, moves)


def fresh(criterion: Any, lab: Lab, moves: Any) -> Any:
    """Its scores with nothing noted before."""
    return scored(criterion, dataclasses.replace(lab, notes=Notes()), moves)


def apart(numbers: Mapping[str, torch.nn.Parameter], by: float = 0.3) -> dict[str, torch.Tensor]:
    """Other values of these parameters, so many of their standard deviations away."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: p.data + by * p.data.std(unbiased=False) * torch.randn(p.shape, generator=generator)
        for name, p in numbers.items()
    }
