"""What goes to disk: whole or not at all, outside the source, strict when it is read."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from blockpruner.artifacts import (
    Estimate,
    Work,
    check_new_folder,
    check_outside,
    new_folder,
    read_json,
    run_folder,
    write_json,
)
from blockpruner.errors import CheckFailedError, InputError, MachineError, RunFolderError
from blockpruner.plan import Plan


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    def half() -> None:
        with new_folder(tmp_path / "made") as aside:
            (aside / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "made") as aside:
        (aside / "whole").write_text("x")
        assert not (tmp_path / "made").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_an_error_that_is_not_about_writing_is_not_dressed_up_as_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="something else"), new_folder(tmp_path / "made"):
        raise FileNotFoundError(errno.ENOENT, "something else")
    with pytest.raises(MachineError, match="cannot write"), new_folder(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("inside", [".", "runs", "a/b", "link"])
def test_a_run_folder_in_the_source_is_refused_whatever_way_it_is_spelt(tmp_path: Path, inside: str):
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    path = tmp_path / "link" / "runs" if inside == "link" else source / inside
    with pytest.raises(InputError, match="lies in the source model"), run_folder(path, sources=[source]):
        pass
    assert list(source.iterdir()) == []
    check_outside(tmp_path / "beside", [source])


def test_a_run_folder_is_held_by_one_at_a_time(tmp_path: Path):
    taken = pytest.raises(RunFolderError, match=r"in use by process \d+")
    with run_folder(tmp_path / "run"), taken, run_folder(tmp_path / "run"):
        pass
    with run_folder(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_not_taken_for_a_busy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(MachineError, match="cannot be locked: No locks available"), run_folder(tmp_path / "run"):
        pass


def test_a_place_where_nothing_can_be_made_is_no_bug_of_ours():
    for making in (new_folder, run_folder):
        with pytest.raises(MachineError, match="cannot write"), making(Path("/proc/made")):
            pass
    with pytest.raises(MachineError, match="cannot write"):
        write_json(Path("/proc/made.json"), {})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EBUSY, errno.EXDEV])
def test_a_write_that_the_system_refuses_is_told_also_by_the_text_of_a_library(tmp_path: Path, number: int):
    said = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    for error in (OSError(number, os.strerror(number)), SafetensorError(said)):
        with pytest.raises(MachineError, match=f"cannot write .*: {os.strerror(number)}"), new_folder(tmp_path / "out"):
            raise error
    with pytest.raises(CheckFailedError), new_folder(tmp_path / "out"):
        raise CheckFailedError(said, fix="none")


def test_a_mount_point_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(InputError, match=r"is a mount point.*\n.*name a new folder in it"), new_folder(tmp_path):
        pytest.fail("something was made")
    check_new_folder(tmp_path / "model")


def test_files_of_a_new_folder_can_be_read_by_all(tmp_path: Path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "model.safetensors").touch(mode=0o600)
    made = [tmp_path / "out", tmp_path / "out/inner", tmp_path / "out/inner/model.safetensors"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o755, 0o755, 0o644]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "line 1, column 2"), ("\0", "not JSON"), ("[" * 100_000, "not JSON"), ("\ud800", "not JSON")],
)
def test_what_is_no_json_is_refused_with_the_file_and_the_place(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"plan\.json") as caught:
        read_json(path)
    assert reason in str(caught.value)


def test_a_newer_version_is_refused_by_its_number(tmp_path: Path):
    write_json(tmp_path / "plan.json", {"format": "blockpruner.plan", "version": 99, "steps": []})
    with pytest.raises(InputError, match=r"version 99; this blockpruner reads up to 1"):
        Plan.load(tmp_path / "plan.json")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_an_estimate_is_the_mean_and_its_standard_error(values: list[float]):
    found = Estimate.of(values, "nats")
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    assert found.value == pytest.approx(mean, abs=1e-6)
    assert found.stderr == pytest.approx((variance / len(values)) ** 0.5, abs=1e-6)
    assert json.loads(found.model_dump_json())["n"] == len(values)


def test_one_value_has_no_standard_error_and_says_why():
    assert Estimate.of([2.0], "nats").stderr is None
    assert Estimate.of([2.0], "nats").reason == "one unit has no spread"


def test_work_adds_up_by_kind():
    total = Work(attention_tokens=1, mlp_tokens=2) + Work(mlp_tokens=3, head_tokens=4)
    assert total == Work(attention_tokens=1, mlp_tokens=5, head_tokens=4)
