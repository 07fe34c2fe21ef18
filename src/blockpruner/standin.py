"""What takes a removed block's place; self-contained: this file ships beside the weights of pruned checkpoints.

A stand-in returns what the removed module would have returned had its weights been zero: zeros, or one of its own
inputs where the module added the residual itself. It owns no parameters, unless a recovery gave it a *replacement*:
a vector, a linear map or a small MLP of what reaches its place, which it adds where the block's update was. It also
keeps the key/value cache honest: transformers reads lengths and mask sizes from one representative cache slot, so a
slot that is never written makes positions restart at 0, silently. A stand-in writes ones of one head and one dimension
there for the tokens it has seen (two numbers per token), or ones of the slot's own shape where it has one already.

`config.json` of such a checkpoint has a model type that stock transformers does not know, so that nothing can load
it by accident and fill the missing tensors with random numbers. It loads after `import blockpruner`, or with
`trust_remote_code=True`, which runs this file. What differs between versions of transformers is dealt with here alone.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.auto import configuration_auto, modeling_auto

MODEL_TYPE = "blockpruner"
FORMAT_VERSION = 1
REPLACING_VERSION = 2  # of checkpoints with replacements, which what reads only the first would leave out
NORMS = ("none", "rms", "layer")
_PREFIX = "Blockpruner"  # of the names of pruned classes
# Stands in config.json as the number of a label: it is none, so that a stock class which is given such a folder
# directly stops with this text. Else it would fill the missing tensors with random numbers, and only warn.
_REFUSAL = "blocks are missing here: use an Auto class, with `import blockpruner` before it or trust_remote_code=True"


class Replacement(nn.Module):
    """Something small in place of a removed block, token by token: [..., inputs] -> [..., outputs].

    kind "bias": b for every token; "linear": x A + b at full rank (rank 0), (x U) V + b at a lower one; "mlp": a linear
    map of x and, of n, which is x behind the norm, an MLP: x A + b + (act(n G + g) * (n U + u)) D, whose neurons `rank`
    counts. norm: what x goes through first (in an MLP n alone): "none", "rms" (divided by its root mean square) or
    "layer" (its mean taken off before that), eps as in the model's own norms; a gain behind it would be part of the
    map; act: by the names of transformers. `spec` is plain JSON; all parameters start at zero.
    """

    def __init__(
        self, kind: str, inputs: int, outputs: int, rank: int = 0, norm: str = "none", eps: float = 1e-6, act: str = ""
    ) -> None:
        super().__init__()
        sized = {"bias": rank == 0, "linear": rank >= 0, "mlp": rank > 0}.get(kind) and min(inputs, outputs) >= 0
        if not sized or norm not in NORMS or (act in ACT2FN) != (kind == "mlp"):
            raise ValueError(f"no replacement is {kind!r} from {inputs} to {outputs} with {rank=}, {norm=} and {act=}")
        self.kind, self.inputs, self.outputs, self.rank = kind, inputs, outputs, rank
        self.norm, self.eps, self.act = norm, eps, act
        self.bias = nn.Parameter(torch.zeros(outputs))
        if kind == "mlp":
            self.gate, self.up = (nn.Parameter(torch.zeros(inputs, rank)) for _ in range(2))
            self.gate_bias, self.up_bias = (nn.Parameter(torch.zeros(rank)) for _ in range(2))
            self.down = nn.Parameter(torch.zeros(rank, outputs))
        elif rank:
            self.down, self.up = nn.Parameter(torch.zeros(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))
        if kind == "mlp" or (kind == "linear" and not rank):
            self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    @property
    def spec(self) -> dict[str, Any]:
        told = {key: getattr(self, key) for key in ("kind", "inputs", "outputs", "rank", "norm", "eps")}
        return told | ({"act": self.act} if self.act else {})

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind == "bias":
            return self.bias.to(hidden.dtype).expand(*hidden.shape[:-1], self.outputs).clone()  # may be added to
        given = normed(hidden, self.norm, self.eps).to(self.bias.dtype)
        if self.kind == "mlp":
            inner = ACT2FN[self.act](given @ self.gate + self.gate_bias) * (given @ self.up + self.up_bias)
            mapped = hidden.to(self.bias.dtype) @ self.weight + inner @ self.down
        else:
            mapped = given @ self.down @ self.up if self.rank else given @ self.weight
        return (mapped + self.bias).to(hidden.dtype)


def normed(hidden: Tensor, norm: str, eps: float) -> Tensor:
    """`hidden` [..., width] at root mean square one, in float32 at least; as it is where `norm` is "none"."""
    if norm == "none":
        return hidden
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class StandIn(nn.Module):
    """Returns zeros or an input, in the structure the removed module returned; `spec` is plain JSON.

    spec["output"]: "zeros", "input", {"given": key} (another input, handed on), None, {"tuple": [...]} or
    {"list": [...]} of these;
    spec["input"]: position or name of the input that gives shape, dtype and device, and is what "input" returns;
    spec["width"]: last dimension of the zeros; spec["flat"]: they are a list of the tokens of all sequences;
    spec["cache"]: the cache slots that the module wrote keys and values to, None where that could not be seen;
    spec["states"]: pairs of a slot and the number of a state in it that it wrote;
    spec["token_axis"]: dimension of the input that counts tokens, if not 1;
    spec["replacement"]: the `Replacement` of that input that is added, by its own spec.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.replacement: nn.Module | None = Replacement(**spec["replacement"]) if "replacement" in spec else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        key = self.spec["input"]
        hidden = args[key] if isinstance(key, int) else kwargs[key]
        _write_ghosts(self.spec, hidden, args, kwargs)
        return self._fill(self.spec["output"], hidden, args, kwargs)

    def _fill(self, template: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if template == "zeros":
            shape = (hidden.shape[:-1].numel(),) if self.spec.get("flat") else hidden.shape[:-1]
            shape = (*shape, self.spec.get("width") or hidden.shape[-1])
            return hidden.new_zeros(shape) if self.replacement is None else self.replacement(hidden).reshape(shape)
        if template == "input":
            return hidden if self.replacement is None else hidden + self.replacement(hidden)
        if template is None:
            return None
        ((container, items),) = template.items()
        if container == "given":
            return dict(enumerate(args), **kwargs).get(items)
        filled = [self._fill(item, hidden, args, kwargs) for item in items]
        return tuple(filled) if container == "tuple" else filled

    def extra_repr(self) -> str:
        return str(self.spec["output"])


def _write_ghosts(spec: dict[str, Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write to the cache among the arguments, if there is one, ones in each place where the removed module wrote.

    Nobody reads them: what others look at is how many there are. Those of an encoder's tokens have no such reader.
    """
    cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None:
        return
    if (slots := spec.get("cache", ())) is None:
        raise NotImplementedError(
            "when blocks were removed, this model did not work with a cache, so what they wrote there is not known; "
            "generate with use_cache=False"
        )
    tokens = hidden if spec.get("token_axis", 1) else hidden.transpose(0, 1)
    for slot in slots:
        _write_keys(cache, slot, tokens, kwargs.get("cache_position"))
    for slot, state in spec.get("states", ()):
        _write_state(cache, slot, state, tokens)


def _write_keys(cache: Any, index: int, hidden: Tensor, positions: Tensor | None) -> None:
    """Write keys and values for the tokens of `hidden`, [sequences, tokens, ...], into slot `index`.

    Static caches of older transformers count the entries that are not zero, and are told the positions to write to.
    """
    slots = getattr(cache, "layers", ())  # some hybrid models of older transformers have a cache class of their own
    slot = slots[index] if index < len(slots) else None
    if slot is not None and not isinstance(slot, (DynamicLayer, StaticLayer)):
        raise TypeError(
            f"{type(slot).__name__} holds no keys and values, but a removed attention block has to write there"
        )
    if "Quantized" in type(slot).__name__:
        raise NotImplementedError(
            f"a model with removed attention blocks cannot use a quantized cache ({type(slot).__name__}); "
            "use the default cache, or cache_implementation='static' or 'offloaded'"
        )
    keys, values = (_ghost(getattr(slot, name, None), hidden) for name in ("keys", "values"))
    cache.update(keys, values, index, *([] if positions is None else [{"cache_position": positions}]))


def _ghost(held: Any, hidden: Tensor) -> Tensor:
    """Ones for the tokens of `hidden`, with the heads and the width that the slot holds already, else one and one."""
    heads, width, dtype = 1, 1, hidden.dtype
    if isinstance(held, Tensor) and held.ndim == 4 and held.shape[1] * held.shape[3] > 0:
        heads, width, dtype = held.shape[1], held.shape[3], held.dtype
    return torch.ones(hidden.shape[0], heads, hidden.shape[1], width, dtype=dtype, device=hidden.device)


def _write_state(cache: Any, index: int, state: int, hidden: Tensor) -> None:
    """Write a convolution's state of one channel into slot `index`: it is by these that a cache knows of a past.

    A cache that may be told to forget tokens keeps one entry for each, else the last one.
    """
    ghost = torch.ones(hidden.shape[0], 1, 1, dtype=hidden.dtype, device=hidden.device)
    if not hasattr(cache, "layers"):  # a class of the model's own, as above: lists with a place per slot
        for name, places in vars(cache).items():
            if isinstance(places, list) and name not in ("key_cache", "value_cache") and places[index:][:1] == [None]:
                places[index] = ghost
        return
    slot = cache.layers[index]
    held = slot.conv_states[state] if isinstance(slot.conv_states, dict) else slot.conv_states  # dict: newer ones
    tokens = hidden.shape[1] if getattr(slot, "record_past", False) else 1
    cache.update_conv_state(ghost.expand(-1, 1 if held is None else held.shape[1], tokens), index, state_idx=state)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` at `path` below `root`; returns what was there."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    old = parent._modules[name]
    if old is None:
        raise KeyError(path)
    parent._modules[name] = module
    return old


def stand_in_for(old: nn.Module, spec: dict[str, Any], of: type[StandIn] = StandIn) -> StandIn:
    """A stand-in that also answers to what others read from `old`: numbers, flags, names, unsaved buffers."""
    new = of(spec)
    for name in old._non_persistent_buffers_set:
        new.register_buffer(name, old._buffers[name], persistent=False)
    for name, value in vars(old).items():
        if type(value) in (int, float, bool, str) and not name.startswith("_"):
            setattr(new, name, value)
    new.train(old.training)
    return new


def muffle(module: nn.Module, spec: dict[str, Any]) -> RemovableHandle:
    """Have `module` stay and work for whoever reads what else it makes, but return zeros or its input."""
    return module.register_forward_hook(functools.partial(_muffled, spec), with_kwargs=True)


def _muffled(spec: dict[str, Any], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    main = spec["output"] if isinstance(spec["output"], str) else next(iter(spec["output"].values()))[0]
    first = output if isinstance(output, Tensor) else output[0]
    silent = torch.zeros_like(first) if main == "zeros" else dict(enumerate(args), **kwargs)[spec["input"]]
    return silent if isinstance(output, Tensor) else type(output)([silent, *output[1:]])


def place(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Put a stand-in at every path of `modules` (path -> spec), for good; spec["keep"]: the module stays, muffled."""
    for path, spec in modules.items():
        if spec.get("keep"):
            muffle(model.get_submodule(path), spec)
        else:
            replace_module(model, path, stand_in_for(model.get_submodule(path), spec))


def unpruned(kind: type) -> type:
    """The class of transformers behind a pruned model's or configuration's class; any other class itself."""
    return getattr(kind, "_unpruned", kind)


def adopt(model: PreTrainedModel, removed: list[str], modules: dict[str, dict[str, Any]]) -> None:
    """Mark `model`, whose stand-ins are in place, so that `save_pretrained` writes a checkpoint that knows of them.

    removed: block names, for people; modules: path -> spec. A second call adds to the first. The model gets a
    configuration of its own, since other models may hold the one it had.
    """
    config, base_config = copy.copy(model.config), unpruned(type(model.config))
    earlier = getattr(config, MODEL_TYPE, None) or {"removed": [], "modules": {}}
    still = {at: spec for at, spec in earlier["modules"].items() if not any(at.startswith(f"{p}.") for p in modules)}
    together = {**still, **modules}
    record = {
        "format_version": REPLACING_VERSION if any("replacement" in s for s in together.values()) else FORMAT_VERSION,
        "base_model_type": base_config.model_type,
        "removed": [*earlier["removed"], *removed],
        "modules": together,
    }
    config.__class__ = pruned_config_class(base_config)
    setattr(config, MODEL_TYPE, record)
    for held in [vars(module) for module in model.modules() if vars(module).get("config") is model.config]:
        held["config"] = config
    model.__class__ = pruned_model_class(unpruned(type(model)), base_config)
    _register(base_config)


@functools.cache
def pruned_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of `base` that says on disk, and only there, that it is not `base`."""

    class PrunedConfig(base):  # type: ignore[misc, valid-type]
        _unpruned = base
        _auto_class: ClassVar[str | None] = "AutoConfig"  # has transformers ship this file beside every config.json

        def to_json_string(self, use_diff: bool = True) -> str:
            plain = json.loads(super().to_json_string(use_diff))
            return json.dumps(_locked(plain) if MODEL_TYPE in plain else plain, indent=2, sort_keys=True) + "\n"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return super().from_dict(_unlocked(config_dict), **kwargs)

    PrunedConfig.__name__ = PrunedConfig.__qualname__ = _PREFIX + base.__name__
    return PrunedConfig


@functools.cache
def pruned_model_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The subclass of `base`, made of `config`, that puts the stand-ins in place when it is made."""

    class PrunedModel(base):  # type: ignore[misc, valid-type]
        _unpruned = base
        config_class = pruned_config_class(config)

        @classmethod
        def is_custom_code(cls) -> bool:
            return False  # else transformers leaves buffers that are not saved as they come from the memory

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            # As in every checkpoint, paths are those of the model that was saved: with a head, or without one.
            inner = f"{base.base_model_prefix}."
            outer = inner if hasattr(self, base.base_model_prefix) else ""
            specs = getattr(config, MODEL_TYPE)["modules"]
            place(self, {outer + path.removeprefix(inner): spec for path, spec in specs.items()})

    # transformers reads both out of the file of a class: by this one, experts would be computed one by one.
    for told in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        setattr(PrunedModel, told, getattr(base, told))
    PrunedModel.__name__ = PrunedModel.__qualname__ = _PREFIX + base.__name__
    return PrunedModel


def __getattr__(name: str) -> type:
    """The class of a pruned model or configuration, made when asked for by name, as unpickling does."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, PreTrainedConfig):
        return pruned_config_class(base)
    return pruned_model_class(base, base.config_class)


def _locked(plain: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it is written to disk: with a model type and a label that stock transformers refuses."""
    names = [_PREFIX + name.removeprefix(_PREFIX) for name in plain.get("architectures") or ()]
    home = {"AutoConfig": f"{Path(__file__).stem}.{BlockprunerConfig.__name__}"}
    # AutoTokenizer, which needs no model, falls back on a class of no type; that class reads the part of no type.
    record = {**plain[MODEL_TYPE], "model_type": ""}
    own = {MODEL_TYPE: record, "model_type": MODEL_TYPE, "architectures": names, "auto_map": home}
    return _each_config(plain, lambda labels: {_REFUSAL: "", **labels}) | own


def _unlocked(written: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_locked`; ValueError if the file is of a format that is not known here."""
    if written.get("model_type") != MODEL_TYPE:
        return written
    record, known = written.get(MODEL_TYPE) or {}, (FORMAT_VERSION, REPLACING_VERSION)
    found = record.get("format_version") if isinstance(record, dict) else None
    if found not in known:
        raise ValueError(
            f"config.json does not describe removed blocks in format {' or '.join(map(str, known))} (found: {found}); "
            "upgrade blockpruner, or prune the model again"
        )
    plain = _each_config(written, lambda labels: {key: name for key, name in labels.items() if key.isdecimal()})
    names = [name.removeprefix(_PREFIX) for name in written.get("architectures") or ()]
    record = {key: value for key, value in record.items() if key != "model_type"}
    own = {MODEL_TYPE: record, "model_type": record["base_model_type"], "architectures": names}
    return {key: value for key, value in plain.items() if key != "auto_map"} | own


def _each_config(config: dict[str, Any], change: Callable[[dict[str, str]], dict[str, str]]) -> dict[str, Any]:
    """`config` with changed labels, in the configurations inside it too: a stock class may take one for the whole."""
    parts = {
        key: _each_config(part, change)
        for key, part in config.items()
        if isinstance(part, dict) and part.get("model_type")
    }
    return {**config, **parts, "id2label": change(config.get("id2label") or {}) or None}


def _register(base: type[PreTrainedConfig]) -> None:
    """Let every Auto class that makes models of `base` make pruned ones of its pruned configuration."""
    for auto in autos():
        kind = auto._model_mapping.get(base, None)
        if isinstance(kind, type):
            auto.register(pruned_config_class(base), pruned_model_class(kind, base), exist_ok=True)


def autos() -> list[Any]:
    """The Auto classes of transformers that make models."""
    named = [getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    return [auto for auto in named if getattr(auto, "_model_mapping", None) is not None]


class BlockprunerConfig(PreTrainedConfig):
    """Entry point for AutoConfig: hands back a configuration of the base architecture, marked as pruned."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = _unlocked({**config_dict, "model_type": MODEL_TYPE})["model_type"]
        if kind not in configuration_auto.CONFIG_MAPPING:
            raise ValueError(f"transformers {transformers.__version__} does not know model type {kind!r}; upgrade it")
        base = configuration_auto.CONFIG_MAPPING[kind]
        _register(base)
        return pruned_config_class(base).from_dict(config_dict, **kwargs)
