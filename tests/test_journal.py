"""The journal keeps what it was given, and never gives back anything else."""

import errno
import json
import logging
import os

import pytest

from blockpruner import journal as journal_module
from blockpruner.errors import InputError, MachineError, RunFolderError
from blockpruner.journal import Journal

IDENTITY = {"model": "abc", "dtype": "float32"}
RECORDS = [{"mask": "dense", "batch": 0, "losses": [1.5, "nan"]}, {"mask": "mlp.1", "batch": 1, "losses": [0.1, 2e-9]}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def written(path):
    """A journal of one header and four records, as bytes; it is at `path` too."""
    with Journal.open(path, IDENTITY) as journal:
        journal.append(RECORDS)
        journal.append(RECORDS)
    return path.read_bytes()


def records_of(path):
    with Journal.open(path, IDENTITY) as journal:
        return list(journal.records)


def test_records_come_back_in_order_and_exactly(written, path):
    assert records_of(path) == RECORDS * 2


def test_every_line_is_strict_json_that_other_tools_can_read(written):
    header, *records = [json.loads(line) for line in written.splitlines()]
    assert header["identity"] == IDENTITY
    assert [{key: record[key] for key in ("mask", "batch", "losses")} for record in records] == RECORDS * 2


def test_a_reopened_journal_goes_on_as_if_it_had_never_been_closed(written, tmp_path):
    other = tmp_path / "other.jsonl"
    with Journal.open(other, IDENTITY) as journal:
        for record in RECORDS * 2:
            journal.append([record])
    assert other.read_bytes() == written


def test_nan_is_not_written(path):
    with Journal.open(path, IDENTITY) as journal, pytest.raises(ValueError, match="JSON"):
        journal.append([{"loss": float("nan")}])
    assert records_of(path) == []


def test_a_torn_last_line_is_dropped_wherever_it_was_cut_and_said_once(written, path, caplog):
    last = written[:-1].rindex(b"\n") + 1
    for cut in range(last + 1, len(written)):
        path.write_bytes(written[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "blockpruner"), Journal.open(path, IDENTITY) as journal:
            assert list(journal.records) == (RECORDS * 2)[:-1]
            journal.append(RECORDS[-1:])
        assert [f"{cut - last} bytes" in message for message in caplog.messages] == [True]
        assert path.read_bytes() == written


def test_a_journal_that_ends_with_a_whole_line_is_not_complained_of(written, path, caplog):
    path.write_bytes(written[: written[:-1].rindex(b"\n") + 1])
    assert records_of(path) == (RECORDS * 2)[:-1]
    assert not caplog.messages


def test_no_flipped_bit_goes_unnoticed(written, path, caplog):
    for byte in range(len(written)):
        for bit in (byte % 8, (byte + 3) % 8):
            damaged = bytearray(written)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            caplog.clear()
            if byte == len(written) - 1:  # without its newline, the last line is a torn one
                assert records_of(path) == (RECORDS * 2)[:-1]
                assert caplog.messages
            else:
                with pytest.raises(InputError):
                    records_of(path)


def damaged_orders():
    lines = range(5)
    for i in lines:
        if i < 4:
            yield f"line {i} missing", [j for j in lines if j != i]
        yield f"line {i} doubled", sorted([*lines, i])
        for j in range(i):
            yield f"lines {j} and {i} swapped", [{i: j, j: i}.get(k, k) for k in lines]


@pytest.mark.parametrize("order", [pytest.param(order, id=name) for name, order in damaged_orders()])
def test_missing_doubled_and_swapped_lines_are_noticed(written, path, order):
    lines = written.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(InputError, match="damaged"):
        records_of(path)


def test_damage_is_named_by_file_line_and_byte(written, path):
    lines = written.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3].replace(b"nan", b"inf") + lines[4])
    with pytest.raises(InputError) as error:
        records_of(path)
    assert f"{path}, line 4, byte {len(b''.join(lines[:3]))}" in error.value.what
    assert "from this one on" in error.value.fix


def test_lines_before_the_damage_are_still_good_once_the_rest_is_removed(written, path):
    path.write_bytes(b"".join(written.splitlines(keepends=True)[:3]))
    assert records_of(path) == RECORDS


def test_other_inputs_are_refused_with_every_difference(written, path):
    drifted = {"model": "xyz", "dtype": "float32", "seed": "1"}
    with pytest.raises(RunFolderError) as error:
        Journal.open(path, drifted)
    assert "model: abc -> xyz" in error.value.what
    assert "seed: absent -> 1" in error.value.what
    assert "dtype" not in error.value.what
    assert path.read_bytes() == written


def test_a_newer_version_is_refused_by_name(path, monkeypatch):
    monkeypatch.setattr(journal_module, "VERSION", 2)
    Journal.open(path, IDENTITY).close()
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 2; this blockpruner reads up to 1"):
        Journal.open(path, IDENTITY)


@pytest.mark.parametrize(
    "content", [b"", b"a diary", b"a diary\n", b'{"format":"blockpruner.journal","vers', b"\0" * 99]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError):
        Journal.open(path, IDENTITY)
    assert path.read_bytes() == content


def test_a_pipe_is_refused_instead_of_waited_for(path):
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        Journal.open(path, IDENTITY)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_failed_append_leaves_the_journal_as_it_was_and_usable(written, path, monkeypatch, failure, where):
    real = {"write": os.write, "fsync": os.fsync}

    def fails(handle, *data):
        monkeypatch.undo()
        if data:
            os.write(handle, data[0][:10])
        raise failure

    with Journal.open(path, IDENTITY) as journal:
        monkeypatch.setattr(os, where, fails)
        with pytest.raises(MachineError if isinstance(failure, OSError) else KeyboardInterrupt):
            journal.append(RECORDS)
        assert path.read_bytes() == written
        assert getattr(os, where) is real[where]
        journal.append(RECORDS)
    assert records_of(path) == RECORDS * 3


def test_a_write_that_takes_only_part_of_the_data_is_continued(path, monkeypatch):
    real = os.write
    with Journal.open(path, IDENTITY) as journal:
        monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
        journal.append(RECORDS)
        monkeypatch.undo()
    assert records_of(path) == RECORDS


def test_a_read_only_folder_is_the_machines_fault_and_says_so(tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(MachineError, match="Read-only"):
        Journal.open(tmp_path / "journal.jsonl", IDENTITY)
