"""Everything that goes to disk: one atomic writer, strict versioned JSON, run folders; no tensors."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from blockpruner.errors import InputError, MachineError, RunFolderError, system_error

MAX_JSON_BYTES = 256 * 2**20
_REFUSED_WRITES = frozenset(
    getattr(errno, f"E{name}")
    for name in (
        *("ACCES", "BUSY", "DQUOT", "EXIST", "FBIG", "IO", "ISDIR", "MFILE"),
        *("NAMETOOLONG", "NFILE", "NOSPC", "NOTDIR", "NOTEMPTY", "PERM", "ROFS", "XDEV"),
    )
)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        number = system_error(error)
        if number is None or number not in _REFUSED_WRITES:
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or os.strerror(number)
        raise MachineError(
            f"cannot write {path}: {reason}",
            fix="free space or choose another place with --out or --run, then run the same command again",
        ) from error


@contextlib.contextmanager
def _creating() -> Iterator[None]:
    """Around what makes files and folders, also those above: what is then not found cannot be made, as in /proc."""
    try:
        yield
    except FileNotFoundError as error:
        raise PermissionError(errno.EPERM, "nothing can be made there") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader sees the old file or the whole new one, also after a power cut."""
    with _writing(path):
        with _creating():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with a final newline, atomically; NaN and infinity are a ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` whole when the block ends, or not at all.

    It is filled aside, every file is synced, then renamed. InputError if `path` exists and is not empty.
    """
    check_new_folder(path)
    with _writing(path):
        with _creating():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.fchmod(handle, 0o755 if file.is_dir() else 0o644)  # safetensors lets none but the owner read
                    os.fsync(handle)
                finally:
                    os.close(handle)
            aside.chmod(0o755)
            if path.exists():
                path.rmdir()
            os.rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def check_new_folder(path: Path, *, sources: tuple[Path, ...] = ()) -> None:
    """InputError if a new folder cannot be made at `path`, or if it would lie in (or be) one of `sources`."""
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link; results are not written through links", fix="name a new folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already exists", fix="name a new folder, or remove that one first")
    if os.path.ismount(path):
        raise InputError(f"{path} is a mount point, which nothing can take the place of", fix="name a new folder in it")
    check_outside(path, sources)


def check_outside(path: Path, sources: Iterable[Path]) -> None:
    """InputError if `path`, with all links followed, is one of the model folders `sources` or lies in one."""
    inside = path.resolve()
    for source in sources:
        if source.is_dir() and (inside == source.resolve() or source.resolve() in inside.parents):
            raise InputError(f"{path} lies in the source model {source}", fix="write to a folder outside the source")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; InputError names the file, the line and the reason."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes", fix="give the JSON file that was meant")
        if not path.is_file():
            raise InputError(f"{path} is not a regular file", fix="give a JSON file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", fix="check the path") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}",
            fix="mend the file at that place, or write it again",
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not JSON text: {error}", fix="give the JSON file that was meant") from error


class Record(BaseModel):
    """A strict, immutable part of an artifact: no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Artifact(Record):
    """A noun that lives in a file of its own, with its format's name and version as first keys."""

    format: str
    version: int

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check `path`; InputError says which field is wrong, or that the version is newer."""
        return cls.from_value(read_json(path), str(path))

    @classmethod
    def from_value(cls, value: object, source: str) -> Self:
        if not isinstance(value, dict) or value.get("format") != cls.FORMAT:
            found = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise InputError(
                f"{source} is not a {cls.FORMAT} file (format: {found!r})", fix=f"give a {cls.FORMAT} file"
            )
        version = value.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InputError(f"{source} has no usable version ({version!r})", fix=f"set version to {cls.VERSION}")
        if version > cls.VERSION:
            raise InputError(
                f"{source} is {cls.FORMAT} version {version}; this blockpruner reads up to {cls.VERSION}",
                fix="pip install --upgrade blockpruner",
            )
        try:
            return cls.model_validate_json(json.dumps(value))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise InputError(f"{source}: {where}: {first['msg']}", fix="mend that field") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not a {cls.FORMAT}: {error}", fix="mend the file") from error

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


@contextlib.contextmanager
def run_folder(path: Path, *, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """The run folder `path`, made if need be and held by this process alone (a kernel lock, gone with the process).

    InputError if it lies in one of the model folders `sources`; RunFolderError names who holds it; MachineError where
    the file system knows no locks.
    """
    check_outside(path, sources)
    with _writing(path), _creating():
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                what = f"{path} cannot be locked: {error.strerror or error}"
                raise MachineError(what, fix="name a --run on another file system") from error
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise RunFolderError(f"{path} is in use by {holder}", fix="wait for it, or name another --run") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield path
    finally:
        os.close(handle)


class Estimate(Record):
    """A mean over units with its standard error; `stderr` is None where none exists and `reason` says why.

    value and stderr in `unit`; n: number of units (windows, unless said otherwise).
    """

    value: float
    stderr: float | None
    n: int
    unit: str
    reason: str | None = None

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Self:
        """Mean of `values` (at least one) and its standard error s / sqrt(n), s with n - 1 in the denominator."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(value=mean, stderr=None, n=1, unit=unit, reason="one unit has no spread")
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(value=mean, stderr=math.sqrt(variance / n), n=n, unit=unit)

    @classmethod
    def ratio(cls, sums: Sequence[float], sizes: Sequence[float], unit: str) -> Self:
        """r = sum(sums) / sum(sizes) over n units (at least one of some size), and its standard error.

        stderr(r) = sqrt(sum((sum_i - r size_i)^2) / (n - 1) / n) / mean(sizes), the usual one of a ratio of means.
        """
        n, total = len(sums), math.fsum(sizes)
        value = math.fsum(sums) / total
        if n == 1:
            return cls(value=value, stderr=None, n=1, unit=unit, reason="one unit has no spread")
        spread = math.fsum((part - value * size) ** 2 for part, size in zip(sums, sizes, strict=True)) / (n - 1)
        return cls(value=value, stderr=math.sqrt(spread / n) / (total / n), n=n, unit=unit)


class Traffic(Record):
    """Bytes that a search moves and holds, beside what its layers make for themselves.

    read: of layers' weights, from files, whatever the system keeps of them; spilled: of states, written to disk;
    held: of states in memory, at most at a time.
    """

    read: int = 0
    spilled: int = 0
    held: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Of one after the other."""
        return Traffic(
            read=self.read + other.read, spilled=self.spilled + other.spilled, held=max(self.held, other.held)
        )


class Work(Record):
    """Work in tokens: one mixing block (attention, cross-attention, mixer), mlp or loss applied to one token."""

    attention_tokens: int = 0
    mlp_tokens: int = 0
    head_tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            attention_tokens=self.attention_tokens + other.attention_tokens,
            mlp_tokens=self.mlp_tokens + other.mlp_tokens,
            head_tokens=self.head_tokens + other.head_tokens,
        )
