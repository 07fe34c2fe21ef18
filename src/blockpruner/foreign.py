"""Removals that other projects wrote down, read as moves in the order they were taken, as far as that is known.

BlockPruner, `*_del_order_list.json`: for each k the set of the first k blocks. LLM-Drop: `config.json` with
`drop_attn_list` and `drop_mlp_list`, or the `reserved_layers.json` of its first stage, which names what is kept.
Where a file tells which blocks go but not in what order, they become one move.
"""

import itertools
import math
import re
from typing import Any

from blockpruner.blocks import Block, Kind, Mask, Move, Outline
from blockpruner.errors import InputError

_KINDS: dict[str, Kind] = {"mha": "attention", "mlp": "mlp"}


def read_moves(value: Any, source: str, outline: Outline | None = None) -> tuple[Move, ...]:
    """The moves in the JSON `value` of another project; `source` names the file in errors.

    outline: of the model, needed where a file names what is kept. InputError if the form is not known.
    """
    if isinstance(value, dict) and not value.keys().isdisjoint({"drop_attn_list", "drop_mlp_list"}):
        moves = _drop_lists(value, source)
    elif isinstance(value, dict) and value and all(re.fullmatch("[0-9]{1,6}", key) for key in value):
        moves = _nested_sets(value, source)
    elif isinstance(value, list) and value and isinstance(value[0], int):
        moves = _reserved(value, source, outline)
    else:
        raise InputError(
            f"{source} is neither a plan nor a removal list of BlockPruner or LLM-Drop",
            fix="give a plan.json, a *_del_order_list.json, or a config.json with drop_attn_list or drop_mlp_list",
        )
    if not moves:
        raise InputError(f"{source} removes nothing", fix="give the file of a search that removed something")
    return moves


def _nested_sets(value: dict[str, Any], source: str) -> tuple[Move, ...]:
    """BlockPruner sorts each set by layer; the order of removal is what each k adds to the one before."""
    moves: list[Move] = []
    before: Mask = frozenset()
    for k in sorted(value, key=int):
        entries = value[k] if isinstance(value[k], list) else [value[k]]
        now = frozenset(_unit(entry, f"{source}: {k}") for entry in entries)
        if not before <= now:
            lost = ", ".join(str(block) for block in before - now)
            raise InputError(f"{source}: {k} puts back {lost}", fix="give a list in which every set holds the last one")
        if now != before:
            moves.append(Move(now - before))
        before = now
    return tuple(moves)


def _unit(entry: object, where: str) -> Block:
    match entry:
        case [str(kind), int(layer)] if kind in _KINDS and type(layer) is int and layer >= 0:
            return Block(_KINDS[kind], layer)
    raise InputError(f'{where}: {entry!r} is not ["mha" or "mlp", layer]', fix="mend that entry")


def _drop_lists(config: dict[str, Any], source: str) -> tuple[Move, ...]:
    """A list that does not ascend is in the order of removal, most redundant first; one that does comes from a set.

    Equal lists drop whole layers; between two different ones no order is known.
    """
    depth = config.get("num_hidden_layers")
    attention, mlp = (_dropped(config, key, depth, source) for key in ("drop_attn_list", "drop_mlp_list"))
    blocks = [Block("attention", layer) for layer in attention] + [Block("mlp", layer) for layer in mlp]
    if not blocks:
        return ()
    order = attention or mlp
    if (attention and mlp and attention != mlp) or order == sorted(order):
        return (Move.of(*blocks),)
    return tuple(Move.of(*(block for block in blocks if block.layer == layer)) for layer in order)


def _dropped(config: dict[str, Any], key: str, depth: object, source: str) -> list[int]:
    """The layers in a list of indices, or of one boolean per layer."""
    value = config.get(key) or []
    limit = depth if type(depth) is int else math.inf
    if isinstance(value, list) and value and all(type(entry) is bool for entry in value) and len(value) <= limit:
        return list(itertools.compress(itertools.count(), value))
    return _indices(value, limit, f"{source}: {key}")


def _reserved(value: list[Any], source: str, outline: Outline | None) -> tuple[Move, ...]:
    """A joint drop counts attention 0..L-1, then mlps L..2L-1; other drops do not say what they dropped."""
    if outline is None:
        raise InputError(f"{source} names what is kept, not what goes", fix="read it together with its model")
    depth = len(outline.layers())
    kept = _indices(value, 2 * depth, source)
    if max(kept) < depth:
        raise InputError(
            f"{source} keeps layers {min(kept)} to {max(kept)}, but does not say of what: attention, mlps, or both",
            fix="give the config.json that LLM-Drop's post_dropping writes beside it",
        )
    gone = sorted(set(range(2 * depth)) - set(kept))
    blocks = [Block("attention", i) if i < depth else Block("mlp", i - depth) for i in gone]
    return (Move.of(*blocks),) if blocks else ()


def _indices(value: Any, limit: float, where: str) -> list[int]:
    valid = isinstance(value, list) and all(type(entry) is int and 0 <= entry < limit for entry in value)
    if not valid or len(set(value)) != len(value):
        raise InputError(f"{where} is not a list of different layers of the model", fix="mend that list")
    return value
