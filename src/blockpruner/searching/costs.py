"""What the blocks of a model cost, as data: bytes held, or seconds taken; and sizes as people write them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from blockpruner.artifacts import Artifact, Record
from blockpruner.blocks import Block, Mask, Outline
from blockpruner.errors import InputError

_UNITS = {
    f"{prefix}{i}B": (1024 if i else 1000) ** power
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))
    for i in ("i", "")
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)([KMGT]i?B|B)", re.ASCII)


@dataclass(frozen=True)
class Costs:
    """A cost that adds up: cost(mask) = whole - sum of each[b], b gone - sum of shared[l], l a layer all gone.

    unit: of all numbers; source: where they come from, in words. Blocks that are not in `each` save nothing.
    """

    whole: float
    each: Mapping[Block, float]
    shared: Mapping[tuple[str, int], float]
    unit: str
    source: str

    def saved(self, outline: Outline, mask: Mask) -> float:
        """What `mask` takes off."""
        layers = outline.layers()
        emptied = sum(value for key, value in self.shared.items() if mask.issuperset(layers[key]))
        return sum(self.each.get(block, 0.0) for block in sorted(mask, key=lambda b: b.order)) + emptied

    def left(self, outline: Outline, mask: Mask) -> float:
        """The cost of the model without `mask`."""
        return self.whole - self.saved(outline, mask)


class CostRecord(Record):
    """`Costs` as JSON; blocks by their text, layers as `stack.number` or `number`."""

    whole: float
    each: dict[str, float]
    shared: dict[str, float]
    unit: str
    source: str

    @classmethod
    def of(cls, costs: Costs) -> Self:
        return cls(
            whole=costs.whole,
            each={str(block): value for block, value in costs.each.items()},
            shared={f"{stack}.{number}".lstrip("."): value for (stack, number), value in costs.shared.items()},
            unit=costs.unit,
            source=costs.source,
        )

    def costs(self) -> Costs:
        layers = {name.rpartition(".")[::2]: value for name, value in self.shared.items()}
        return Costs(
            self.whole,
            {Block.parse(name): value for name, value in self.each.items()},
            {(stack, int(number)): value for (stack, number), value in layers.items()},
            self.unit,
            self.source,
        )


class CostTable(Artifact):
    """The costs that a search went by, by workload (`decode,batch=1,context=512`), so that it resumes with the same.

    model: fingerprint; dtype and device: where they hold.
    """

    FORMAT: ClassVar[str] = "blockpruner.costs"
    VERSION: ClassVar[int] = 1

    model: str
    dtype: str
    device: str
    workloads: dict[str, CostRecord]

    @classmethod
    def of(cls, model: str, dtype: str, device: str, costs: Mapping[str, Costs]) -> Self:
        records = {workload: CostRecord.of(one) for workload, one in costs.items()}
        return cls(format=cls.FORMAT, version=cls.VERSION, model=model, dtype=dtype, device=device, workloads=records)


def parse_bytes(text: str) -> int:
    """`16GiB`, `1.5GB`, `300B` -> bytes; InputError for anything else, and for none at all."""
    found = _SIZE.fullmatch(text.strip())
    size = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2], 1))
    if size < 1:
        raise InputError(f"{text!r} is no size", fix="give one as in 16GiB, 500MB or 1.5GB")
    return size


def format_bytes(size: int) -> str:
    """The shortest text that `parse_bytes` reads back as `size`, in a binary unit where it is the same length."""
    texts = [f"{size // unit}{name}" for name, unit in _UNITS.items() if size % unit == 0 and size >= unit]
    return min([*texts, f"{size}B"], key=len)


def readable_bytes(size: float) -> str:
    """About so many bytes, for people: `1.53 GiB`."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[name]:
            return f"{size / _UNITS[name]:.4g} {name}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class Card:
    """A device by its peaks. bandwidth: bytes per second; flops: operations per second of dense products in 16 bits."""

    name: str
    bandwidth: float
    flops: float
    source: str


CARDS = {
    "l4": Card("NVIDIA L4", 300e9, 121e12, "NVIDIA's data sheet, bfloat16 without sparsity"),
    "l40s": Card("NVIDIA L40S", 864e9, 362e12, "NVIDIA's data sheet, bfloat16 without sparsity"),
    "a100": Card("NVIDIA A100 80GB SXM", 2039e9, 312e12, "NVIDIA's data sheet, bfloat16 without sparsity"),
    "h100": Card("NVIDIA H100 SXM", 3350e9, 989e12, "NVIDIA's data sheet, bfloat16 without sparsity"),
}


def parse_card(text: str) -> Card:
    """A card by name, or `bandwidth=900GB/s,flops=120TFLOPS`; InputError lists the names."""
    if text.lower() in CARDS:
        return CARDS[text.lower()]
    found = re.fullmatch(r"bandwidth=([\d.]+[KMGT]B)(?:/s)?,flops=(\d+(?:\.\d+)?)T(?:FLOPS)?", text.strip(), re.ASCII)
    if found is None or float(found[2]) == 0:
        raise InputError(
            f"{text!r} is not a device that is known here",
            fix=f"give {', '.join(CARDS)}, or its peaks: bandwidth=900GB/s,flops=120TFLOPS",
        )
    return Card(text.strip(), float(parse_bytes(found[1])), float(found[2]) * 1e12, "as given")
