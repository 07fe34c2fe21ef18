"""Watch a model at work: example inputs, recorded calls, and modules that are replaced for a moment."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.errors import UnsupportedModelError, is_out_of_memory
from blockpruner.standin import StandIn, muffle, replace_module, stand_in_for

Key = int | str
# What a model's own code raises when it is given something that it cannot work with.
MISFIT = (AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given and what it returned (references, not copies)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> Iterator[tuple[Key, Any]]:
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def given(self, changed: Mapping[Key, Any]) -> "Call":
        """The same call with the arguments in `changed` replaced; what came of it is not known."""
        args = tuple(changed.get(position, value) for position, value in enumerate(self.args))
        return Call(args, {name: changed.get(name, value) for name, value in self.kwargs.items()}, None)

    def again(self, module: nn.Module, changed: Mapping[Key, Any] | None = None) -> Any:
        """Call `module` with these arguments, those in `changed` replaced."""
        call = self.given(changed or {})
        return module(*call.args, **call.kwargs)


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is, or begins with."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def example_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids for one forward pass of any text model; no padding, no cache.

    A decoder behind an encoder gets fewer tokens than its encoder, so that nothing mistakes the one for the other.
    """
    vocabulary = vocabulary_size(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary // 8, vocabulary, (batch, tokens), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : tokens - tokens // 4].flip(1)
    return inputs


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of rows of the input embedding."""
    embedding = model.get_input_embeddings()
    weight = embedding if isinstance(embedding, Tensor) else getattr(embedding, "weight", None)
    return model.config.get_text_config().vocab_size if weight is None else weight.shape[0]


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the forward of `model` takes an argument called `name`, by itself or through **kwargs."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The option that keeps a forward pass from making a cache, where the model has it."""
    return {"use_cache": False} if accepts(model, "use_cache") else {}


class Enough(Exception):
    """Leaves a forward pass once what was to be seen was seen."""


def enough(*_: object) -> None:
    """A hook that leaves the forward pass."""
    raise Enough


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the block runs, `model` is in eval mode; then each module in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """While the block runs, collect the calls of `modules`, by name, in the order they ended."""
    calls: dict[str, list[Call]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append(Call(args, kwargs, output))

        return hook

    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While the block runs, `modules` sit at their paths below `root`; always put back, also after an exception."""
    old: list[tuple[str, nn.Module]] = []
    try:
        for path, module in modules.items():
            old.append((path, replace_module(root, path, module)))
        yield
    finally:
        for path, module in reversed(old):
            replace_module(root, path, module)


@contextlib.contextmanager
def stood_in(root: nn.Module, specs: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """While the block runs, stand-ins take the place of the modules at these paths below `root`, or muffle them."""
    gone = {path: stand_in_for(root.get_submodule(path), spec) for path, spec in specs.items() if not spec.get("keep")}
    with contextlib.ExitStack() as hooks, replaced(root, gone):
        for path in specs.keys() - gone.keys():
            hooks.callback(muffle(root.get_submodule(path), specs[path]).remove)
        yield


def fillings(root: nn.Module) -> dict[str, nn.Module]:
    """What a recovery gave to stand-ins below `root`, by the path of the stand-in.

    Known by names, since a checkpoint may bring its own copy of the file of stand-ins.
    """
    kind = StandIn.__name__
    stand_ins: dict[str, Any] = {path: inner for path, inner in root.named_modules() if type(inner).__name__ == kind}
    return {path: inner.replacement for path, inner in stand_ins.items() if inner.replacement is not None}


@contextlib.contextmanager
def unfilled(root: nn.Module) -> Iterator[None]:
    """While the block runs, stand-ins below `root` add nothing, as before a recovery."""
    held = fillings(root)
    places: dict[str, Any] = {path: root.get_submodule(path) for path in held}
    try:
        for stand_in in places.values():
            stand_in.replacement = None
        yield
    finally:
        for path, stand_in in places.items():
            stand_in.replacement = held[path]


@contextlib.contextmanager
def asking(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """While the block runs, of the model's parameters these alone ask for gradients, which all begin without one."""
    before = [(p, p.requires_grad, p.grad) for p in {*model.parameters(), *parameters}]
    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


@contextlib.contextmanager
def made_of(parameters: Iterable[nn.Parameter], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, each of these parameters `p` holds `make(p)`; then itself again."""
    kept = [(p, p.data) for p in {id(p): p for p in parameters}.values()]  # tied ones once
    try:
        for parameter, data in kept:
            parameter.data = make(data)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def with_parameters(module: nn.Module, make: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
    """While the block runs, every floating-point parameter `p` of `module` holds `make(p)`; then itself again."""
    return made_of((p for p in module.parameters() if p.is_floating_point()), make)


def is_matrix(data: Tensor) -> bool:
    """Whether a parameter joins two dimensions: projections and tables do, norms and scales do not."""
    return sum(size > 1 for size in data.shape) > 1


def projections(root: nn.Module, path: str = "") -> list[str]:
    """Names, below `root`, of the parameters of each module at or in `path` that is, or holds, a matrix.

    Weights, biases, sinks; not norms and scales, for these may stand on the residual stream, nor what stands in the
    place of a block that was removed before. Of `root` itself only its own matrices.
    """
    found: list[str] = []
    others = set(fillings(root).values())
    for inner, module in root.get_submodule(path).named_modules(prefix=path):
        holds = module not in others and any(map(is_matrix, module.parameters()))
        for name, parameter in module.named_parameters(prefix=inner, recurse=False):
            if parameter.is_floating_point() and holds and (module is not root or is_matrix(parameter)):
                found.append(name)
    return found


def nulled(root: nn.Module, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """While the block runs, the parameters of these names below `root` are zero."""
    return made_of(map(root.get_parameter, names), zeroed)


def zeroed(data: Tensor) -> Tensor:
    """Zeros in the shape of `data`; matrices take no memory (grouped kernels want real strides)."""
    if data.ndim > 2:
        return torch.zeros_like(data)
    return torch.zeros((), dtype=data.dtype, device=data.device).expand(data.shape)


def scrambled(seed: int) -> Callable[[Tensor], Tensor]:
    """Makes random parameters of ordinary size, so that nothing is zero or one by initialisation or by training."""
    generator = torch.Generator().manual_seed(seed)

    def make(data: Tensor) -> Tensor:
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float32)
        spread = 0.1 if data.ndim < 2 else data[0].numel() ** -0.5
        offset = 1.0 if data.ndim == 1 else 0.0
        return (offset + spread * noise).to(data.device, data.dtype)

    return make


def turned(values: Tensor, axis: int, place: int) -> Tensor:
    """A copy of `values` whose vectors at `place` along `axis` are turned round by one entry."""
    values = values.clone()
    view = values.select(axis, place)
    view.copy_(view.roll(1, dims=-1))
    return values


def turned_around(values: Tensor, axis: int, place: int) -> Tensor:
    """A copy of `values` whose vectors along `axis`, but for the one at `place`, are turned round by one entry."""
    values_turned = values.roll(1, dims=-1)
    values_turned.select(axis, place).copy_(values.select(axis, place))
    return values_turned


@dataclass(frozen=True)
class SeenLayer:
    """One element of a layer stack as it was called.

    hidden: the input that carries the residual stream; token_axis: the dimension of the stream that counts tokens.
    """

    path: str
    module: nn.Module
    call: Call
    hidden: Key
    token_axis: int

    @property
    def stream(self) -> Tensor:
        return dict(self.call.inputs())[self.hidden]

    def is_outside(self, value: Tensor) -> bool:
        """Whether the layer was given this memory beside the stream (an encoder's states, a table of positions)."""
        given = (v for key, v in self.call.inputs() if isinstance(v, Tensor) and key != self.hidden)
        return any(value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in given)

    def turned(self, place: int) -> Tensor:
        """The stream with the token at `place` changed."""
        return turned(self.stream, self.token_axis, place)

    def again(self, stream: Tensor | None = None, changed: Mapping[Key, Any] | None = None) -> Any:
        """Call the layer as it was called, with a copy of its stream or of `stream`: some layers work in place."""
        stream = self.stream if stream is None else stream
        return self.call.again(self.module, {**(changed or {}), self.hidden: stream.clone()})

    def flows(self, stream: Tensor | None = None, changed: Mapping[Key, Any] | None = None) -> Tensor:
        """The stream that `again` returns."""
        output = first_tensor(self.again(stream, changed))
        if output is None:
            raise UnsupportedModelError(
                f"{self.path} returned no tensor", fix="report the model's type and this message"
            )
        return output


def find_stacks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, list[SeenLayer]]:
    """The layer stacks that one forward pass runs through, by the path of their nn.ModuleList.

    A stack is an outermost list whose elements were each called once and map one of their inputs, a float tensor with a
    dimension of tokens and a last one of hidden states, to a tensor of the same shape.
    UnsupportedModelError, saying what was seen, if none is.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    }
    elements = {f"{path}.{i}": element for path, found in lists.items() for i, element in enumerate(found)}
    try:
        with torch.no_grad(), recorded(elements) as calls:
            model(**inputs, **without_cache(model))
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(model).__name__} does not run on a few random tokens ({type(error).__name__}: {error})"
        raise UnsupportedModelError(reason, fix="a model that needs more than text cannot be read yet") from error
    batch = inputs["input_ids"].shape[0]
    tokens = {inputs[name].shape[1] for name in ("input_ids", "decoder_input_ids") if name in inputs}
    stacks: dict[str, list[SeenLayer]] = {}
    for path, found in lists.items():
        if any(path.startswith(f"{outer}.") for outer in stacks):
            continue
        layers = [_seen(f"{path}.{i}", element, calls, batch, tokens) for i, element in enumerate(found)]
        if layers and all(layers) and any(list(element.children()) for element in found):
            stacks[path] = [layer for layer in layers if layer]
    if not stacks:
        times = {
            path: max(len(calls.get(f"{path}.{i}", ())) for i in range(len(found))) for path, found in lists.items()
        }
        listed = ", ".join(
            f"{path} ({type(found[0]).__name__} x {len(found)}, each called up to {times[path]} times)"
            for path, found in lists.items()
        )
        raise UnsupportedModelError(
            f"{type(model).__name__}: no stack of layers that each run once and map hidden states to the same shape; "
            f"module lists: {listed or 'none'}",
            fix="report the model's type and this message",
        )
    return stacks


def _seen(
    path: str, module: nn.Module, calls: Mapping[str, Sequence[Call]], batch: int, tokens: set[int]
) -> SeenLayer | None:
    made = calls.get(path, ())
    if len(made) != 1:
        return None
    output = first_tensor(made[0].output)
    if output is None or output.ndim < 3 or not output.is_floating_point():
        return None
    axis = _token_axis(output.shape[:-1], batch, tokens)
    if axis is None:
        return None
    for key, value in made[0].inputs():
        if isinstance(value, Tensor) and value.shape == output.shape and value.is_floating_point():
            return SeenLayer(path, module, made[0], key, axis)
    return None


def _token_axis(shape: torch.Size, batch: int, tokens: set[int]) -> int | None:
    """Which dimension counts tokens: one of their number, or the one beside the batch (a prompt may be added)."""
    if batch not in shape:
        return None
    place = shape.index(batch)
    beside = place + 1 if place + 1 < len(shape) else place - 1
    return next((axis for axis, size in enumerate(shape) if size in tokens), beside)
