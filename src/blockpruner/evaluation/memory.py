"""What a model holds in memory: weights, and the cache by context and batch.

Bytes of the cache are counted from what each block writes in one short pass (`caches`), and measured in the cache
object after a real one. Sliding windows keep so many tokens and no more; a stand-in keeps two numbers per token in each
place that its block wrote to; states of convolutions and recurrences do not grow. Another dtype than that of the
model in memory can be counted: that of its files, which a pruned checkpoint keeps.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.anatomy.caches import CacheUse, cache_use
from blockpruner.anatomy.parts import Anatomy, Part, Spec
from blockpruner.anatomy.probing import accepts, example_inputs, vocabulary_size
from blockpruner.blocks import Block, Mask
from blockpruner.importance.block_weights import holdings
from blockpruner.searching.costs import Costs
from blockpruner.standin import StandIn

MOST_TOKENS = 2**30  # nobody's context is longer


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model at work. grows: (bytes per token, most tokens or None) of each place; fixed: per sequence."""

    weights: int
    grows: tuple[tuple[int, int | None], ...]
    fixed: int

    def cache(self, context: int, batch: int = 1) -> int:
        """Bytes that the cache holds after `context` tokens of `batch` sequences (of the encoder's, as many more)."""
        kept = sum(size * (context if most is None else min(context, most)) for size, most in self.grows)
        return batch * (kept + self.fixed)

    def total(self, context: int, batch: int = 1) -> int:
        return self.weights + self.cache(context, batch)

    def largest_batch(self, limit: int, context: int) -> int | None:
        """How many sequences of `context` tokens fit into `limit` bytes; None where they take nothing."""
        each = self.cache(context)
        return max(0, limit - self.weights) // each if each else None

    def largest_context(self, limit: int, batch: int = 1, longest: int | None = None) -> int | None:
        """The longest context of `batch` sequences that fits into `limit` bytes, 0 if none does; None: no limit.

        longest: that the model can read, beyond which nothing is looked at; None where it is not known.
        """
        low, high = 0, MOST_TOKENS if longest is None else longest
        if self.total(high, batch) <= limit:
            return longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle, batch) <= limit else (low, middle)
        return low


@dataclass(frozen=True)
class Ledger:
    """What a model and each of its blocks hold, so that the footprint without any mask is known. See `read_ledger`.

    windows, states: per slot of the cache the most tokens it keeps, and the bytes of its states per sequence.
    dtype: that is counted; None: that of the model, as it is in memory.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    use: CacheUse
    windows: Mapping[int, int | None] = field(default_factory=dict[int, int | None])
    states: Mapping[int, int] = field(default_factory=dict[int, int])
    dtype: torch.dtype | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of a number, as it is counted."""
        return (self.dtype or self.model.dtype).itemsize

    def footprint(self, mask: Mask = frozenset()) -> Footprint:
        """The bytes of the model without `mask`: its stand-ins, as in memory or in a checkpoint that has them."""
        specs = [spec for spec in self.anatomy.stand_ins(mask).values() if not spec.get("keep")]
        number = self.itemsize
        gone = [part for block, part in self.anatomy.parts.items() if block in mask and not part.kept]
        missing = {path for part in gone for path in _paths(part)}
        grows, fixed = self._held(path for path in self._places if path not in missing)
        specs += self._earlier
        grows += [(2 * number, self.windows.get(slot)) for spec in specs for slot in spec.get("cache") or ()]
        fixed += sum(number for spec in specs for _ in spec.get("states", ()))
        left = self._weights - sum(size for blocks, size in self._leaving if blocks <= mask)
        return Footprint(left, tuple(grows), fixed)

    def costs(self, context: int, batch: int) -> Costs:
        """The same as a sum over blocks, for targets: weights, and a cache of `batch` sequences of `context` tokens."""

        def total(*gone: Block) -> int:
            return self.footprint(frozenset(gone)).total(context, batch)

        whole = total()
        each = {block: whole - total(block) for block in self.anatomy.parts}
        layers = {key: whole - total(*b) - sum(map(each.__getitem__, b)) for key, b in self._layers.items()}
        shared = {key: float(saved) for key, saved in layers.items() if saved}
        named = str(self.dtype or self.model.dtype).removeprefix("torch.")
        kept = "as in the files" if self.dtype else "as in memory"
        source = f"counted: weights and what each block caches, in {named}, {kept}"
        return Costs(float(whole), {block: float(saved) for block, saved in each.items()}, shared, "bytes", source)

    def held(self, block: Block) -> tuple[tuple[tuple[int, int | None], ...], int]:
        """What this block holds of each sequence, as in a footprint."""
        grows, fixed = self._held(_paths(self.anatomy.parts[block]))
        return tuple(grows), fixed

    @cached_property
    def _layers(self) -> dict[tuple[str, int], tuple[Block, ...]]:
        return {key: blocks for key, blocks in self.anatomy.outline.layers().items() if len(blocks) > 1}

    @cached_property
    def _places(self) -> list[str]:
        return [path for part in self.anatomy.parts.values() for path in _paths(part)]

    @cached_property
    def _earlier(self) -> list[Spec]:
        """The stand-ins of an earlier pruning, which write to the cache too."""
        found: list[Any] = [module for module in self.model.modules() if type(module).__name__ == StandIn.__name__]
        return [module.spec for module in found]

    @cached_property
    def _weights(self) -> int:
        return weights_bytes(self.model) + sum(
            self._sizes[name] - p.nbytes for name, p in self.model.named_parameters()
        )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of each parameter. Some are in float32 beside others in 16 bits: those that transformers leaves so."""
        model: Any = self.model
        narrow = (["_strict"] if self.itemsize == 2 else []) + ([""] if self.dtype == torch.float16 else [])
        wide = [word for end in narrow for word in getattr(model, f"_keep_in_fp32_modules{end}", None) or ()]

        def size(name: str, p: Tensor) -> int:
            kept = self.dtype is None or p.dtype != model.dtype or any(word in name for word in wide)
            return p.nbytes if kept else p.numel() * self.itemsize

        return {name: size(name, p) for name, p in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _leaving(self) -> list[tuple[Mask, int]]:
        """What leaves with which blocks, in bytes."""
        held = [
            (held.blocks, sum(map(self._sizes.__getitem__, held.names))) for held in holdings(self.model, self.anatomy)
        ]
        parts = [part for part in self.anatomy.parts.values() if not part.kept]
        modules = [(part.block, self.model.get_submodule(path)) for part in parts for path in _paths(part)]
        return held + [(frozenset([block]), buffer.nbytes) for block, one in modules for buffer in one.buffers()]

    def _held(self, paths: Iterable[str]) -> tuple[list[tuple[int, int | None]], int]:
        made = [write for path in paths for write in self.use.writes.get(path, ())]
        ratio = Fraction(self.itemsize, self.model.dtype.itemsize)
        grows = [
            (int(w.size * ratio), self.windows.get(w.slot) if w.kind == "keys" else None)
            for w in made
            if w.kind != "state"
        ]
        slots = {write.slot: int(write.size * max(1, ratio)) for write in made if write.kind == "state"}
        return grows, sum(self.states.get(slot, size) for slot, size in slots.items())


def read_ledger(model: PreTrainedModel, anatomy: Anatomy, dtype: torch.dtype | None = None) -> Ledger:
    """What each block of `model` holds, in its own dtype or in `dtype`. Cost: two or three passes of 2 x 16 tokens.

    In a narrower one the states of recurrences are counted as wide as they are here: most models keep them in float32.
    """
    inputs = example_inputs(model)
    watched = {path: model.get_submodule(path) for part in anatomy.parts.values() for path in _paths(part)}
    use = cache_use(model, watched, inputs)
    cache = filled_cache(model, inputs) if use.writes else None
    layers = list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))
    windows = {slot: _most(layer) for slot, layer in enumerate(layers)}
    number, batch = (dtype or model.dtype).itemsize, len(inputs["input_ids"])

    def state_bytes(layer: Any) -> int:
        conv, recurrent = (held_tensors([getattr(layer, f"{kind}_states", None)]) for kind in ("conv", "recurrent"))
        narrow = sum(t.numel() * (number if t.dtype == model.dtype else t.element_size()) for t in conv)
        return (narrow + sum(t.numel() * max(number, t.element_size()) for t in recurrent)) // batch

    states = {slot: state_bytes(layer) for slot, layer in enumerate(layers)}
    return Ledger(model, anatomy, use, windows, states, dtype)


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def random_inputs(model: PreTrainedModel, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids for one pass; for an encoder-decoder as many for the decoder."""
    generator = torch.Generator().manual_seed(seed)
    rows = vocabulary_size(model)
    ids = torch.randint(rows // 8, rows, (batch, tokens), generator=generator).to(model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """What has the head work on the last position alone, as when text is generated; nothing where it cannot."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def filled_cache(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The cache after `model` read `inputs`, made as it makes its own; None where it has none."""
    output = model(**inputs, **({"use_cache": True} if accepts(model, "use_cache") else {}), **last_logits(model))
    found = getattr(output, "past_key_values", None)
    found = getattr(output, "cache_params", None) if found is None else found
    if found is not None or not model.can_generate():
        return found
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    made = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **start)
    return getattr(made, "past_key_values", None)


def held_bytes(cache: Any) -> int:
    """Bytes of all keys, values and states in a cache, each tensor once; views count as what they show."""
    return sum(tensor.numel() * tensor.element_size() for tensor in held_tensors(cache))


def held_tensors(cache: Any) -> list[Tensor]:
    """All keys, values and states in a cache, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.ndim > 1:
                found[id(value)] = value
        elif isinstance(value, (list, tuple, dict)) or hasattr(value, "__dict__"):
            if id(value) in seen or callable(value):
                return
            seen.add(id(value))
            inner = value if isinstance(value, (list, tuple)) else value if isinstance(value, dict) else vars(value)
            for item in inner.values() if isinstance(inner, dict) else inner:
                look(item)

    look(cache)
    return list(found.values())


def _most(layer: Any) -> int | None:
    """How many tokens a place of the cache keeps for the next step; transformers keeps one less than the window."""
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    return None if window is None else max(1, window - 1)


def _paths(part: Part) -> list[str]:
    return [*part.modules, *part.idle]
