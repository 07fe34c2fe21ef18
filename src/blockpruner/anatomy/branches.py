"""Find the residual branches of a layer by intervention: silence modules until only its skeleton is left.

The *skeleton* of a layer is what it does when every projection in it is zero: the identity where blocks are added to an
untouched stream, norms and scales where those stand on the stream itself. No names and no architectures: the modules of
a layer that turn hidden states into hidden states are candidates, a stand-in for one (zeros, or one of its own inputs)
fits if the layer then computes what it computes with the module's projections at zero, and the smallest set that leaves
the skeleton, bit for bit, are the branches. All of this runs on scrambled parameters, so that a weight that happens
to be zero or one cannot hide a branch; what is found is proved on the real ones by `anatomy`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.anatomy.caches import CacheUse
from blockpruner.anatomy.kinds import kind_of, named
from blockpruner.anatomy.probing import (
    MISFIT,
    Call,
    SeenLayer,
    first_tensor,
    is_matrix,
    nulled,
    projections,
    recorded,
    scrambled,
    stood_in,
    unfilled,
    with_parameters,
)
from blockpruner.blocks import Kind
from blockpruner.errors import UnsupportedModelError, is_out_of_memory

MAX_COMBINATIONS = 3000
MAX_OUTLETS = 8
DEPTH = 4  # levels of modules below the layer, containers not counted, that are searched

Spec = dict[str, Any]


@dataclass(frozen=True)
class Branch:
    """One residual branch, in paths below its layer.

    kind, and what decided it; modules: the module whose output is the branch, with its stand-in; outlets: names of the
    parameters in it that at zero have the same effect (its last projections); idle: modules that do nothing once this
    branch is gone (norms, inner projections), with their stand-ins.
    """

    kind: Kind
    evidence: str
    modules: Mapping[str, Spec]
    outlets: tuple[str, ...]
    idle: Mapping[str, Spec]


@dataclass(frozen=True)
class Dissection:
    """A layer taken apart: branches in the order they run.

    idle: what does nothing once all of them are gone (a norm that they share), with stand-ins;
    whole: silencing all of them leaves the skeleton, so that there is no projection besides;
    serial: one mixing branch whose result the one mlp reads, and every parameter belongs to one of the two.
    """

    branches: tuple[Branch, ...]
    idle: Mapping[str, Spec]
    whole: bool
    serial: bool


def dissect(layer: SeenLayer, use: CacheUse) -> Dissection:
    """Take one layer apart; UnsupportedModelError says which modules were tried when nothing silences it."""
    with torch.no_grad(), with_parameters(layer.module, scrambled(seed=0)):
        calls = _calls_within(layer)
        silent = _silencing(layer, calls, skeleton(layer)) if carries(layer) else None
        whole = silent is not None
        if silent is None:
            silent = _named_branches(layer, calls)
        branches = []
        for path in sorted(silent, key=list(calls).index):
            kind, evidence = kind_of(layer, path, silent, use)
            idle = _idle(layer, calls, silent, [path])
            branches.append(Branch(kind, evidence, {path: silent[path]}, _outlets(layer, calls, path), idle))
        owned = {p for branch in branches for p in branch.idle}
        rest = {p: spec for p, spec in _idle(layer, calls, silent, list(silent)).items() if p not in owned}
        return Dissection(tuple(branches), rest, whole, whole and _is_serial(layer, branches))


def runs_to_stream(layer: SeenLayer, specs: Mapping[str, Spec]) -> Tensor:
    """The layer's output hidden states with `specs` in place, on the recorded call."""
    with stood_in(layer.module, specs):
        return layer.flows()


def nulled_stream(layer: SeenLayer, names: Sequence[str]) -> Tensor:
    """The layer's output hidden states with these parameters at zero, on the recorded call."""
    with nulled(layer.module, names):
        return layer.flows()


def skeleton(layer: SeenLayer) -> Tensor:
    """The layer's output hidden states with every projection in it at zero."""
    return nulled_stream(layer, projections(layer.module))


def _calls_within(layer: SeenLayer) -> dict[str, Call]:
    """The call of each module below the layer that ran exactly once, in the order they ended."""
    inside = {path: module for path, module in layer.module.named_modules() if path}
    with recorded(inside) as calls:
        layer.again()
    return {path: made[0] for path, made in calls.items() if len(made) == 1}


def _silencing(layer: SeenLayer, calls: Mapping[str, Call], target: Tensor) -> dict[str, Spec] | None:
    """The smallest set of stand-ins found that leaves the skeleton, outermost modules first; None if there is none."""
    if _leaves(layer, {}, target):
        return {}  # a layer whose blocks were removed before
    tried: list[list[str]] = []
    for depth in range(1, DEPTH + 1):
        paths = _candidates(layer, calls, depth)
        if paths in tried:
            break
        tried.append(paths)
        fitting = {path: _fitting(layer, calls, path) for path in paths}
        fitting = {path: specs for path, specs in fitting.items() if specs}
        for choice in itertools.islice(itertools.product(*fitting.values()), MAX_COMBINATIONS):
            specs = dict(zip(fitting, choice, strict=True))
            if specs and _leaves(layer, specs, target):
                return _smallest(layer, specs, target)
    return None


def _named_branches(layer: SeenLayer, calls: Mapping[str, Call]) -> dict[str, Spec]:
    """Where the layer mixes its own stream by projections, the outermost fitting modules that names call blocks."""
    specs: dict[str, Spec] = {}
    blocks = [path for path, child in _children(layer.module) if named(layer.module, path) and _matrices(child)]
    for path in blocks:
        if fitting := _fitting(layer, calls, path) if path in calls else []:
            specs[path] = fitting[0]
    every = [name for path in blocks for name in projections(layer.module, path)]
    if specs and len(specs) == len(blocks) and _leaves(layer, specs, nulled_stream(layer, every)):
        return specs
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.module.named_children())
    raise not_understood(
        layer, f"no stand-ins leave what it does with its projections at zero; its modules: {children}"
    )


def not_understood(layer: SeenLayer, reason: str) -> UnsupportedModelError:
    """The refusal of a model for what one of its layers does."""
    return UnsupportedModelError(
        f"{layer.path} ({type(layer.module).__name__}): {reason}",
        fix="nothing is removed that is not proved; docs/teaching.md explains this",
    )


def carries(layer: SeenLayer) -> bool:
    """Whether the skeleton carries every token of the stream; UnsupportedModelError if it mixes them."""
    place = layer.stream.shape[layer.token_axis] // 2
    with nulled(layer.module, projections(layer.module)):
        plain, one, every = (layer.flows(s) for s in (layer.stream, layer.turned(place), layer.stream.roll(1, dims=-1)))
    by_token = [(plain != other).movedim(layer.token_axis, 0).flatten(1).any(1) for other in (one, every)]
    if int(by_token[0].sum()) > int(by_token[0][place]):
        raise not_understood(layer, "with all its projections at zero it still mixes tokens")
    return bool(by_token[1].all())


def _candidates(layer: SeenLayer, calls: Mapping[str, Call], depth: int) -> list[str]:
    """Paths of modules, `depth` levels down (containers not counted), that own a matrix and return hidden states."""
    found: list[str] = []

    def visit(path: str, inner: nn.Module, level: int) -> None:
        for name, child in _children(inner):
            below = f"{path}.{name}" if path else name
            fits = below in calls and _options(calls[below], layer) and _matrices(child)
            deeper = level < depth and any(True for _ in child.children())
            if deeper:
                before = len(found)
                visit(below, child, level + 1)
                if len(found) > before:
                    continue
            if fits:
                found.append(below)

    visit("", layer.module, 1)
    return found


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules directly below, those in lists and dictionaries included, with their paths."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", grandchild) for inner, grandchild in _children(child))
        else:
            yield name, child


def _matrices(module: nn.Module) -> bool:
    """Whether a block's projections may be in there; what took the place of an earlier one's is none."""
    with unfilled(module):
        return any(map(is_matrix, module.parameters()))


def _options(call: Call, layer: SeenLayer) -> list[Spec]:
    """Stand-ins that fit this call, the likeliest first: zeros, then each hidden-shaped input."""
    stream = layer.stream
    output = first_tensor(call.output)
    if output is None or not output.is_floating_point() or output.ndim < 2 or not output.numel():
        return []
    # Streams may run in parallel, each one entry of a dimension or one part of the last, and a block sees one of them.
    places, width = stream.shape[:-1].numel(), stream.shape[-1]
    beside = places % output.shape[:-1].numel() == 0 and output.shape[-1] == width
    within = places == output.shape[:-1].numel() and width % output.shape[-1] == 0
    if not beside and not within:
        return []
    tensors = {key: v for key, v in call.inputs() if isinstance(v, Tensor) and v.is_floating_point()}
    options: list[Spec] = []
    leading = next((key for key, v in tensors.items() if v.shape[:-1] == output.shape[:-1]), None)
    listed = next((key for key, v in tensors.items() if v.shape[:-1].numel() == output.shape[:-1].numel()), None)
    if leading is not None:
        options.append({"input": leading, "output": template(call, "zeros"), "width": output.shape[-1]})
    elif listed is not None and output.ndim == 2:  # tokens of all sequences in one list, as routed experts take them
        options.append({"input": listed, "output": template(call, "zeros"), "width": output.shape[-1], "flat": True})
    shaped = [key for key, v in tensors.items() if v.shape == output.shape and not layer.is_outside(v)]
    return options + [{"input": key, "output": template(call, "input")} for key in shaped]


def template(call: Call, first: str) -> Any:
    """`first` in the place of the hidden states, inputs that the call hands on in theirs, None in every other."""
    if isinstance(call.output, Tensor):
        return first
    given = {id(value): key for key, value in call.inputs() if isinstance(value, (Tensor, list))}
    rest = [{"given": given[id(item)]} if id(item) in given else None for item in call.output[1:]]
    return {"list" if isinstance(call.output, list) else "tuple": [first, *rest]}


def _fitting(layer: SeenLayer, calls: Mapping[str, Call], path: str) -> list[Spec]:
    """The stand-ins for one module under which the layer does what it does with the module's projections at zero."""
    target = nulled_stream(layer, projections(layer.module, path))
    return [spec for spec in _options(calls[path], layer) if _leaves(layer, {path: spec}, target)]


def _leaves(layer: SeenLayer, specs: Mapping[str, Spec], target: Tensor) -> bool:
    """Whether the layer returns `target` with these stand-ins; not if they do not fit its own arithmetic."""
    try:
        return torch.equal(runs_to_stream(layer, specs), target)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return False


def _smallest(layer: SeenLayer, specs: dict[str, Spec], target: Tensor) -> dict[str, Spec]:
    """Leave out, first module first, every stand-in that the skeleton does not need."""
    for path in list(specs):
        fewer = {p: s for p, s in specs.items() if p != path}
        if fewer and _leaves(layer, fewer, target):
            specs = fewer
    return specs


def _outlets(layer: SeenLayer, calls: Mapping[str, Call], path: str) -> tuple[str, ...]:
    """The parameters of the last projections within a module, which at zero have the effect of all at zero.

    Everything else within may have other readers.
    """
    everything = projections(layer.module, path)
    target = nulled_stream(layer, everything)
    owned: dict[str, list[str]] = {}
    for name in everything:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    last = [owned[owner] for owner in reversed(list(calls)) if owner in owned]
    for count in range(1, min(len(last), MAX_OUTLETS) + 1):
        names = [name for group in last[:count] for name in group]
        if torch.equal(nulled_stream(layer, names), target):
            return tuple(names)
    return tuple(everything)


def _idle(layer: SeenLayer, calls: Mapping[str, Call], silent: Mapping[str, Spec], gone: list[str]) -> dict[str, Spec]:
    """Modules with parameters that change nothing any more once the branches `gone` are silent."""
    specs = {path: silent[path] for path in gone}
    truth = runs_to_stream(layer, specs)
    found: dict[str, Spec] = {}

    def visit(path: str, inner: nn.Module) -> None:
        for name, child in inner.named_children():
            below = f"{path}.{name}" if path else name
            if below in silent or not any(True for _ in child.parameters()):
                continue
            ways = _passing(calls[below], layer) if below in calls else []
            if not ways or any(p.startswith(f"{below}.") for p in silent):
                visit(below, child)
                continue
            if fitting := [spec for spec in ways if _leaves(layer, {**specs, **found, below: spec}, truth)]:
                found[below] = fitting[0]

    visit("", layer.module)
    return found


def _passing(call: Call, layer: SeenLayer) -> list[Spec]:
    """Stand-ins for a module that nobody heeds: its first tensor input as it is, or zeros where the width matters.

    Zeros too for memory from `outside` the layer (a table of positions): whoever reads the output may work in place.
    """
    given = next(((k, v) for k, v in call.inputs() if isinstance(v, Tensor)), None)
    output = first_tensor(call.output)
    if given is None or output is None:
        return []
    key, value = given
    zeros = {"input": key, "output": template(call, "zeros"), "width": output.shape[-1]}
    through = {"input": key, "output": template(call, "input")}
    return [zeros] if layer.is_outside(value) else [through, zeros]


def _is_serial(layer: SeenLayer, branches: list[Branch]) -> bool:
    if len(branches) != 2 or branches[0].kind == "mlp" or branches[1].kind != "mlp":
        return False
    owned = {id(p) for b in branches for path in (*b.modules, *b.idle) for p in _parameters(layer.module, path)}
    if any(id(p) not in owned for p in layer.module.parameters()):
        return False
    (mlp,) = branches[1].modules
    seen = []
    for specs in ({}, branches[0].modules):
        with stood_in(layer.module, specs), recorded({mlp: layer.module.get_submodule(mlp)}) as calls:
            layer.again()
        seen.append([v for _, v in calls[mlp][0].inputs() if isinstance(v, Tensor)])
    return any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _parameters(module: nn.Module, path: str) -> Iterator[nn.Parameter]:
    return module.get_submodule(path).parameters()
