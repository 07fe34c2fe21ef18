"""Find the residual branches of a layer by intervention: silence modules until only the residual stream is left.

No names and no architectures: the modules of a layer that turn hidden states into hidden states are candidates;
a combination of stand-ins (zeros, or one of the module's own inputs) under which `layer(x)` equals `x` bit for bit
silences the layer, and its smallest form names the branches. The search runs on scrambled parameters, so that a
weight that happens to be zero or one cannot hide a branch; what it finds is proved on the real ones by `anatomy`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.blocks import Kind
from blockpruner.errors import UnsupportedModelError, is_out_of_memory
from blockpruner.probing import Call, SeenLayer, first_tensor, recorded, scrambled, stood_in, with_parameters

MAX_COMBINATIONS = 3000
# What a model's own code raises when a stand-in returns something that it cannot work with.
MISFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_NAMED_ATTENTION = ("attn", "attention")
_NAMED_OTHER_MIXER = (
    "linear_att",
    "linearatt",
    "lightning",
    "mamba",
    "conv",
    "ssm",
    "recurrent",
    "rwkv",
    "deltanet",
    "delta_net",
    "fourier",
)

Spec = dict[str, Any]


@dataclass(frozen=True)
class Branch:
    """One residual branch, in paths below its layer.

    kind, and whether behaviour or a class name decided it; modules: the module whose output is the branch, with its
    stand-in; idle: modules that do nothing once this branch is gone (norms, inner projections), with theirs.
    """

    kind: Kind
    evidence: str
    modules: Mapping[str, Spec]
    idle: Mapping[str, Spec]


@dataclass(frozen=True)
class Dissection:
    """A layer taken apart: branches in the order they run, and what idles only when all of them are gone.

    serial: one mixing branch whose result the one mlp reads, and every parameter belongs to one of the two.
    """

    branches: tuple[Branch, ...]
    idle: Mapping[str, Spec]
    serial: bool


def dissect(layer: SeenLayer) -> Dissection:
    """Take one layer apart; UnsupportedModelError says which modules were tried when nothing silences it."""
    with torch.no_grad(), with_parameters(layer.module, scrambled(seed=0)):
        calls = _calls_within(layer)
        silent = _silencing(layer, calls)
        branches = []
        for path in sorted(silent, key=lambda p: list(calls).index(p)):
            others = {p: spec for p, spec in silent.items() if p != path}
            kind, evidence = _kind(layer, path, others)
            branches.append(Branch(kind, evidence, {path: silent[path]}, _idle(layer, calls, silent, [path])))
        owned = {p for branch in branches for p in branch.idle}
        rest = {p: s for p, s in _idle(layer, calls, silent, list(silent)).items() if p not in owned}
        return Dissection(tuple(branches), rest, _is_serial(layer, branches))


def runs_to_stream(layer: SeenLayer, specs: Mapping[str, Spec]) -> Tensor:
    """The layer's output hidden states with `specs` in place, on the recorded call."""
    with stood_in(layer.module, specs):
        output = first_tensor(layer.again())
    if output is None:
        raise UnsupportedModelError(f"{layer.path} returned no tensor", fix="report the model's type and this message")
    return output


def _calls_within(layer: SeenLayer) -> dict[str, Call]:
    """The call of each module below the layer that ran exactly once, in the order they ended."""
    inside = {path: module for path, module in layer.module.named_modules() if path}
    with recorded(inside) as calls:
        layer.again()
    return {path: made[0] for path, made in calls.items() if len(made) == 1}


def _silencing(layer: SeenLayer, calls: Mapping[str, Call]) -> dict[str, Spec]:
    """The smallest set of stand-ins found under which the layer is the identity."""
    stream = layer.stream
    if _is_identity(layer, {}):
        return {}  # a layer whose blocks were removed before
    for depth in range(1, 4):
        candidates = {path: _options(calls[path], stream) for path in _candidates(layer.module, calls, stream, depth)}
        for choice in _cheapest_first(list(candidates.values())):
            specs = dict(zip(candidates, choice, strict=True))
            if specs and _is_identity(layer, specs):
                return _smallest(layer, specs)
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.module.named_children())
    raise UnsupportedModelError(
        f"{layer.path} ({type(layer.module).__name__}): no stand-ins make the layer return its input unchanged; "
        f"its modules: {children}",
        fix="this layer scales or mixes its residual stream, or adds what is no module; report the model's type",
    )


def _candidates(module: nn.Module, calls: Mapping[str, Call], stream: Tensor, depth: int) -> list[str]:
    """Paths of modules, `depth` levels down (containers not counted), that own a matrix and return hidden states."""
    found: list[str] = []

    def visit(path: str, inner: nn.Module, level: int) -> None:
        for name, child in inner.named_children():
            below = f"{path}.{name}" if path else name
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(below, child, level)
                continue
            fits = below in calls and _options(calls[below], stream) and any(p.ndim >= 2 for p in child.parameters())
            deeper = level < depth and any(True for _ in child.children())
            if deeper:
                before = len(found)
                visit(below, child, level + 1)
                if len(found) > before:
                    continue
            if fits:
                found.append(below)

    visit("", module, 1)
    return found


def _options(call: Call, stream: Tensor) -> list[Spec]:
    """Stand-ins that fit this call, the likeliest first: zeros, then each hidden-shaped input."""
    sizes = {tuple(stream.shape), (stream.shape[0] * stream.shape[1], stream.shape[2])}
    output = first_tensor(call.output)
    if output is None or tuple(output.shape) not in sizes or not output.is_floating_point():
        return []
    hidden = [key for key, value in call.inputs() if isinstance(value, Tensor) and value.is_floating_point()]
    shaped = [key for key in hidden if tuple(dict(call.inputs())[key].shape) == tuple(output.shape)]
    leading = next((k for k in hidden if dict(call.inputs())[k].shape[:-1] == output.shape[:-1]), None)
    options: list[Spec] = []
    if leading is not None:
        options.append({"input": leading, "output": template(call.output, "zeros"), "width": output.shape[-1]})
    options += [{"input": key, "output": template(call.output, "input")} for key in shaped]
    return options


def template(output: Any, first: str) -> Any:
    """`first` in the place of the hidden states, None in every other place of the structure."""
    if isinstance(output, Tensor):
        return first
    items: list[Any] = [first, *[None] * (len(output) - 1)]
    return {"list" if isinstance(output, list) else "tuple": items}


def _cheapest_first(options: list[list[Spec]]) -> Iterator[tuple[Spec, ...]]:
    """All choices of one option each, those with the fewest unlikely options first, at most MAX_COMBINATIONS."""
    ranks = itertools.product(*(range(len(choices)) for choices in options))
    capped = list(itertools.islice(ranks, MAX_COMBINATIONS))
    for rank in sorted(capped, key=sum):
        yield tuple(choices[i] for choices, i in zip(options, rank, strict=True))


def _is_identity(layer: SeenLayer, specs: Mapping[str, Spec]) -> bool:
    try:
        return torch.equal(runs_to_stream(layer, specs), layer.stream)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return False  # this combination does not fit the layer's own arithmetic


def _smallest(layer: SeenLayer, specs: dict[str, Spec]) -> dict[str, Spec]:
    """Leave out, first module first, every stand-in that the identity does not need."""
    for path in list(specs):
        fewer = {p: s for p, s in specs.items() if p != path}
        if fewer and _is_identity(layer, fewer):
            specs = fewer
    return specs


def _idle(layer: SeenLayer, calls: Mapping[str, Call], silent: Mapping[str, Spec], gone: list[str]) -> dict[str, Spec]:
    """Modules with parameters that change nothing any more once the branches `gone` are silent."""
    specs = {path: silent[path] for path in gone}
    truth = runs_to_stream(layer, specs)
    found: dict[str, Spec] = {}

    def unchanged(more: Mapping[str, Spec]) -> bool:
        try:
            return torch.equal(runs_to_stream(layer, {**specs, **more}), truth)
        except MISFIT as error:
            if is_out_of_memory(error):
                raise
            return False

    def visit(path: str, inner: nn.Module) -> None:
        for name, child in inner.named_children():
            below = f"{path}.{name}" if path else name
            if below in silent or not any(True for _ in child.parameters()):
                continue
            spec = _passing(calls[below]) if below in calls else None
            if not any(p.startswith(f"{below}.") for p in silent) and spec is not None:
                if unchanged({**found, below: spec}):
                    found[below] = spec
            else:
                visit(below, child)

    visit("", layer.module)
    return found


def _passing(call: Call) -> Spec | None:
    """A stand-in that hands its first tensor input through, in the structure of the call's output."""
    key = next((k for k, v in call.inputs() if isinstance(v, Tensor)), None)
    if key is None or first_tensor(call.output) is None:
        return None
    return {"input": key, "output": template(call.output, "input")}


def _kind(layer: SeenLayer, path: str, others: Mapping[str, Spec]) -> tuple[Kind, str]:
    """Whether the branch mixes tokens: seen when one token of the stream changes and the other branches are silent."""
    place = layer.stream.shape[1] // 2
    turned = layer.stream.clone()
    turned[:, place] = turned[:, place].roll(1, dims=-1)
    added = []
    for stream in (layer.stream, turned):
        with stood_in(layer.module, others):
            output = first_tensor(layer.again(stream))
        added.append((output - stream).float() if output is not None else stream.float())
    moved = (added[0] - added[1]).abs().amax(dim=(0, 2))
    moved[place] = 0
    # Routed experts group tokens anew when one of them changes, so a channel branch may differ by rounding elsewhere.
    rounding = 0.05 if layer.stream.dtype.itemsize < 4 else 1e-4
    if float(moved.max()) <= rounding * float(added[0].abs().max()):
        return "mlp", "each token for itself"
    steps = ["", *itertools.accumulate(path.split("."), "{}.{}".format)][1:]
    names = " ".join(f"{step} {type(layer.module.get_submodule(step)).__name__}" for step in steps).lower()
    if any(word in names for word in _NAMED_OTHER_MIXER):
        return "mixer", "mixes tokens; named as another mixer"
    if any(word in names for word in _NAMED_ATTENTION):
        return "attention", "mixes tokens; named attention"
    return "mixer", "mixes tokens"


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
