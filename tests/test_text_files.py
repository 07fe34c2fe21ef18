"""Whatever a file of text holds, it is read, or refused with place and reason; nothing hangs or fills the memory."""

import errno
import gzip
import json
import logging
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.errors import InputError, MachineError
from blockpruner.texts import files as textfiles
from blockpruner.texts.files import read_documents, read_text


def documents(path, column=None):
    return list(read_documents(path, column))


GOOD = b'{"text": "a dog"}\n'
NESTED = b"[" * 100_000

BAD = {
    "an empty file": ("a.txt", b"", "is empty"),
    "an empty file of records": ("a.jsonl", b"", "is empty"),
    "a NUL byte": ("a.txt", b"dog\0cat", "NUL at byte 3"),
    "a NUL byte in a line": ("a.jsonl", GOOD + b'{"text": "\0"}', "NUL at byte 28"),
    "UTF-16": ("a.txt", "dog".encode("utf-16"), "convert UTF-16"),
    "Latin-1": ("a.txt", "naïve".encode("latin-1"), "not UTF-8.* at byte 2"),
    "Latin-1 in a line": ("a.jsonl", GOOD + b'{"text": "\xff"}', "not UTF-8.* at byte 28"),
    "a cut character": ("a.txt", "naï".encode()[:-1], "not UTF-8.* at byte 2"),
    "packed bytes under a wrong name": ("a.txt", gzip.compress(b"dog" * 99), "not UTF-8"),
    "a packed file": ("a.tar.gz", gzip.compress(b"dog"), "packed file"),
    "a packed file under a wrong name": ("a.txt.gz", b"dog", "[Nn]ot a gzipped file"),
    "a packed file with nothing in it": ("a.txt.gz", gzip.compress(b""), "is empty"),
    "packed parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), "packed file"),
    "an array of nothing": ("a.json", b" []", "is empty"),
    "an object on several lines": ("a.json", b'{\n "text": "a dog"\n}', r"a\.json, line 1, column 2: not JSON"),
    "half of a packed file": ("a.txt.gz", gzip.compress(b"dog" * 99)[:-9], "ended before the end"),
    "a packed file that was damaged": ("a.jsonl.gz", gzip.compress(GOOD)[:12] + b"\xff" * 40, "cannot read"),
    "a JSON object without text": ("a.json", b"{}", r"no column 'text'; its columns: none"),
    "an array that does not close": ("a.json", b"[" + GOOD, "not JSON: Expecting ',' delimiter"),
    "an array of text": ("a.json", b'[{"text": "a dog"},\n"a dog"]', "record 1: str, not an object"),
    "an array of arrays": ("a.json", NESTED, "JSON beyond bounds"),
    "a line that is not JSON": ("a.jsonl", GOOD + b"\nbroken\n", "line 3, column 1: not JSON"),
    "a list": ("a.jsonl", b'["a dog"]\n', "line 1: list, not an object"),
    "too deep nesting": ("a.jsonl", b'{"text": ' + NESTED, "line 1.* JSON beyond bounds"),
    "too long a number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1.* JSON beyond bounds"),
    "half a surrogate pair": ("a.jsonl", rb'{"text": "\ud800"}', "line 1.* surrogates not allowed"),
    "no text column": (
        "a.jsonl",
        GOOD + b'{"body": "x", "id": 3}\n',
        "has no column 'text'.*: body, id\n.* --column",
    ),
    "a number as text": ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
    "no output": ("a.jsonl", b'{"instruction": "x", "output": null}\n', "'output' holds NoneType"),
    "no parquet": ("a.parquet", b"PAR1 dogs and cats PAR1", "not a sound parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_file_place_and_reason(tmp_path, name):
    file, content, reason = BAD[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        documents(path)
    assert str(path) in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("blank", [b"", b"\n  ", b"\xef\xbb\xbf"])
def test_a_json_file_is_an_array_of_records_or_one_on_each_line(tmp_path, blank):
    records = [{"text": "a dog"}, {"text": "two\ncats"}]
    path = tmp_path / "a.json"
    for content in (json.dumps(records, indent=1), "\n".join(map(json.dumps, records))):
        path.write_bytes(blank + content.encode())
        assert documents(path) == ["a dog", "two\ncats"]


def test_packed_text_and_records_are_unpacked_as_they_are_read(tmp_path):
    for name, content, expected in [
        ("a.txt.gz", b"a dog\n", ["a dog\n"]),
        ("a.jsonl.gz", GOOD * 2, ["a dog"] * 2),
        ("a.JSON.GZ", b'[{"text": "a dog"}]', ["a dog"]),
    ]:
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert documents(tmp_path / name) == expected


def test_a_packed_file_is_unpacked_no_further_than_it_is_looked_at(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 2 + b" " * (textfiles.MAX_LINE + 1)))
    found = read_documents(path, None)
    assert [next(found), next(found)] == ["a dog", "a dog"]
    with pytest.raises(InputError, match="line 3 is longer than"):
        next(found)


def test_an_array_beyond_what_is_read_whole_is_refused_with_the_way_to_make_lines_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "MAX_ARRAY", 30)
    path = tmp_path / "alpaca.json"
    path.write_bytes(b"[" + b",".join([GOOD] * 3) + b"]")
    with pytest.raises(InputError, match="one JSON array of more than") as caught:
        documents(path)
    assert "jq -c '.[]' alpaca.json > alpaca.jsonl" in caught.value.fix


def test_a_missing_file_a_folder_and_a_loop_of_links_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name, reason in [("none.txt", "No such file"), ("folder.txt", "a folder"), ("loop.txt", "cannot read")]:
        with pytest.raises(InputError, match=reason):
            documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="a pipe or device"):
        documents(tmp_path / name)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert documents(tmp_path / "b.txt") == ["a dog"]


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.txt").write_text("a dog")
    monkeypatch.setattr(Path, "open", refuse)  # the file mode would not hold for root
    with pytest.raises(InputError, match=r"a\.txt: Permission denied"):
        documents(tmp_path / "a.txt")


def test_a_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone\r\ntwo\n\n\u2028thrée \n".encode())
    assert documents(path) == ["one\r\ntwo\n\n\u2028thrée \n"]


@settings(deadline=None, max_examples=40)
@given(text=st.text(min_size=1, max_size=40), bound=st.integers(1, 60))
def test_a_long_text_is_cut_between_characters(tmp_path_factory, text, bound):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    data = text.replace("\0", " ").replace("\ufeff", " ").encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "MAX_TEXT", bound)
        assert read_text(path) == data[:bound].decode(errors="ignore")


def test_a_cut_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(textfiles, "MAX_TEXT", 10)
    path = tmp_path / "long.txt"
    with caplog.at_level(logging.WARNING, logger="blockpruner"):
        path.write_bytes(b"d" * 10)
        assert len(read_text(path)) == 10
        assert not caplog.messages
        path.write_bytes(b"d" * 11)
        assert len(read_text(path)) == 10
    assert caplog.messages[0].startswith("long.txt: only its first")


def test_a_huge_line_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.truncate(2**28)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"line 2 is longer than {textfiles.MAX_LINE} bytes"):
            documents(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * textfiles.MAX_LINE
    finally:
        tracemalloc.stop()


def test_records_may_have_blank_lines_between_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n  \n" + GOOD.strip())
    assert documents(path) == ["a dog", "a dog"]


def test_a_column_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a dog", "body": "a cat"}) + "\n")
    assert documents(path, "body") == ["a cat"]
    with pytest.raises(InputError, match=r"no column 'bodies'.*: text, body"):
        documents(path, "bodies")


def test_an_alpaca_record_may_lack_its_input(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "Bark.", "output": "Woof."} | extra for extra in ({}, {"input": None}, {"input": ""})]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = documents(path)
    assert first.endswith("### Instruction:\nBark.\n\n### Response:\nWoof.")
    assert others == [first, first]


class TestParquet:
    @pytest.fixture
    def write(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        def write(columns):
            parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
            return tmp_path / "a.parquet"

        return write

    def test_its_records_are_documents(self, write):
        path = write({"id": range(200), "text": [f"dog {number}" for number in range(200)]})
        assert documents(path) == [f"dog {number}" for number in range(200)]

    def test_alpaca_records_are_formatted(self, write):
        path = write({"instruction": ["Bark."], "input": ["Now."], "output": ["Woof."]})
        assert documents(path)[0].endswith("### Instruction:\nBark.\n\n### Input:\nNow.\n\n### Response:\nWoof.")

    def test_a_wrong_column_lists_the_columns(self, write):
        with pytest.raises(InputError, match=r"a\.parquet has no column 'text'.*: id, body"):
            documents(write({"id": [1], "body": ["dog"]}))

    def test_a_column_without_text_names_the_record(self, write):
        with pytest.raises(InputError, match="record 1: column 'text' holds NoneType"):
            documents(write({"text": ["dog", None]}))

    def test_damage_is_an_input_error(self, write):
        path = write({"text": [f"dog {number}" for number in range(2000)]})
        data = path.read_bytes()
        for cut in (len(data) - 1, len(data) // 2, 3):
            path.write_bytes(data[:cut])
            with pytest.raises(InputError, match=r"a\.parquet"):
                documents(path)

    def test_a_missing_package_names_the_extra(self, write, monkeypatch):
        path = write({"text": ["dog"]})
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MachineError, match=r"blockpruner\[data\]"):
            documents(path)
