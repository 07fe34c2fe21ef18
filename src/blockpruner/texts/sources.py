"""What a source of text means. Nothing here knows of tensors.

A source is a name, or `name[start:stop]` for its documents start to stop - 1, counted from 0 in the source's own order:

- `FILE.txt`: one document; `FILE.jsonl`, `FILE.json` (an array, or lines as well), `FILE.parquet`: one a record, from
  the column `text` unless another is named, or formatted as Alpaca where records have `instruction` and `output`
  instead, or by the model's own chat template where they have `messages` (or `conversations`), see `chats`; text and
  JSON may be packed: `FILE.json.gz`;
- `org/name` or `org/name:config`: a data set of the Hugging Face hub, likewise one document a record;
  `org/name@revision`: as it is on a branch, such as `refs/convert/parquet` for sets that were a script once;
- `alpaca`: the documents BlockPruner calibrates on, in the order the paper draws them: 256 of the 5,200 rows of its
  test part; `alpaca[:64]` draws 64. `alpaca:FILE` draws from the records of a file instead;
- `wikitext2`: the rows of WikiText-2 (raw), empty ones too; `wikitext2:FILE` makes the same rows from the raw text;
- `builtin`: the topics of Python's `help()` by name, a paragraph that stands in several of them only in the first.
"""

import io
import itertools
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockpruner.errors import InputError
from blockpruner.texts.chats import Render, no_template
from blockpruner.texts.files import (
    ENDINGS,
    MAX_TEXT,
    PACKED,
    hub_documents,
    hub_rows,
    log,
    log_cut,
    read_documents,
    read_text,
)

PAPER_ROWS = 256
PAPER_SEED = 42

_SLICED = re.compile(r"(.+)\[(\d{0,12}):(\d{0,12})\]", re.ASCII | re.DOTALL)
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*(?:@[\w./-]+)?)(?::([\w.-]+))?", re.ASCII)
_FILE_ENDINGS = (".txt", ".jsonl", ".parquet", ".csv", ".json", ".md", ".tsv", ".gz", *PACKED)
_OPTIONS = {"hub": ("split", "column"), "wikitext2": ("split",), "FILE": ("column",)}


@dataclass(frozen=True)
class Texts:
    """The documents of one source, to be read once.

    label: the source as it was given, a file by its name without folders; documents: in the source's own order;
    recipe: whether that order, and rows without text, are part of what the source means.
    """

    label: str
    documents: Iterator[str]
    recipe: bool


def open_texts(
    source: str,
    *,
    split: str | None = None,
    column: str | None = None,
    quiet: bool = False,
    render: Render = no_template,
) -> Texts:
    """The documents that `source` names, read as they are asked for, at most MAX_TEXT characters of them.

    split: which part of a hub data set, `train` unless named; column: the column of records that holds the text;
    quiet: the caller knows what `builtin` is good for; render: makes text of the messages of a chat. InputError where a
    source cannot be read or has no such option.
    """
    name, start, stop = parse_slice(source)
    kind, place = _parse_name(name)
    for option, value in (("split", split), ("column", column)):
        if value is not None and option not in _OPTIONS.get(kind, ()):
            raise InputError(f"{source} has no {option} to choose", fix=f"leave the {option} {value!r} out")
    if kind == "builtin" and not quiet:
        log.warning("builtin text is Python's own documentation: good for a demo, poor as a calibration")
    found = _documents(kind, place, split or "train", column, PAPER_ROWS if stop is None else stop, render)
    documents = itertools.islice(found, start, stop)
    recipe = kind.startswith(("alpaca", "wikitext2"))
    label = source
    if kind.endswith("FILE"):
        label = name.removesuffix(place) + Path(place).name + source.removeprefix(name)
    return Texts(label, _bounded(documents if recipe else filter(str.strip, documents), label), recipe)


def parse_slice(source: str) -> tuple[str, int, int | None]:
    """`NAME[start:stop]` taken apart: the name, the first document and the one after the last."""
    match = _SLICED.fullmatch(source)
    if match is None or os.path.exists(source):
        return source, 0, None
    name, start, stop = match[1], int(match[2] or 0), int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise InputError(f"{source} names no documents", fix="write NAME[start:stop] with stop greater than start")
    return name, start, stop


def _parse_name(name: str) -> tuple[str, str]:
    """The kind of source and what is left to open: a path for the kinds that end in FILE."""
    recipe, _, place = name.partition(":")
    if name in ("alpaca", "builtin", "wikitext2"):
        return name, ""
    if recipe in ("alpaca", "wikitext2") and place:
        return f"{recipe}:FILE", place
    if name.lower().endswith(_FILE_ENDINGS) or name.startswith((".", "/", "~")) or os.path.exists(name):
        return "FILE", name
    if HUB_NAME.fullmatch(name):
        return "hub", name
    raise InputError(
        f"{name!r} is no source of text, and no file of that name exists",
        fix=f"give a {ENDINGS} file, org/name[:config] on the hub, alpaca, wikitext2 or builtin;"
        " documents 0 to 199 of it are NAME[0:200]",
    )


def _documents(kind: str, place: str, split: str, column: str | None, drawn: int, render: Render) -> Iterable[str]:
    path = Path(os.path.expanduser(place))
    match kind:
        case "builtin":
            return _topics()
        case "alpaca":
            return _drawn(_alpaca_rows(), drawn)
        case "alpaca:FILE":
            return _drawn(list(read_documents(path, None)), drawn)
        case "wikitext2":
            return hub_documents("Salesforce/wikitext", "wikitext-2-raw-v1", split, "text")
        case "wikitext2:FILE":
            # Split at line feeds only: str.splitlines also splits where the hub's rows do not.
            return (line if line.strip() else "" for line in io.StringIO(read_text(path)))
        case "hub":
            data_set, _, config = place.partition(":")
            return hub_documents(data_set, config or None, split, column, render)
        case _:
            return read_documents(path, column, render)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, text in sorted(topics.items()):
        new = {" ".join(paragraph.split()): paragraph for paragraph in text.split("\n\n")}
        yield "\n\n".join(paragraph for key, paragraph in new.items() if key not in seen)
        seen.update(new)


def _alpaca_rows() -> Sequence[str]:
    """The 5,200 rows that BlockPruner calls its test part: two splits by `datasets`, as in the paper's code."""
    rows = hub_rows("tatsu-lab/alpaca", None, "train", stream=False)
    tenths = rows.train_test_split(test_size=0.2, seed=PAPER_SEED)["test"]
    return tenths.train_test_split(test_size=0.5, seed=PAPER_SEED)["train"]["text"]


def _drawn(rows: Sequence[str], count: int) -> list[str]:
    """`count` of the rows (all, if there are fewer) as the paper draws them: the first draw after its seed."""
    drawn = random.Random(PAPER_SEED).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in drawn]


def _bounded(documents: Iterable[str], label: str) -> Iterator[str]:
    total = 0
    for document in documents:
        if total >= MAX_TEXT:
            log_cut(label)
            return
        total += len(document)
        yield document
