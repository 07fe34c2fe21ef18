"""Multiply-adds of a pass, counted as they are made, and what follows for the speed of a device that is not here.

A linear map of P weights takes 2 P operations per token; attention 2 (d_k + d_v) per head, query and key, masks not
taken off; the head counts where it works (the last position alone, where the model can do that), the embedding is a
look-up and takes none. Routed experts count where a token meets them. Norms, activations and rotations are left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import MISFIT
from blockpruner.anatomy.reading import grouped_flops
from blockpruner.blocks import Block
from blockpruner.errors import InputError
from blockpruner.evaluation.memory import Ledger, last_logits, random_inputs
from blockpruner.searching.costs import Card, Costs
from blockpruner.searching.targets import Speed

LENGTHS = (16, 32, 48)  # tokens, from which the law of growth is read


@torch.no_grad()
def counted(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Operations (two per multiply-add) of one pass over `inputs`, by module path, of the whole model by "".

    None where torch cannot count them. Cost: one pass.
    """
    aten = torch.ops.aten
    more = {aten._grouped_mm: grouped_flops, aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=more)
    try:
        with counter:
            model(**inputs, **last_logits(model))
    except (AssertionError, *MISFIT):  # the counter's own hooks do not bear every module's arguments
        return None
    name = type(model).__name__
    found = {path.removeprefix(f"{name}."): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {**found, "": counter.get_total_flops()}


def prefill_flops(model: PreTrainedModel, tokens: int) -> int | None:
    """Operations of one pass over one sequence of so many tokens, as it is now; None where they cannot be counted."""
    found = counted(model, random_inputs(model, 1, tokens))
    return None if found is None else found[""]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of [batch, heads, tokens, width]: each query with each key, then each weight with each value."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


@dataclass(frozen=True)
class Law:
    """Operations over `tokens` tokens of one sequence: once + each * tokens + pair * tokens^2."""

    once: float
    each: float
    pair: float

    def prefill(self, tokens: int) -> float:
        return self.once + self.each * tokens + self.pair * tokens**2

    def decode(self, context: int) -> float:
        """Of one more token, with so many in the cache: it meets each of them once, as a query."""
        return self.once + self.each + self.pair * context


def laws(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Law, dict[Block, Law]]:
    """The law of the whole model, and of each block; InputError where operations cannot be counted.

    Cost: three short passes. Exact where operations are a polynomial of the length, as in attention and linear maps.
    """
    counts = [counted(model, random_inputs(model, 1, tokens)) for tokens in LENGTHS]
    known = [count for count in counts if count is not None]
    if len(known) < len(LENGTHS):
        raise InputError(
            f"the operations of {type(model).__name__} cannot be counted", fix="leave out --device-spec, and measure"
        )

    def law(paths: Iterable[str]) -> Law:
        paths = tuple(paths)
        return _law([sum(count.get(path, 0) for path in paths) for count in known])

    return law([""]), {block: law([*part.modules, *part.idle]) for block, part in anatomy.parts.items()}


def _law(values: list[int]) -> Law:
    """Through three points."""
    a, b, c = LENGTHS
    first, second = (values[1] - values[0]) / (b - a), (values[2] - values[1]) / (c - b)
    pair = (second - first) / (c - a)
    each = first - pair * (a + b)
    return Law(values[0] - each * a - pair * a**2, each, pair)


def on_card(ledger: Ledger, card: Card, speed: Speed) -> Costs:
    """The time of the workload of `speed` on `card`, and what each block takes of it, in seconds.

    seconds = max(operations / card.flops, bytes / card.bandwidth) for each block and for the rest; bytes: weights,
    read once (of experts those that are met, at most), and while decoding the cache. What a card reaches in practice is
    less than both peaks; ratios suffer less from that than seconds do.
    """
    whole, blocks = laws(ledger.model, ledger.anatomy)
    dense, decodes = ledger.footprint(), speed.phase == "decode"
    passes = 1 if decodes else speed.context  # tokens of a sequence in one step

    def operations(law: Law) -> float:
        return speed.batch * (law.decode(speed.context) if decodes else law.prefill(speed.context))

    def seconds(law: Law, weights: int, cache: int) -> float:
        met = min(weights, law.each * speed.batch * passes / 2 * ledger.itemsize) if law.each else weights
        return max(operations(law) / card.flops, (met + decodes * cache) / card.bandwidth)

    each: dict[Block, float] = {}
    for block, law in blocks.items():
        left = ledger.footprint(frozenset([block]))
        cache = dense.cache(speed.context, speed.batch) - left.cache(speed.context, speed.batch)
        each[block] = seconds(law, dense.weights - left.weights, cache)
    head = ledger.model.get_output_embeddings()
    rest = Law(*(getattr(whole, k) - sum(getattr(law, k) for law in blocks.values()) for k in ("once", "each", "pair")))
    weights = sum(p.numel() for p in head.parameters()) * ledger.itemsize if head is not None else 0
    outside = max(operations(rest) / card.flops, weights / card.bandwidth)
    return Costs(sum(each.values()) + outside, each, {}, "seconds", f"computed for {card.name} ({card.source})")
