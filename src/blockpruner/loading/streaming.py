"""Models whose layers' weights stay in their files: for searches on models larger than memory.

transformers, with accelerate, leaves modules on disk, and knows from which file each tensor comes, what it is called
there and what dtype it is to have; tensors that it puts together from several (the experts of a mixture) it writes to
files of its own, one at a time. Here these tensors are mapped into memory as they are in the files: pages are read when
they are looked at and dropped when memory is wanted, so they take none of their own (`experiments/stream.json`).
Where a layer's weights are to be of another dtype or on another device they are made when it is called (`lending`).
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.import_utils import is_accelerate_available

from blockpruner.errors import InputError, missing_extra
from blockpruner.loading.lending import at_hand, lend
from blockpruner.loading.models import LoadedModel, checkpoint_of, dtype_of, place_of, tokenizer_of
from blockpruner.loading.strict import check_finite, quietly, read_weights

Read = Callable[..., PreTrainedModel]
LEAST_SHARE = 0.05  # of a model's numbers: shorter lists of modules are no stack that is worth streaming


def load_streamed(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    allow_remote_code: bool = False,
) -> LoadedModel:
    """Like `models.load`, as strict, and with the same bits in every layer while it runs; its weights stay on disk.

    What is no layer is loaded as ever. Whatever wants gradients is not for such a model. Cost: the files are read once,
    to see that all numbers are finite; disk: what transformers puts together, in the folder of temporary files, where
    it has a name for as long as it is made. InputError: as there, and pickles; MachineError: accelerate is missing.
    """
    if not is_accelerate_available():
        raise missing_extra("accelerate", "stream", "--stream")
    place = place_of(device)
    checkpoint = checkpoint_of(name, revision, allow_remote_code, allow_pickle=False)
    folder = checkpoint.folder
    tokenizer = tokenizer_of(folder, allow_remote_code)
    with quietly(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=allow_remote_code, local_files_only=True)
    read = partial(
        read_weights,
        folder,
        config,
        checkpoint.values,
        source=folder,
        dtype=dtype_of(dtype, place),
        trust_remote_code=allow_remote_code,
        use_safetensors=True,
    )
    outline = read(device_map="meta")  # names and shapes, no weights
    least = LEAST_SHARE * sum(parameter.numel() for parameter in outline.parameters())
    places = dict(_places(outline, least))
    layers = [path for path, where in places.items() if where == "disk"]
    if not layers:
        raise InputError(f"{folder} has no list of layers to stream", fix="leave out --stream")
    model = _left_on_disk(read, places)
    lend(model, layers, place, {name: parameter.dtype for name, parameter in outline.named_parameters()})
    for path in layers:
        with at_hand(module := model.get_submodule(path)):
            check_finite(module, folder)
    model.name_or_path = name
    return LoadedModel(model, tokenizer, name, folder)


def _places(root: nn.Module, least: float, path: str = "") -> Iterator[tuple[str, str]]:
    """By path below `root`: `disk` for the layers of outermost lists of `least` numbers, `cpu` for everything else."""
    for name, _ in chain(root.named_parameters(path, recurse=False), root.named_buffers(path, recurse=False)):
        yield name, "cpu"
    for name, child in root.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and _is_stack(child, least):
            yield from ((f"{below}.{number}", "disk") for number in range(len(child)))
        elif any(isinstance(module, nn.ModuleList) for module in child.modules()):
            yield from _places(child, least, below)
        else:
            yield below, "cpu"


def _is_stack(elements: nn.ModuleList, least: float) -> bool:
    deep = all(any(True for _ in element.children()) for element in elements)
    return deep and sum(parameter.numel() for parameter in elements.parameters()) > least


def _left_on_disk(read: Read, places: dict[str, str]) -> PreTrainedModel:
    """The model, the parameters of its layers mapped as they are in files, whatever their dtype there."""
    from accelerate.hooks import remove_hook_from_submodules

    with tempfile.TemporaryDirectory(prefix="blockpruner-", ignore_cleanup_errors=True) as scratch:
        model = read(device_map=places, offload_folder=scratch)
        left = [(module, name) for module in model.modules() for name, p in _own(module) if p.is_meta]
        mapped = [_mapped(module, name) for module, name in left]
    remove_hook_from_submodules(model)
    del model.hf_device_map
    for (module, name), tensor in zip(left, mapped, strict=True):
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _mapped(module: Any, name: str) -> Tensor:
    """The parameter of a module that accelerate would load when the module is called, as a view of its file."""
    weights = module._hf_hook.weights_map
    entry = weights.dataset.index[f"{weights.prefix}{name}"]
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        return file.get_tensor(entry["weight_name"])
