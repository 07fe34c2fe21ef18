"""Files and hub data sets as documents, read as data and within bounds. Nothing here knows of tensors.

A pipe is never waited for, a .gz file is unpacked only as far as it is read, one long line does not fill the memory,
and no script of a data set ever runs. Whatever cannot be read is an InputError that names the file, the place in it and
the reason.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import logging
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from blockpruner.errors import BlockprunerError, InputError, missing_extra
from blockpruner.texts.chats import Render, chat, no_template

# Tokenising takes about 100 bytes of memory for each byte of text.
MAX_TEXT = 16 * 2**20
MAX_LINE = 8 * 2**20
MAX_ARRAY = 64 * 2**20  # of a file that is one JSON array: it is read whole
BEGINNING = 4096  # bytes in which an array has begun
PACKED = (".7z", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".zst")
ENDINGS = ".txt, .jsonl, .json or .parquet"
_ALPACA = ("instruction", "input", "output")
_CHATS = ("messages", "conversations")

log = logging.getLogger("blockpruner")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file as it stands, line ends included; a longer file is cut after MAX_TEXT bytes (logged)."""
    with _opened(path) as file:
        data = file.read(MAX_TEXT + 1)
    whole = len(data) <= MAX_TEXT
    if not whole:
        log_cut(path.name)
    return _decoded(data[:MAX_TEXT], path, whole=whole)


def read_documents(path: Path, column: str | None, render: Render = no_template) -> Iterator[str]:
    """The documents of a .txt (one), .jsonl, .json or .parquet file (one a record, from `column`; see `text_columns`).

    All but .parquet may end in .gz as well. render: makes text of the messages of a chat.
    """
    match _ending(path):
        case ".txt" if column is not None:
            raise InputError(f"{path} is plain text, without columns", fix=f"leave the column {column!r} out")
        case ".txt":
            return iter([read_text(path)])
        case ".jsonl" | ".json":
            return (_document(_object(value, where), column, where, render) for where, value in json_values(path))
        case ".parquet" if not _packed(path):
            return _parquet_documents(path, column, render)
        case suffix if suffix in (".parquet", *PACKED):
            raise InputError(f"{path} is a packed file", fix="unpack it first")
        case _:
            kind = "a folder" if path.is_dir() else f"not a {ENDINGS} file"
            raise InputError(f"{path} is {kind}", fix="give a file of text under one of these endings")


def hub_documents(
    name: str, subset: str | None, split: str, column: str | None, render: Render = no_template
) -> Iterator[str]:
    """The documents of a hub data set, one a record, fetched as they are asked for; offline, from the local cache."""
    with _hub_errors(name):
        for number, record in enumerate(hub_rows(name, subset, split, stream=True)):
            yield _document(record, column, f"{name}, {split} record {number}", render)


def hub_rows(name: str, subset: str | None, split: str, *, stream: bool) -> Any:
    """A split of a hub data set, in the classes of `datasets`, which from 4.0 on runs no script of a data set."""
    try:
        from datasets import config, load_dataset
    except ImportError:
        raise missing_extra("datasets", "data", f"the hub data set {name}") from None
    with _hub_errors(name):
        data_set, _, revision = name.partition("@")
        options: Any = {"revision": revision} if revision else {}
        options |= {"streaming": stream and not config.HF_HUB_OFFLINE}
        return load_dataset(data_set, subset, split=split, **options)


def alpaca_text(instruction: str, given: str, output: str) -> str:
    """One Alpaca record as the text that BlockPruner and others calibrate on; `given` is its input, often empty."""
    context = ", paired with an input that provides further context" if given else ""
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + f"### Response:\n{output}"
    )


def text_columns(columns: Iterable[str], column: str | None, where: str) -> tuple[str, ...]:
    """The columns that make a document: `column`, else `text`, else instruction, input and output (Alpaca), else
    `messages` or `conversations` (a chat)."""
    found = list(columns)
    if (column or "text") in found:
        return (column or "text",)
    if column is None and "instruction" in found and "output" in found:
        return tuple(name for name in _ALPACA if name in found)
    if column is None and (chats := [name for name in _CHATS if name in found]):
        return (chats[0],)
    shown = ", ".join(found[:20])[:400] or "none"
    raise InputError(
        f"{where} has no column {column or 'text'!r}; its columns: {shown}",
        fix="name the one that holds the text with --column",
    )


def log_cut(source: str) -> None:
    """Say that a source is longer than what of it is looked at."""
    log.warning("%s: only its first %d MiB of text are looked at", source, MAX_TEXT // 2**20)


def _document(record: Mapping[str, Any], column: str | None, where: str, render: Render) -> str:
    columns = text_columns(record, column, where)
    if len(columns) == 1:
        value = record[columns[0]]
        if isinstance(value, list):
            return chat(value, f"{where}, column {columns[0]!r}", render)
        return _checked(value, columns[0], where)
    given = record.get("input")  # null where a record has none
    instruction, output = (_checked(record[name], name, where) for name in ("instruction", "output"))
    return alpaca_text(instruction, "" if given is None else _checked(given, "input", where), output)


def _checked(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text", fix="name a column that holds text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: column {column!r}: {error.reason}", fix="write that record again") from error
    return value


def holds_json(path: Path) -> bool:
    """Whether a file's name says that it holds records in JSON."""
    return _ending(path) in (".jsonl", ".json")


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """What stands on the lines of a UTF-8 file that are not empty, or, of a .json file that is one array, in that.

    Each after its place in words. InputError where it is no JSON.
    """
    if _ending(path) == ".json" and (text := _array(path)):
        values = _parsed(text, str(path), "close the array, and nothing behind it")
        if not values:
            raise InputError(f"{path} is empty", fix="give a file with records")
        yield from ((f"{path}, record {number}", value) for number, value in enumerate(values))
        return
    for where, text in _lines(path):
        yield where, _parsed(text, where, "put one JSON object on each line")


def _array(path: Path) -> str:
    """All of a file that begins as an array does; else nothing."""
    with _opened(path) as file:
        data = file.read(BEGINNING)
        if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return ""
        data += file.read(MAX_ARRAY)
    if len(data) > MAX_ARRAY:
        records = f"gzip -dc {path.name} | jq -c '.[]'" if _packed(path) else f"jq -c '.[]' {path.name}"
        fix = f"write its records on lines of their own: {records} > {_unpacked(path).stem}.jsonl"
        raise InputError(f"{path} is one JSON array of more than {MAX_ARRAY // 2**20} MiB", fix=fix)
    return _decoded(data, path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    offset = 0
    with _opened(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise InputError(f"{where} is longer than {MAX_LINE} bytes", fix="cut that document into several")
            text = _decoded(line, path, offset=offset)
            offset += len(line)
            if text := text.strip():
                yield where, text


def _parquet_documents(path: Path, column: str | None, render: Render) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "data", f"reading {path.name}") from None
    with _opened(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = text_columns(table.schema_arrow.names, column, str(path))
            batches = table.iter_batches(batch_size=64, columns=list(columns))
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, record in enumerate(records):
                yield _document(record, column, f"{path}, record {number}", render)
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} is not a sound parquet file: {error}", fix="write the file again") from error


def _parsed(text: str, where: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise InputError(f"{where}{line}, column {error.colno}: not JSON: {error.msg}", fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: JSON beyond bounds: {error}", fix="mend it there") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {type(value).__name__}, not an object", fix="give one JSON object for each record")
    return value


def _decoded(data: bytes, path: Path, *, offset: int = 0, whole: bool = True) -> str:
    """`data`, which begins `offset` bytes into the file, as text; unless `whole`, it may end within a character."""
    zero = data.find(0)
    if zero >= 0:
        raise InputError(
            f"{path} is binary or not UTF-8: a NUL at byte {offset + zero}", fix="give UTF-8 text; convert UTF-16 first"
        )
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: {error.reason} at byte {offset + error.start}", fix="convert the file to UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _ending(path: Path) -> str:
    """The ending of a file's name that says what is in it, small."""
    return _unpacked(path).suffix.lower()


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if _packed(path) else path


def _packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked where its name says that they are packed."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise InputError(f"{path} is {kind}, not a file", fix="name a file")
        if not status.st_size:
            raise InputError(f"{path} is empty", fix="give a file with text")
        with path.open("rb") as file:
            if _packed(path):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    if not unpacked.peek(1):
                        raise InputError(f"{path} is empty", fix="give a file with text")
                    yield unpacked
            else:
                yield file
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"cannot read {path}: {reason}", fix="check the path and its permissions") from error


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except BlockprunerError:
        raise
    except Exception as error:  # the hub, the network and the files of a data set raise whatever they like
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"cannot read the hub data set {name}: {reason}",
            fix="check name, config, split and connection (HF_HUB_OFFLINE), or give a local file",
        ) from error
