"""What the task files of an include path come to: one digest that changes whenever a task may have changed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

LARGE = 64 * 2**20  # bytes; larger files are data, and go by size and time of change
_YAML = (".yaml", ".yml", "")  # what files include has often no ending


def digest_of(folder: Path) -> str:
    """sha256 (16 hexadecimal digits) of the files in `folder`, and of those elsewhere that its YAML files name.

    Whatever is in the folder counts (definitions, code, data), by its path and content, but for hidden files and
    __pycache__. Named is a file that stands as a text in a YAML file, as of `include` or `data_files`, from the file's
    own folder or the current one; of YAML files so named the same holds. Not seen are packages that task code imports,
    and data that it fetches. Cost: all files are read once.
    """
    digest = hashlib.sha256()
    waiting, seen = list(_inside(folder)), set[Path]()
    while waiting:
        file = waiting.pop(0)
        if file.resolve() not in seen:
            seen.add(file.resolve())
            digest.update(f"{os.path.relpath(file, folder)}\0{_content(file)}\n".encode(errors="surrogateescape"))
            waiting += sorted(_named(file)) if file.suffix in _YAML else ()
    return digest.hexdigest()[:16]


def _inside(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(place, name) for name in sorted(files) if not name.startswith(".") and _is_file(place, name))


def _content(file: Path) -> str:
    told = file.stat()
    if told.st_size > LARGE:
        return f"{told.st_size} {told.st_mtime_ns}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _named(file: Path) -> set[Path]:
    """The files that stand as texts in a YAML file; none where it cannot be read, which the harness will say."""
    try:
        texts = {token.value for token in yaml.scan(file.read_bytes()) if isinstance(token, yaml.ScalarToken)}
    except (yaml.YAMLError, ValueError):
        return set()
    return {Path(place, text) for text in texts for place in (file.parent, Path()) if _is_file(place, text)}


def _is_file(place: Path | str, name: str) -> bool:
    try:
        return Path(place, name).is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or has a null byte in it
        return False
