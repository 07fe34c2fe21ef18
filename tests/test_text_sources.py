"""A source of text means what its name says: recipes as in the paper, slices as in Python, files as they are."""

import json
import logging
import random
import sys
from typing import Any

import numpy
import pytest

from blockpruner.errors import InputError, MachineError
from blockpruner.texts import sources as texts
from blockpruner.texts.sources import open_texts

RECORDS = [
    {"instruction": f"Name {number} dogs.", "input": "" if number % 3 else f"Dogs of {number}.", "output": "Rex."}
    for number in range(400)
]


def read(source, **options: Any):
    return list(open_texts(source, **options).documents)


@pytest.fixture
def alpaca_file(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def paper_draw(rows, count):
    """The rows that the paper's code draws: the module's own generator, seeded with 42 before anything else."""
    state = random.getstate()
    try:
        random.seed(42)
        return random.sample(range(rows), count)
    finally:
        random.setstate(state)


class TestAlpaca:
    def test_records_are_written_as_in_the_paper(self, alpaca_file):
        with_input, without = read(f"{alpaca_file}[0:2]")
        assert with_input == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nName 0 dogs.\n\n### Input:\nDogs of 0.\n\n### Response:\nRex."
        )
        assert without == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName 1 dogs.\n\n### Response:\nRex."
        )

    @pytest.mark.parametrize(("part", "count"), [("", 256), ("[:64]", 64), ("[:32]", 32)])
    def test_rows_are_drawn_as_in_the_paper(self, alpaca_file, part, count):
        in_file_order = read(alpaca_file)
        drawn = read(f"alpaca:{alpaca_file}{part}")
        assert drawn == [in_file_order[index] for index in paper_draw(400, count)]

    def test_the_hub_recipe_draws_from_the_papers_half_of_the_test_part(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*names, **options):
            asked.append((names, options))
            return datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(52002)]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        test_part = numpy.random.default_rng(42).permutation(52002)[:10401]
        half = test_part[numpy.random.default_rng(42).permutation(10401)[5201:]]
        assert len(half) == 5200
        assert read("alpaca[:64]") == [f"row {half[index]}" for index in paper_draw(5200, 64)]
        assert asked == [(("tatsu-lab/alpaca", None), {"split": "train", "streaming": False})]

    def test_its_order_is_its_own(self, alpaca_file):
        assert open_texts(f"alpaca:{alpaca_file}").recipe
        assert not open_texts(alpaca_file).recipe


class TestWikitext:
    def test_lines_become_the_rows_of_the_hub(self, tmp_path):
        path = tmp_path / "wiki.raw"
        path.write_bytes(" \n = Title = \n \n Text with a \x85 in it , \u2028 and more . \n".encode())
        assert read(f"wikitext2:{path}") == ["", " = Title = \n", "", " Text with a \x85 in it , \u2028 and more . \n"]

    def test_the_real_text_joins_to_what_papers_measure(self, data_folder):
        path = data_folder / "text" / "wikitext2_raw_valid.txt"
        rows = read(f"wikitext2:{path}")
        lines = path.read_bytes().decode().split("\n")
        assert lines.pop() == ""
        assert "\n\n".join(rows) == "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
        assert len(rows) == 3760

    def test_the_hub_recipe_names_the_raw_form_and_the_split(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*names, **options):
            asked.append((names, options["split"]))
            return datasets.Dataset.from_dict({"text": ["", " = Title = \n", ""]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read("wikitext2", split="test") == ["", " = Title = \n", ""]
        assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), "test")]


class TestBuiltin:
    def test_it_is_said_to_be_a_poor_calibration(self, caplog):
        with caplog.at_level(logging.WARNING, logger="blockpruner"):
            read("builtin[0:1]", quiet=True)
            assert not caplog.messages
            read("builtin[0:1]")
        assert len(caplog.messages) == 1
        assert "poor as a calibration" in caplog.messages[0]

    def test_no_paragraph_stands_in_two_documents(self):
        documents = read("builtin", quiet=True)
        paragraphs = [" ".join(part.split()) for document in documents for part in document.split("\n\n")]
        assert len(documents) > 50
        assert len(paragraphs) == len(set(paragraphs))

    def test_parts_of_it_are_disjoint_and_make_the_whole(self):
        first, second = read("builtin[:40]", quiet=True), read("builtin[40:]", quiet=True)
        assert len(first) == 40
        assert first + second == read("builtin", quiet=True)


class TestSlices:
    @pytest.mark.parametrize("part", ["0:3", "5:", ":7", "2:3", "398:500", ":"])
    def test_they_are_those_of_python(self, alpaca_file, part):
        start, stop = (int(end) if end else None for end in part.split(":"))
        assert read(f"{alpaca_file}[{part}]") == read(alpaca_file)[start:stop]

    def test_records_without_text_are_counted_and_left_out(self, tmp_path):
        path = tmp_path / "gaps.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["zero", "", "two", " \n", "four"]))
        assert read(f"{path}[1:5]") == ["two", "four"]

    @pytest.mark.parametrize("part", ["[3:3]", "[5:2]"])
    def test_an_empty_one_is_refused(self, alpaca_file, part):
        with pytest.raises(InputError, match="names no documents"):
            open_texts(alpaca_file + part)

    @pytest.mark.parametrize("part", ["[3]", "[0:9:2]", "[-3:]", "[a:b]"])
    def test_other_forms_are_no_source(self, part):
        with pytest.raises(InputError, match="no source of text"):
            open_texts(f"builtin{part}")

    def test_a_file_may_have_brackets_in_its_name(self, tmp_path):
        path = tmp_path / "part[0:1]"
        path.mkdir()
        with pytest.raises(InputError, match="a folder"):
            open_texts(str(path))


class TestNames:
    def test_a_label_has_no_folders(self, alpaca_file):
        assert open_texts(f"alpaca:{alpaca_file}[:9]").label == "alpaca:alpaca.jsonl[:9]"
        assert open_texts(f"{alpaca_file}[2:]").label == "alpaca.jsonl[2:]"
        assert open_texts("builtin[:3]", quiet=True).label == "builtin[:3]"

    @pytest.mark.parametrize("source", ["nonsense", "alpaca:", "builtin:x", "", "a/b/c", "https://example.org/a", "\0"])
    def test_what_is_none_is_told_what_there_is(self, source):
        with pytest.raises(InputError, match=r"parquet file, org/name\[:config\]"):
            open_texts(source)

    def test_a_missing_file_is_never_asked_of_the_hub(self, monkeypatch):
        monkeypatch.setattr(texts, "hub_documents", lambda *_: pytest.fail("asked the hub"))
        for name in ("texts/missing.jsonl", "texts/missing.json", "./org/name", "~/org", "texts/missing.txt.gz"):
            with pytest.raises(InputError):
                read(name)

    @pytest.mark.parametrize(
        ("source", "option"),
        [
            ("builtin", "split"),
            ("builtin", "column"),
            ("alpaca", "split"),
            ("wikitext2", "column"),
            ("x.jsonl", "split"),
        ],
    )
    def test_an_option_it_does_not_have_is_refused(self, source, option):
        with pytest.raises(InputError, match=f"no {option} to choose"):
            read(source, **{option: "anything"})

    def test_a_plain_text_has_no_columns(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("words")
        with pytest.raises(InputError, match="plain text, without columns"):
            open_texts(str(path), column="text")


class TestHub:
    def test_documents_come_from_the_hub_as_they_are_asked_for(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*names, **options):
            asked.append((names, options))
            rows = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "text": ["x", "y", "z"]})
            return rows.to_iterable_dataset() if options["streaming"] else rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        for offline in (True, False):
            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
            assert read("org/name:de[1:]", split="validation", column="body") == ["two", "three"]
        assert read("org/name") == ["x", "y", "z"]
        assert asked == [
            (("org/name", "de"), {"split": "validation", "streaming": False}),
            (("org/name", "de"), {"split": "validation", "streaming": True}),
            (("org/name", None), {"split": "train", "streaming": True}),
        ]

    def test_without_a_connection_the_next_step_is_said(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def load_dataset(*_names, **_options):
            raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(InputError, match=r"org/name: Couldn't reach 'org/name' on the Hub\n.*local file"):
            read("org/name")

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MachineError, match=r"blockpruner\[data\]"):
            read("org/name")


class TestBounds:
    def test_only_the_beginning_of_a_long_source_is_looked_at(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(texts, "MAX_TEXT", 100)
        path = tmp_path / "long.jsonl"
        path.write_text('{"text": "twenty characters .."}\n' * 9)
        with caplog.at_level(logging.WARNING, logger="blockpruner"):
            assert len(read(f"{path}[:5]")) == 5
            assert not caplog.messages
            assert len(read(str(path))) == 5
        assert caplog.messages[0].startswith("long.jsonl: only its first")
