"""The gate before every model: what a folder or a GGUF file holds is looked at before any weight of it is read.

Everything here is about files and numbers in headers; no tensor is made. What passes may still be a wrong model,
but reading it runs no code, leads to no other file, and neither hangs nor asks for more memory than its size warrants.
"""

import math
import mmap
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blockpruner.artifacts import MAX_JSON_BYTES, read_json
from blockpruner.errors import InputError, UnsupportedModelError

# Integers of config.json that decide how much is built: names, smallest and largest value taken for sane.
BOUNDS: tuple[tuple[re.Pattern[str], int, int], ...] = (
    (re.compile(r"num_hidden_layers|num_layers|n_layers?"), 1, 1000),
    (re.compile(r"(num|n|encoder|decoder)_(\w+_)?layers?"), 0, 1000),
    (re.compile(r"hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size"), 1, 2**17),
    (re.compile(r"intermediate_size|(\w+_)?ffn_dim|d_ff|n_inner|(\w+_)?head_dim|d_kv"), 0, 2**22),
    (re.compile(r"(\w+_)?vocab_size"), 0, 2**24),
    (re.compile(r"(num|n|encoder|decoder)_(\w+_)?heads?"), 0, 2**16),
    (re.compile(r"(num|n)_(\w+_)?experts"), 0, 2**14),
    (re.compile(r"max_position_embeddings|n_positions|n_ctx"), 0, 2**28),
)
# Keys of config.json that make transformers read other files, fetch kernels or patch classes.
REFUSED_KEYS = re.compile(r"_\w+_internal|trust_remote_code|configuration_files|transformers_weights|fusion_config")
IMPLEMENTATION_KEYS = re.compile(r"_?(attn|experts)_implementation")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
TEXTS = {".json", ".txt", ".jinja", ".model"}
# GGUF: struct codes of its scalar types, its two other types, and more than any real file has.
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
MOST_ENTRIES, MOST_ITEMS = 2**16, 2**22


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed the gate.

    config: config.json as read; values: how many numbers its safetensors hold, None for pickles, which hide it.
    """

    folder: Path
    config: Mapping[str, Any]
    values: int | None


def check_checkpoint(folder: Path, *, allow_remote_code: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Look at every file of `folder`, its config.json, its index and the headers of its weights.

    InputError names the file and the reason; UnsupportedModelError, the model type that transformers does not know.
    """
    check_files(folder)
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        fix = f"name the file itself: {folder / ggufs[0]}" if ggufs else "name the folder that holds config.json"
        raise InputError(f"{folder} has no config.json, so it is not a model folder", fix=fix)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} is an adapter (adapter_config.json)", fix="merge it into its base model first")
    config = check_config(read_json(folder / "config.json"), folder, allow_remote_code=allow_remote_code)
    files, listed = _weight_files(folder, allow_pickle=allow_pickle)
    if files[0].suffix != ".safetensors":
        return Checkpoint(folder, config, None)
    return Checkpoint(folder, config, _read_headers(folder, files, listed))


def check_files(folder: Path) -> None:
    """InputError unless every entry of `folder` is a regular file or folder that lies in it.

    Links are followed; in a snapshot of the hub's cache they may lead to the blobs of that cache.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        allowed += [home.parents[1], home.parents[2] / "blobs"]
    try:
        for entry in (*home.iterdir(), *(home / "additional_chat_templates").glob("*")):
            target = entry.resolve(strict=True)
            status = target.stat()
            if not any(target.is_relative_to(place) for place in allowed):
                raise InputError(f"{entry} leads out of the model folder, to {target}", fix="put the file itself there")
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise InputError(f"{entry} is not a regular file", fix="remove it from the model folder")
            if entry.suffix in TEXTS and status.st_size > MAX_JSON_BYTES:
                raise InputError(f"{entry} is larger than {MAX_JSON_BYTES} bytes", fix="remove or mend it")
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot look through {folder}: {error}", fix="mend or remove that entry") from error


def check_config(config: object, source: Path, *, allow_remote_code: bool = False) -> dict[str, Any]:
    """`config` itself, once every number that sizes the model is in bounds and nothing in it steers the loading."""
    if not isinstance(config, dict):
        raise InputError(f"config.json of {source} is no JSON object", fix="restore the model's own config.json")
    pending = [config]
    while pending:
        part = pending.pop()
        for key, value in part.items():
            _check_entry(str(key), value, source)
            pending += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    if config.get("quantization_config"):
        raise InputError(f"{source} is quantized (quantization_config)", fix="give the unquantized checkpoint")
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"config.json of {source} has no model_type", fix="restore the model's own config.json")
    if kind in CONFIG_MAPPING or (allow_remote_code and "auto_map" in config):
        return config
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{source}: model type {kind!r} needs Python code that comes with the checkpoint",
            fix="read that code; if you trust it, add --allow-remote-code",
        )
    raise UnsupportedModelError(
        f"{source}: transformers {__version__} does not know the model type {kind!r}",
        fix="pip install --upgrade transformers",
    )


def _check_entry(key: str, value: object, source: Path) -> None:
    """InputError if this entry of config.json, at any depth, is not to be trusted."""
    if REFUSED_KEYS.fullmatch(key):
        raise InputError(f"config.json of {source} holds the key {key!r}", fix="remove that key from config.json")
    if IMPLEMENTATION_KEYS.fullmatch(key) and not re.fullmatch(r"\w*", str(value)):
        raise InputError(f"config.json of {source}: {key} is {value!r}, code from elsewhere", fix="remove that key")
    for names, low, high in BOUNDS:
        if names.fullmatch(key):
            for number in value if isinstance(value, list) else [value]:
                if number is None or isinstance(number, dict):
                    continue
                if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                    raise InputError(
                        f"config.json of {source}: {key} is {number!r}, expected a whole number from {low} to {high}",
                        fix="restore the model's own config.json",
                    )
            return


def _weight_files(folder: Path, *, allow_pickle: bool) -> tuple[list[Path], set[str]]:
    """The files transformers will read the weights from, and the tensor names an index promises, if there is one."""
    stems = ["model.safetensors"] + ["pytorch_model.bin"] * allow_pickle
    for stem in stems:
        if (folder / stem).is_file():
            return [folder / stem], set()
        if (folder / f"{stem}.index.json").is_file():
            return _indexed(folder / f"{stem}.index.json", Path(stem).suffix)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds pickles only ({', '.join(pickles[:3])}), and loading a pickle can run code",
            fix="convert it to safetensors; if you trust a pytorch_model.bin, add --allow-pickle",
        )
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json",
        fix="get the complete checkpoint",
    )


def _indexed(index: Path, suffix: str) -> tuple[list[Path], set[str]]:
    """The shards that `index` names: plain names of present files in its own folder."""
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"{index} has no weight_map from tensor names to file names", fix="get the file again")
    files = sorted(set(table.values()))
    for name in files:
        if not re.fullmatch(r"[\w-][\w.+-]*", name) or not name.endswith(suffix):
            raise InputError(f"{index} names {name!r}, which is no plain {suffix} file name", fix="mend the index")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing", fix="get the complete checkpoint")
    return [index.parent / name for name in files], set(table)


def _read_headers(folder: Path, files: Iterable[Path], listed: set[str]) -> int:
    """How many numbers `files` hold; safetensors itself checks lengths, offsets, overlaps and holes."""
    values: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in values:
                        raise InputError(f"{file} holds {name} a second time", fix="get the checkpoint again")
                    values[name] = math.prod(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a sound safetensors file: {error}", fix="get the file again") from error
    lost = sorted(listed - set(values))
    if lost:
        raise InputError(f"{lost[0]} is in the index of {folder} but in none of its files", fix="get the files again")
    return sum(values.values())


def check_gguf(path: Path) -> int:
    """How many numbers the tensors of a GGUF file (version 2 or 3) hold; needs the package gguf.

    InputError unless every length, count and offset in its header fits the file. Cost: one walk over the header.
    """
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    path = path.resolve()
    if not path.is_file() or path.stat().st_size < 24:
        raise InputError(f"{path} is not a GGUF file", fix="check the path")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _GgufHeader(path, data)
        metadata, tensors = header.read()
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise header.refuse(f"an alignment of {alignment!r}")
        start = -(-header.at // alignment) * alignment
        for name, (dimensions, kind, offset) in tensors.items():
            block, size = sizes.get(kind, (0, 0))
            if not block or not dimensions or dimensions[0] % block:
                raise header.refuse(f"{name} has shape {dimensions} and type {kind}")
            if start + offset + math.prod(dimensions) // block * size > len(data):
                raise header.refuse(f"{name} reaches past the end of the file")
        return sum(math.prod(dimensions) for dimensions, _, _ in tensors.values())


class _GgufHeader:
    """Reads the head of a GGUF file from front to back; InputError rather than one byte past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def refuse(self, reason: str) -> InputError:
        return InputError(f"{self.path} is not a sound GGUF file: {reason}", fix="get the file again")

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[list[int], int, int]]]:
        """Metadata by key, then (dimensions, type, offset) by tensor name."""
        if self.data[self.skip(4) : self.at] != b"GGUF" or self.number("I") not in (2, 3):
            raise self.refuse("it does not begin with the mark of GGUF version 2 or 3")
        counts = self.number("Q"), self.number("Q")
        if max(counts) > MOST_ENTRIES:
            raise self.refuse(f"it announces {counts[0]} tensors and {counts[1]} metadata entries")
        metadata = {self.text(): self.value() for _ in range(counts[1])}
        tensors = {self.text(): (self.dimensions(), self.number("I"), self.number("Q")) for _ in range(counts[0])}
        if (len(tensors), len(metadata)) != counts:
            raise self.refuse("a name occurs twice")
        return metadata, tensors

    def skip(self, size: int) -> int:
        """Move over `size` bytes; the place they start at."""
        if size > len(self.data) - self.at:
            raise self.refuse(f"{size} bytes wanted at byte {self.at} of {len(self.data)}")
        start, self.at = self.at, self.at + size
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode(errors="replace")

    def dimensions(self) -> list[int]:
        count = self.number("I")
        if count > 4:
            raise self.refuse(f"a tensor of {count} dimensions")
        return [self.number("Q") for _ in range(count)]

    def value(self) -> Any:
        """One metadata value; arrays are walked over and give None."""
        kind = self.number("I")
        if kind == GGUF_STRING:
            return self.text()
        if kind != GGUF_ARRAY:
            return self.number(self.code(kind))
        kind, count = self.number("I"), self.number("Q")
        if count > MOST_ITEMS:
            raise self.refuse(f"an array of {count} items")
        if kind != GGUF_STRING:
            self.skip(count * struct.calcsize(f"<{self.code(kind)}"))
        else:
            for _ in range(count):
                self.skip(self.number("Q"))
        return None

    def code(self, kind: int) -> str:
        if kind not in GGUF_SCALARS:
            raise self.refuse(f"a value of type {kind}")
        return GGUF_SCALARS[kind]
