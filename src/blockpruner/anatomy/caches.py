"""What the modules of a model write to its cache, seen in one pass that fills one.

A stand-in has to make the same writes (`standin`): transformers reads lengths and masks from one representative slot,
and whether there is a past from one representative state, whichever module was to write them.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from blockpruner.anatomy.probing import MISFIT, Key, accepts
from blockpruner.errors import UnsupportedModelError, is_out_of_memory

Kind = Literal["keys", "cross", "state"]


@dataclass(frozen=True)
class Write:
    """One place of a cache that a module wrote to.

    kind: `keys`, with their values, of the tokens the module was given; `cross`, those of the encoder's tokens;
    `state`, of a size that does not grow: a convolution's, a recurrence's. slot: the layer of the cache; state: which
    of the slot's states; token_axis: the dimension of the module's hidden states that counts tokens, 0 or 1;
    size: bytes per token and sequence, of a state per sequence.
    """

    kind: Kind
    slot: int
    state: int
    token_axis: int
    size: int


@dataclass(frozen=True)
class CacheUse:
    """What watched modules did with a cache, by their paths.

    writes: what each wrote, with all inside it; no entry if nothing. handed_on: which outputs of each, the first apart,
    are inputs of it, or states it was given made anew, by position: some models hand these on beside the stream.
    seen: whether the model worked at all with a cache, so that there was something to see.
    """

    writes: Mapping[str, tuple[Write, ...]]
    handed_on: Mapping[str, Mapping[int, Key]]
    seen: bool = True

    @property
    def bytes_per_token(self) -> dict[str, int]:
        """Key and value bytes per token and sequence that each module wrote, without an encoder's tokens."""
        return {path: sum(w.size for w in made if w.kind == "keys") for path, made in self.writes.items()}

    def completed(self, path: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The stand-in `spec` for the module at `path`, made to write what it wrote and to hand on what it handed on.

        Keys of the encoder's tokens are not among it: whoever reads them reads its own.
        """
        made, new = self.writes.get(path, ()), dict(spec)
        if spec.get("keep"):
            return new
        slots = sorted({write.slot for write in made if write.kind == "keys"})
        if slots or not self.seen:
            new["cache"] = slots if self.seen else None
        if states := sorted({(write.slot, write.state) for write in made if write.kind == "state"}):
            new["states"] = [list(state) for state in states]
        if any(write.token_axis == 0 for write in made):
            new["token_axis"] = 0
        if isinstance(spec["output"], dict):
            ((container, items),) = spec["output"].items()
            handed = {place: {"given": key} for place, key in self.handed_on.get(path, {}).items()}
            new["output"] = {container: [handed.get(i) if item is None else item for i, item in enumerate(items)]}
        return new


def cache_use(model: PreTrainedModel, watched: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> CacheUse:
    """What each of `watched` does while `model` reads `inputs` into a cache of its own making; nothing if it has none.

    inputs: not as many sequences as tokens. Cost: one forward pass, or two where the first fills no cache.
    UnsupportedModelError if a module writes keys of other tokens than those it was given.
    """
    use = CacheUse({}, {}, seen=False)
    for run in _filling(model):
        with torch.no_grad(), recording(watched) as recorder:
            try:
                run(**inputs)
            except MISFIT as error:
                if is_out_of_memory(error):
                    raise
                continue
        use = CacheUse({path: tuple(made.values()) for path, made in recorder.writes.items()}, recorder.handed_on)
        if use.writes:
            break
    return use


def _filling(model: Any) -> Iterator[Callable[..., Any]]:
    """Ways to have a model fill a cache; some, mostly in older transformers, fill only what their `generate` makes."""
    yield functools.partial(model, **({"use_cache": True} if accepts(model, "use_cache") else {}))
    if model.can_generate():
        start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
        yield functools.partial(model.generate, max_new_tokens=1, do_sample=False, **start)


@dataclass(frozen=True)
class _Running:
    """A module at work: its name, the shapes it was given, and the caches of the model's own kind as they were."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    own: tuple[tuple[Any, Mapping[tuple[str, int], Any]], ...]

    def token_axis(self, keys: Tensor) -> int:
        tokens = (keys.shape[0], keys.shape[-2])
        for shape in self.shapes:
            if shape[:2] in (tokens, tokens[::-1]) and len(shape) > 2:
                return 1 if shape[:2] == tokens else 0
        raise UnsupportedModelError(
            f"{self.name} writes keys of {tokens[0]} x {tokens[1]} tokens to its cache, but was given {self.shapes}",
            fix="nothing is removed whose place in the cache cannot be kept; report the model's type and this message",
        )


class _Recorder:
    """Notes who is at work when something is written; of a cache of the model's own kind, what changed meanwhile."""

    def __init__(self) -> None:
        self.writes: dict[str, dict[tuple[Kind, int, int], Write]] = {}
        self.handed_on: dict[str, dict[int, Key]] = {}
        self.running: list[_Running] = []
        self.of_encoder: set[int] = set()

    def enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        self.of_encoder |= {id(c.cross_attention_cache) for c in given if isinstance(c, EncoderDecoderCache)}
        shapes = tuple(tuple(value.shape) for value in given if isinstance(value, Tensor))
        own = tuple((value, _held_by(value)) for value in given if _is_own_kind(value))
        self.running.append(_Running(name, shapes, own))

    def leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        module = self.running.pop()
        inputs = [(key, value) for key, value in (*kwargs.items(), *enumerate(args)) if _shapes(value)]
        self.handed_on[module.name] = {}
        for place, item in enumerate(output if isinstance(output, (tuple, list)) else ()):
            key = next((key for key, value in inputs if _hands_on(item, value)), None)
            if place and key is not None:
                self.handed_on[module.name][place] = key
        for cache, before in module.own:
            for (name, slot), mark in _held_by(cache).items():
                if mark == before.get((name, slot)):
                    continue
                held = [vars(cache)[name][slot]]
                if name == "key_cache":
                    self.note(module, "keys", slot, 0, [*held, cache.value_cache[slot]])
                else:
                    self.note(module, "state", slot, 0, held)

    def wrote(self, method: str, cache: Cache, given: Mapping[str, Any]) -> None:
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        kind: Kind = "state" if method != "update" else "cross" if id(cache) in self.of_encoder else "keys"
        for module in self.running:
            self.note(module, kind, given["layer_idx"], given.get("state_idx", 0), tensors)

    def note(self, module: _Running, kind: Kind, slot: int, state: int, tensors: list[Tensor]) -> None:
        """Note tensors of [sequences, heads, tokens, width], or of [sequences, ...] for a state."""
        shared = tensors[0].shape[0] * (1 if kind == "state" else tensors[0].shape[-2])
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) // max(1, shared)
        axis = module.token_axis(tensors[0]) if kind == "keys" else 1
        made = self.writes.setdefault(module.name, {})
        before = made.get((kind, slot, state), Write(kind, slot, state, axis, 0))
        made[kind, slot, state] = replace(before, size=before.size + size)


@contextlib.contextmanager
def recording(watched: Mapping[str, nn.Module]) -> Iterator[_Recorder]:
    """While the block runs, note what is written to caches while each of these modules is at work, by its name."""
    recorder = _Recorder()
    with contextlib.ExitStack() as undo:
        for name, module in watched.items():
            enter = functools.partial(recorder.enter, name)
            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(recorder.leave, with_kwargs=True).remove)
        for method in ("update", "update_conv_state", "update_recurrent_state"):
            if original := vars(Cache).get(method):  # the one place every cache class of transformers passes through
                undo.callback(setattr, Cache, method, original)
                setattr(Cache, method, _spied(original, functools.partial(recorder.wrote, method)))
        yield recorder


def _spied(original: Callable[..., Any], wrote: Callable[[Cache, Mapping[str, Any]], None]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Cache, *args: Any, **kwargs: Any) -> Any:
        wrote(self, signature.bind(self, *args, **kwargs).arguments)
        return original(self, *args, **kwargs)

    return method


def _shapes(value: Any) -> list[torch.Size]:
    """The shapes of a tensor, or of a tuple or list of tensors; empty for anything else."""
    items = value if isinstance(value, (tuple, list)) else [value]
    return [item.shape for item in items] if all(isinstance(item, Tensor) for item in items) else []


def _hands_on(item: Any, value: Any) -> bool:
    """Whether an output is this input, or the same set of states anew: without the module, they stay as they were."""
    containers = isinstance(item, (tuple, list)) and isinstance(value, (tuple, list))
    return item is value or (containers and _shapes(item) == _shapes(value) != [])


def _is_own_kind(value: Any) -> bool:
    """Whether this is a cache of a class of the model's own, as hybrid models of older transformers have."""
    return hasattr(value, "get_seq_length") and not isinstance(value, (Cache, EncoderDecoderCache))


def _held_by(cache: Any) -> dict[tuple[str, int], tuple[int, int] | None]:
    """What each place of each list in such a cache holds, values apart: tensors by identity and number of changes."""
    held: dict[tuple[str, int], tuple[int, int] | None] = {}
    for name, places in vars(cache).items():
        if isinstance(places, (list, dict)) and name != "value_cache":
            for slot, tensor in enumerate(places) if isinstance(places, list) else places.items():
                held[name, slot] = (id(tensor), tensor._version) if isinstance(tensor, Tensor) else None
    return held
