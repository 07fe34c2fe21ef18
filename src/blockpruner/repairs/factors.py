"""LoRA on what is left of a pruned model: two factors beside each projection, trained and merged into it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import asking, stood_in
from blockpruner.blocks import Mask
from blockpruner.errors import InputError, missing_extra
from blockpruner.repairs.courses import numbers_in
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench, GapRecord, Trained
from blockpruner.repairs.taught import Taught
from blockpruner.repairs.teaching import check_predicts
from blockpruner.repairs.tuning import live, record_of, still, told, trained, wide
from blockpruner.surgery.gaps import Repair


def train_lora(
    bench: Bench,
    options: Trained,
    shape: Mapping[str, float],
    targets: str,
    taught: Taught,
    *,
    maps: bool = False,
) -> tuple[Repair, tuple[GapRecord, ...]]:
    """LoRA trained and merged; see the recovery `lora`. shape: rank, alpha and dropout, as peft calls them.

    maps: whether what stands in gaps is trained too.
    """
    check_predicts(bench.model, bench.examples)
    if maps and not bench.start.replacements:
        raise InputError("nothing stands in the gaps that could be trained", fix="leave out maps, or put linear first")
    found = lora_targets(bench.model, bench.anatomy, bench.mask, targets)
    with asking(bench.model):
        wrapped, start = with_factors(found, shape, options), bench.start
        trying = {path: live(module, options) for path, module in start.replacements.items()} if maps else {}
        begun = replace(start, replacements={**start.replacements, **trying})
        pupil = Pupil(bench.model, bench.anatomy, bench.mask, begun, wrapped)
        factors = {name: number for name, number in numbers_in(wrapped).items() if "lora_" in name}
        numbers = factors | numbers_in(trying)
        trace = trained(bench, options, pupil, numbers, taught.lesson(pupil, bench.examples))
        merged = {} if not trace.best(bench.force) else _merged(bench, wrapped)
    place = f"LoRA on {len(merged) if merged else len(found)} projections"
    beyond = {"no projections in": ", ".join(kinds)} if (kinds := _beyond(bench.anatomy, bench.mask, found)) else {}
    more = taught.told | ({"maps": len(trying)} if maps else {})
    record = record_of(bench, place, {**more, **shape, **beyond, **told(options, trace, bench.force)}, trace)
    if not merged and not (trying and trace.best(bench.force)):
        return start, (record,)
    filled = {**start.replacements, **{path: still(module, bench.model) for path, module in trying.items()}}
    return replace(start, replacements=filled, weights={**start.weights, **merged}, made_up=bench.mask), (record,)


def lora_targets(model: PreTrainedModel, anatomy: Anatomy, mask: Mask, targets: str) -> dict[str, Any]:
    """The linear projections in the blocks that are left, by path: `all`, or kinds of blocks and names, joined by +.

    Without those whose weights are also used elsewhere. InputError, with what there is, if nothing is of these names.
    """
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    asked, found, names = targets.split("+"), dict[str, Any](), set[str]()
    with stood_in(model, anatomy.stand_ins(mask)):
        for block, part in anatomy.parts.items():
            if block in mask:
                continue
            for path, module in _linear(model, [*part.modules, *part.idle]).items():
                names |= {block.kind, name := path.rpartition(".")[2]}
                alone = every.count(id(module.weight)) == 1
                if alone and {"all", block.kind, name} & set(asked):
                    found[path] = module
    unknown = set(asked) - names - {"all"} if found else set(asked)
    if unknown:
        raise InputError(
            f"no linear projection that is left in a block goes by {' or '.join(sorted(unknown))}",
            fix=f"choose all, or some of {', '.join(sorted(names)) or 'none'}, joined by +",
        )
    return found


def _beyond(anatomy: Anatomy, mask: Mask, found: Iterable[str]) -> list[str]:
    """The kinds of blocks that are left in which LoRA has nothing to train, as where experts are stacked tensors."""
    paths = tuple(found)
    reached = {
        block.kind
        for block, part in anatomy.parts.items()
        if any(name == path or name.startswith(f"{path}.") for path in (*part.modules, *part.idle) for name in paths)
    }
    return sorted({block.kind for block in anatomy.parts if block not in mask} - reached)


def _linear(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    inside = {name: m for path in paths for name, m in model.get_submodule(path).named_modules(prefix=path)}
    return {name: module for name, module in inside.items() if isinstance(module, (nn.Linear, Conv1D))}


def with_factors(found: Mapping[str, nn.Module], shape: Mapping[str, float], options: Trained) -> dict[str, nn.Module]:
    """The projections with LoRA's factors beside them, which add nothing yet; the model itself is not touched."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise missing_extra("peft", "train", "LoRA") from error
    wrapped: dict[str, nn.Module] = {}
    with torch.random.fork_rng([]):
        torch.manual_seed(options.seed)
        for turned in (False, True):
            here = {path: module for path, module in found.items() if isinstance(module, Conv1D) == turned}
            if not here:
                continue
            keys = {f"m{number}": path for number, path in enumerate(here)}
            # Of its own, so that peft neither marks the model nor asks of what family it is.
            holder = nn.ModuleDict({key: here[path] for key, path in keys.items()})
            given: Any = {**shape, "target_modules": list(keys), "fan_in_fan_out": turned, "bias": "none"}
            inject_adapter_in_model(LoraConfig(**given), holder)
            wrapped |= {path: holder[key] for key, path in keys.items()}
    for module in wrapped.values():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(wide(parameter.data, options))
    return wrapped


def _merged(bench: Bench, wrapped: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the projections with what LoRA adds to them, where that is anything: some are read, not called."""
    merged = {}
    for path, module in wrapped.items():
        name = f"{path}.weight"
        weight = bench.start.weights.get(name, module.base_layer.weight.data)
        delta = module.get_delta_weight("default").detach()
        if bool(delta.any()):
            merged[name] = (weight.float() + delta.float()).to(weight.dtype)
    return merged
