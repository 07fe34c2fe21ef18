"""Gaps: the places that removed blocks leave in a model, where something else may be put."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer, Part, Spec
from blockpruner.anatomy.probing import stood_in
from blockpruner.blocks import Mask, format_mask
from blockpruner.standin import Replacement, StandIn


@dataclass(frozen=True)
class Gap:
    """One place where `blocks` were, at `path`. part: of a block that left alone; None where a whole layer left.

    A layer leaves whole if all its blocks are gone and more than they was in it (norms on the stream): see `Layer`.
    Where it becomes a shell, each of its blocks has a gap of its own.
    """

    blocks: Mask
    path: str
    layer: Layer
    part: Part | None

    def __str__(self) -> str:
        return format_mask(self.blocks)

    @property
    def kept(self) -> bool:
        """Whether something goes on running here for other blocks, so that nothing can take its place."""
        return bool(self.layer.through.get("keep")) if self.part is None else self.part.kept


@dataclass(frozen=True)
class Repair:
    """What a recovery does to a pruned model: replacements by the path of their gap, and new values of parameters.

    spans: of replacements that stand for more than was in their gap, by path, all the blocks that they stand for.
    made_up: blocks that the new values of parameters make up for, so that what these would add is not what is missing
    now; the rest, to the dense model's stream, may still be.
    """

    replacements: Mapping[str, Replacement] = field(default_factory=dict[str, Replacement])
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    spans: Mapping[str, Mask] = field(default_factory=dict[str, Mask])
    made_up: Mask = frozenset()

    def stands_for(self, gap: Gap) -> bool:
        """Whether something stands in the gap already, or for it in another one."""
        return gap.path in self.replacements or any(gap.blocks <= blocks for blocks in self.spans.values())

    def digest(self) -> str:
        """Of all that it does to a model."""
        told = hashlib.sha256()
        held = [(f"{path} {r.spec}", p) for path, r in sorted(self.replacements.items()) for p in r.parameters()]
        for name, value in [*held, *sorted(self.weights.items())]:
            told.update(name.encode())
            told.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        told.update(repr(sorted((path, format_mask(blocks)) for path, blocks in self.spans.items())).encode())
        return told.hexdigest()

    @property
    def added_parameters(self) -> int:
        return sum(p.numel() for replacement in self.replacements.values() for p in replacement.parameters())


UNREPAIRED = Repair()

Filling = Callable[[Layer, Mask], Mapping[str, Replacement]]  # of what is gone in a layer, by the paths of the gaps


def gaps(anatomy: Anatomy, mask: Mask) -> list[Gap]:
    """The gaps that `mask` leaves, in the order in which the model runs."""
    found: list[Gap] = []
    for stack in anatomy.stacks:
        for layer in stack.layers:
            gone = [part for part in layer.parts if part.block in mask]
            if gone and len(gone) == len(layer.parts) and not layer.shell:
                found.append(Gap(frozenset(part.block for part in gone), layer.path, layer, None))
            else:
                found += [Gap(frozenset([part.block]), part.path, layer, part) for part in gone]
    return found


def filled(anatomy: Anatomy, mask: Mask, filling: Filling | None) -> Repair:
    """What `filling` puts in all gaps of a mask."""
    if filling is None:
        return UNREPAIRED
    found: dict[str, Replacement] = {}
    for stack in anatomy.stacks:
        for layer in stack.layers:
            if gone := mask & {part.block for part in layer.parts}:
                found |= filling(layer, gone)
    return Repair(found)


@contextlib.contextmanager
def repaired(model: PreTrainedModel, anatomy: Anatomy, mask: Mask, repair: Repair = UNREPAIRED) -> Iterator[None]:
    """While the block runs, `model` works without `mask` and with what a recovery made of that; then it is whole."""
    specs = anatomy.stand_ins(mask)
    with reweighted(model, repair.weights), stood_in(model, specs):
        for path in specs.keys() & repair.replacements.keys():
            attach(model, path, repair.replacements[path])
        yield


def attach(model: nn.Module, path: str, replacement: nn.Module | None) -> None:
    """Give the stand-in at `path` something to add, or nothing."""
    stand_in = model.get_submodule(path)
    assert isinstance(stand_in, StandIn)
    stand_in.replacement = replacement


def with_replacements(specs: Mapping[str, Spec], repair: Repair) -> dict[str, Spec]:
    """The stand-ins `specs`, those that a recovery gave something to add with its description."""
    described = {path: {"replacement": replacement.spec} for path, replacement in repair.replacements.items()}
    return {path: {**spec, **described.get(path, {})} for path, spec in specs.items()}


@contextlib.contextmanager
def reweighted(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While the block runs, the parameters of these names hold `weights`; one given others meanwhile keeps them."""
    kept = [(model.get_parameter(name), model.get_parameter(name).data, value) for name, value in weights.items()]
    try:
        for parameter, _, value in kept:
            parameter.data = value
        yield
    finally:
        for parameter, data, value in kept:
            if parameter.data_ptr() == value.data_ptr():
                parameter.data = data


def device_of(model: nn.Module, gap: Gap) -> torch.device:
    """Where the weights of the layer around a gap are."""
    return next((p.device for p in model.get_submodule(gap.layer.path).parameters()), torch.device("cpu"))
