"""A model and its tokenizer by name: from the hub, a folder, a GGUF file, or the `demo` model.

Nothing is read before the gate has looked at it, and nothing is handed out before every weight was found and fits.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.artifacts import read_json
from blockpruner.errors import InputError, MachineError
from blockpruner.loading import ggufs
from blockpruner.loading.gate import Checkpoint, check_checkpoint
from blockpruner.loading.strict import first_line, quietly, read_weights
from blockpruner.plan import ModelIdentity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in the words of safetensors
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "tekken.json", "*.tiktoken")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, with its tokenizer (None where the checkpoint has none).

    name: as the user gave it; folder: where its files lie, which nothing may ever write into.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    folder: Path


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    allow_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load the model `name` strictly: every weight found, none left over, all finite; eval mode, no gradients.

    name: `demo`, a folder, a GGUF file or a hub name (`org/name`, with `revision`).
    dtype: float32, bfloat16, float16; stored: as its config.json says; auto: bfloat16 where the hardware computes in
    it natively, else float32.
    device: as in torch, or auto: all GPUs if there are several and accelerate is installed, one GPU, mps, cpu.
    InputError: the name, the files or the weights; MachineError: network, memory, disk, or a missing package.
    """
    place = place_of(device)
    kind = dtype_of(dtype, place)
    spread = device == "auto" and torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
    checkpoint = checkpoint_of(name, revision, allow_remote_code, allow_pickle)
    folder = checkpoint.folder
    tokenizer = tokenizer_of(folder, allow_remote_code)
    with quietly(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=allow_remote_code, local_files_only=True)
    options: dict[str, Any] = {"device_map": "auto"} if spread else {}
    model: Any = read_weights(
        folder,
        config,
        checkpoint.values,
        source=folder,
        dtype=kind,
        trust_remote_code=allow_remote_code,
        use_safetensors=checkpoint.values is not None,
        **options,
    )
    if not spread:
        with quietly(folder):
            model.to(place)
    model.name_or_path = name  # what a plan calls the model, however it came to be loaded
    return LoadedModel(model, tokenizer, name, folder)


def load_tokenizer(
    name: str, *, revision: str | None = None, allow_remote_code: bool = False, allow_pickle: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model `name`, None where it has none; the model is fetched and checked, but not loaded."""
    return tokenizer_of(checkpoint_of(name, revision, allow_remote_code, allow_pickle).folder, allow_remote_code)


def resolve(
    name: str, *, revision: str | None = None, allow_remote_code: bool = False, allow_pickle: bool = False
) -> Path:
    """The folder with the checked checkpoint of the model `name`, fetched or unpacked if need be."""
    return checkpoint_of(name, revision, allow_remote_code, allow_pickle).folder


def fingerprint(model: PreTrainedModel) -> str:
    """An identity of the model: sha256 (hex) over its type and, by name, shape and a sample of every parameter.

    The sample is up to 64 evenly strided elements, rounded to bfloat16: loaded in float32 or in bfloat16, the same file
    has the same fingerprint. Tied weights count once. It tells models apart; it does not vouch for every byte.
    """
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in sorted(model.named_parameters()):
        step = max(1, parameter.numel() // 64)
        sample = parameter.detach().reshape(-1)[::step][:64].to("cpu", torch.bfloat16)
        digest.update(f"\n{name} {tuple(parameter.shape)} ".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def identify(model: PreTrainedModel, name: str) -> ModelIdentity:
    """What a plan says of the model it is for; `name` may be a path, of which the last part is kept."""
    return ModelIdentity(
        name=Path(name).resolve().name if Path(name).exists() else name,
        model_type=str(model.config.model_type),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fingerprint=fingerprint(model),
    )


def computation(model: PreTrainedModel) -> str:
    """A digest (sha256, hex) of what the model computes with: its configuration, and samples of weights and buffers.

    Finer than `fingerprint`: it differs between dtypes, and between settings such as the base of the rotary embedding.
    """
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(chain(model.named_parameters(), model.named_buffers())):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].cpu()
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} {sample.tolist()}".encode())
    return digest.hexdigest()


def checkpoint_of(name: str, revision: str | None, allow_remote_code: bool, allow_pickle: bool) -> Checkpoint:
    """Find the folder that `name` means and send it through the gate."""
    path = Path(name).expanduser()
    is_hub_name = False
    if name == "demo":
        folder = ggufs.demo()
    elif name and path.is_dir():
        folder = path
    elif path.is_file():
        folder = ggufs.unpacked(path)
    elif HUB_NAME.fullmatch(name) and path.suffix != ".gguf":
        is_hub_name = True
        folder = _from_hub(name, revision, allow_remote_code, allow_pickle)
    else:
        raise InputError(f"there is no model {name!r}", fix="give a folder, a .gguf file, a hub name, or `demo`")
    if revision is not None and not is_hub_name:
        raise InputError(f"{name} has no revisions; only hub names do", fix="leave out the revision")
    return check_checkpoint(folder, allow_remote_code=allow_remote_code, allow_pickle=allow_pickle)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that `stored` is in this folder: as config.json says, else of the first weights that are no integers.

    None where it is not known: pickles are not opened for it.
    """
    config = read_json(folder / "config.json")
    found: Any = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(found, torch.dtype):
        return found if found.is_floating_point else None
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        with safe_open(file, framework="pt") as tensors:
            kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118 (not a dict)
        return next((STORED[kind] for kind in kinds if kind in STORED), None)
    return None


def _from_hub(name: str, revision: str | None, allow_remote_code: bool, allow_pickle: bool) -> Path:
    """The snapshot of the hub model `name` in the hub's own cache: weights, configuration and tokenizer only."""

    def fetch(*wanted: str) -> Path:
        other_formats = ["*/*", "consolidated*"]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=other_formats)
        )

    files = (*HUB_FILES, *(["*.py"] if allow_remote_code else []))
    try:
        folder = fetch(*files)
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = fetch(*files, "*.bin")
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"the hub has no model {name!r} for you, and there is no such folder: {first_line(error)}",
            fix="check name and revision; for a gated model accept its terms, then run `hf auth login`",
        ) from error
    except Exception as error:  # the hub's client lets through whatever its network library raises
        raise MachineError(
            f"there is no folder {name!r}, and the hub could not be asked for it: {first_line(error)}",
            fix="check the name and the network, or give the path of a folder",
        ) from error
    return folder


def tokenizer_of(folder: Path, allow_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any(chain.from_iterable(folder.glob(pattern) for pattern in TOKENIZER_FILES)):
        return None
    with quietly(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_remote_code, local_files_only=True)


def place_of(device: str) -> torch.device:
    """The device that `device` names; InputError for no device at all, MachineError for one that is not there."""
    if device == "auto":
        for kind in ("cuda", "mps"):
            if getattr(torch, kind).is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device: {first_line(error)}", fix="give auto, cpu, cuda or mps") from error
    if place.type == "meta":
        raise InputError("a model on the device 'meta' has no weights", fix="give auto, cpu, cuda or mps")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MachineError(f"this machine has no {device!r}: {first_line(error)}", fix="give auto or cpu") from error
    return place


def dtype_of(dtype: str, place: torch.device) -> torch.dtype | Literal["auto"]:
    """What transformers calls the dtype that `dtype` names; its own `auto` is our `stored`.

    For our auto, bfloat16 if the hardware at `place` computes in it natively.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype == "stored":
        return "auto"
    if dtype != "auto":
        raise InputError(f"{dtype!r} is no dtype to load in", fix=f"give auto, stored, {', '.join(DTYPES)}")
    if place.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif place.type == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:  # x86 has the first two, ARM the third; a torch that cannot tell computes in float32
        flags: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32
