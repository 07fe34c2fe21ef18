"""What kind of block a branch is: seen in what it mixes, and named where behaviour cannot tell."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from blockpruner.anatomy.caches import CacheUse
from blockpruner.anatomy.probing import Key, SeenLayer, stood_in, turned_around
from blockpruner.blocks import Kind

# Modules whose kind neither behaviour nor a name tells, by the name of their class: one row teaches an architecture.
# None: no block, whatever its name says.
TAUGHT: dict[str, Kind | None] = {
    "DeepseekV4HyperConnection": None,  # mixes the parallel streams
    "Inkling2ShortConvolution": None,  # the last step of attention and of mlp
    "FunnelRelMultiheadAttention": "attention",  # queries and keys come as separate inputs, as in cross-attention
    "RwkvSelfAttention": "mixer",  # a recurrence
}

_ATTENTION = ("attn", "attention")
_OTHER_MIXER = (
    "linear_att",
    "linearatt",
    "lightning",
    "mamba",
    "conv",
    "recurrent",
    "deltanet",
    "delta_net",
    "fourier",
)
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "experts")


def kind_of(layer: SeenLayer, path: str, silent: Mapping[str, dict[str, Any]], use: CacheUse) -> tuple[Kind, str]:
    """The kind of the branch at `path`, and what decided it; `silent` has the stand-ins of all branches of the layer.

    A branch in which a token feels a change of the others mixes tokens; one in which it feels a change of another
    input, but at its own place, reads another sequence; any other works on each token for itself. Differences as small
    as rounding do not count: routed experts group tokens anew when one of them changes. What a mixing branch writes to
    a cache tells attention (keys of every token) from other mixers (a state), or else its name does. Names also
    overrule what is seen where it misleads: keys and values that were made elsewhere do not come with the stream, and
    a feed-forward network may look back one token, or share out experts among all.
    """
    classes = [type(layer.module.get_submodule(step)).__name__ for step in _steps(path)]
    for name in reversed(classes):
        if taught := TAUGHT.get(name):
            return taught, f"taught for {name}"
    words = _words(layer.module, path)
    as_attention, as_mlp = (any(word in words for word in known) for known in (_ATTENTION, _MLP))
    others = {p: spec for p, spec in silent.items() if p != path}
    with stood_in(layer.module, silent):
        nothing = layer.flows()
    with stood_in(layer.module, others):
        alone = layer.flows()
        rounding = (0.05 if layer.stream.dtype.itemsize < 4 else 1e-4) * float(_moved(layer, nothing, alone).max())
        around = turned_around(layer.stream, layer.token_axis, -1)  # the last token: it sees all where some see a part
        mixes = float(_moved(layer, alone, layer.flows(around))[-1]) > rounding
        reads = not mixes and _reads_another(layer, alone, rounding)
    if mixes:
        written = {write.kind for write in use.writes.get(f"{layer.path}.{path}", ())}
        if written & {"keys", "state"}:
            if "keys" in written:
                return "attention", "mixes tokens; keeps keys of every token"
            return "mixer", "mixes tokens; keeps a state"
        if any(word in words for word in _OTHER_MIXER):
            return "mixer", "mixes tokens; named as another mixer"
        if as_attention:
            return "attention", "mixes tokens; named attention"
        return ("mlp", "mixes tokens, yet named feed-forward") if as_mlp else ("mixer", "mixes tokens")
    if reads:
        return "cross_attention", "mixes tokens of another sequence"
    if as_attention and not as_mlp:
        return "attention", "named attention; its keys and values come from elsewhere"
    return "mlp", "each token for itself"


def named(module: nn.Module, path: str) -> bool:
    """Whether the name or the class of the module at `path` is that of a block."""
    words = _words(module, path)
    kind = TAUGHT.get(type(module.get_submodule(path)).__name__, "mlp")
    return kind is not None and any(word in words for word in (*_ATTENTION, *_OTHER_MIXER, *_MLP))


def _words(module: nn.Module, path: str) -> str:
    """Names and classes of the modules down to `path`, without what all classes of the architecture begin with."""
    classes = [type(module.get_submodule(step)).__name__ for step in _steps(path)]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(type(module).__name__, classes[0], strict=False))
    prefix = "".join(letter for letter, _ in same)
    return " ".join([path, *(name.removeprefix(prefix) for name in classes)]).lower()


def _steps(path: str) -> list[str]:
    return list(itertools.accumulate(path.split("."), "{}.{}".format))


def _reads_another(layer: SeenLayer, alone: Tensor, rounding: float) -> bool:
    """Whether a token feels a change of another input than the stream, at all places but its own."""
    batch = {size for axis, size in enumerate(layer.stream.shape[:-1]) if axis != layer.token_axis}
    for key, value in layer.call.inputs():
        if key == layer.hidden or not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
            continue
        changed: dict[Key, Any] = {key: turned_around(value, 1 if value.shape[0] in batch else 0, 0)}
        if float(_moved(layer, alone, layer.flows(changed=changed))[0]) > rounding:
            return True
    return False


def _moved(layer: SeenLayer, before: Tensor, after: Tensor) -> Tensor:
    """The largest change at each token."""
    return (before - after).float().abs().movedim(layer.token_axis, 0).flatten(1).amax(1)
