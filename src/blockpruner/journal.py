"""The journal of a run: results on disk as soon as they are known, so that a killed run pays for nothing twice.

Every line is a JSON object whose last key is `crc`: the CRC-32 of the object without it, continued from the crc of
the line before. A changed, doubled, swapped or missing line therefore breaks the chain; only lines missing at the
very end cannot be told from a run that was killed earlier, and are treated like one. The first line holds the
identity of the run.

A journal grows by appending, where the writers of `artifacts` replace a file whole; hence a write of its own, here
and nowhere else. A write cut short leaves a last line without its newline; that tail alone is dropped on opening.
"""

import contextlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from blockpruner.artifacts import write_bytes
from blockpruner.errors import InputError, MachineError, RunFolderError

FORMAT = "blockpruner.journal"
VERSION = 1

_LINE = re.compile(rb'(\{.+),"crc":"([0-9a-f]{8})"\}', re.DOTALL)
_log = logging.getLogger("blockpruner")


class _End(NamedTuple):
    """Where a journal ends: its length in bytes and the crc of its last line."""

    size: int = 0
    crc: int = 0


class Journal:
    """A journal opened for appending; `records` are the objects it held on opening, the header left out.

    For one process at a time: whoever holds the run folder.
    """

    def __init__(self, path: Path, records: tuple[dict[str, Any], ...], end: _End) -> None:
        self.path = path
        self.records = records
        self._end = end
        with _writing(path):
            self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> Self:
        """Begin a journal at `path`, or go on with the one that is there.

        identity: all that the records depend on, by name; under another identity they would be answers to another
        question. RunFolderError lists what differs, old -> new. InputError names file, line and byte of any damage.
        """
        if not path.exists():
            write_bytes(path, _encode({"format": FORMAT, "version": VERSION, "identity": dict(identity)}, crc=0)[0])
        records, end, torn = _read(path)
        _check_header(path, records[0] if records else {}, identity)
        journal = cls(path, tuple(records[1:]), end)
        if torn:
            with _writing(path):
                journal._cut()
            _log.warning("%s: dropped %d bytes of an unfinished last line", path, torn)
        return journal

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """Add one line per record, in one write and one sync; on any failure the file is as it was before.

        A record is a JSON object without NaN and without a key `crc`. MachineError if the disk does not take it.
        """
        data, crc = b"", self._end.crc
        for record in records:
            line, crc = _encode(record, crc)
            data += line
        try:
            with _writing(self.path):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._handle, rest) :]
                os.fsync(self._handle)
            self._end = _End(self._end.size + len(data), crc)
        except BaseException:  # Ctrl-C too: a line this object does not know of would break the chain of the next
            with contextlib.suppress(OSError):
                self._cut()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self) -> None:
        os.ftruncate(self._handle, self._end.size)
        os.fsync(self._handle)


def read_journal(path: Path) -> tuple[dict[str, str], tuple[dict[str, Any], ...]]:
    """The identity and the records of a journal, to look at alone: it may be of any run, also one that goes on."""
    found, _, _ = _read(path)
    header = found[0] if found else {}
    _check_header(path, header, header.get("identity", {}))
    return header["identity"], tuple(found[1:])


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}",
            fix="free space or mend the disk, then run the same command again: it goes on from here",
        ) from error


def _encode(record: Mapping[str, object], crc: int) -> tuple[bytes, int]:
    """The line of `record` after a line with `crc`, and its own crc."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    crc = zlib.crc32(body, crc)
    return b'%s,"crc":"%08x"}\n' % (body[:-1], crc), crc


def _read(path: Path) -> tuple[list[dict[str, Any]], _End, int]:
    """All records of `path`, the header first; where the last whole line ends; bytes of a torn tail after it."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file", fix="name another run folder")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", fix="name another run folder") from error
    *lines, tail = data.split(b"\n")
    records, end = [], _End()
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        body = match[1] + b"}" if match else b""
        crc = zlib.crc32(body, end.crc)
        if match is None or match[2] != b"%08x" % crc:
            raise InputError(
                f"{path}, line {number}, byte {end.size}: damaged (its checksum does not follow from the line before)",
                fix="remove the file, or its lines from this one on; what they held is then evaluated again",
            )
        records.append(json.loads(body))
        end = _End(end.size + len(line) + 1, crc)
    return records, end, len(tail)


def _check_header(path: Path, header: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is not a {FORMAT} file", fix="remove it, or name another run folder")
    if header["version"] > VERSION:
        raise InputError(
            f"{path} is {FORMAT} version {header['version']}; this blockpruner reads up to {VERSION}",
            fix="pip install --upgrade blockpruner, or name another run folder",
        )
    begun = header["identity"]
    drift = [
        f"{key}: {begun.get(key, 'absent')} -> {identity.get(key, 'absent')}"
        for key in sorted({*begun, *identity})
        if begun.get(key) != identity.get(key)
    ]
    if drift:
        raise RunFolderError(
            f"{path} was begun with other inputs:\n  " + "\n  ".join(drift),
            fix="go back to those inputs, or name another run folder",
        )
