"""The README's tables of what recoveries win back, made from experiments/recovery.json.

python benchmarks/recovery_table.py
"""

import json
import re
from pathlib import Path
from typing import Any

from blockpruner.catalogue import markdown

REPO = Path(__file__).resolve().parents[1]
FIGURES, README = REPO / "experiments" / "recovery.json", REPO / "README.md"
BLOCKS, PLAN = 9, "searched"
TEXTS = ("WikiText-2 valid", "C4 200-299")
# Method as rows have it, text that it was fitted on, and how the README calls it; trainings differ in their options.
LADDER = (
    ("bias", "closed", "`bias`"),
    ("span:rank=64", "closed", "`span:rank=64`"),
    ("linear:rank=64", "closed", "`linear:rank=64`"),
    ("linear:target=dense", "closed", "`linear:target=dense`"),
    ("linear:target=dense,refit", "closed", "`linear:target=dense,refit`"),
    ("linear:target=dense,refit", "trained", "`linear:target=dense,refit`"),
    ("mlp", "trained", "`mlp`"),
    ("mlp,refit", "trained", "`mlp,refit`"),
    ("linear,lora:tokens", "trained", "`linear,lora`, by the text"),
    ("span,lora:tokens", "fisher", "`span,lora:loss=fisher`"),
    ("linear:target=dense,refit,lora:tokens", "again", "`linear:target=dense,refit,lora:loss=kl`"),
    ("linear:target=dense,refit,lora:tokens", "written", "the same with `written=1`"),
    ("mlp,refit,lora:tokens", "written", "`mlp,refit,lora:loss=kl,written=1`"),
    ("mlp:neurons=2560,refit,lora:tokens", "written", "`mlp:neurons=2560,refit,lora:loss=kl,written=1`"),
)
SIZES = (6, 9, 12)
BY_SIZE = (
    "plain",
    "bias",
    "span",
    "linear:rank=64",
    "linear",
    "linear:target=dense",
    "linear:target=dense,refit",
    "mlp",
)


def place(name: str) -> re.Pattern[str]:
    """Where the README has a table of this name."""
    made = f"<!-- {name}: made by benchmarks/recovery_table.py -->\n"
    return re.compile(rf"(?<={re.escape(made)}).*?(?=<!-- end of {name} -->)", re.DOTALL)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = place(name).sub(lambda _, make=make: make(), text)
    README.write_text(text, encoding="utf-8")


def table() -> str:
    """All of the ladder that was measured, cheapest first, between the plans that it stands between."""
    rows = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    shown = [_row("(dense)", _found(rows, "plain", "closed", blocks=0))]
    shown.append(_row(f"(without {BLOCKS} blocks)", _found(rows, "plain", "closed")))
    shown.append(_row(f"(without {BLOCKS - 1})", _found(rows, "plain", "closed", blocks=BLOCKS - 1)))
    shown += [_row(name, found) for method, text, name in LADDER if (found := _found(rows, method, text))]
    return markdown(shown)


def sizes() -> str:
    """What closed forms win back of WikiText-2 where more or less was removed, of those measured at every size."""
    rows, shown = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"], list[dict[str, Any]]()
    for method in BY_SIZE:
        found = {n: row for n in SIZES if (row := _found(rows, method, "closed", blocks=n).get(TEXTS[0]))}
        cells: dict[str, Any] = {"": f"`{method}`" if method != "plain" else "(nothing)"}
        for blocks, row in found.items():
            cells |= {f"{blocks} blocks": f"{row['log_perplexity']:.3f}", f"won back of {blocks}": _won(row)}
        shown += [cells] if len(found) == len(SIZES) else []
    return markdown(shown)


def _won(row: dict[str, Any]) -> str:
    """The share in words; nothing of a plain plan."""
    if row.get("recovered_share") is None or row["method"] == "plain":
        return ""
    return "left out: worse on held-out text" if row.get("applied") is False else f"{row['recovered_share']:.0%}"


def _found(rows: list[dict[str, Any]], method: str, text: str, blocks: int = BLOCKS) -> dict[str, dict[str, Any]]:
    """The rows of a method by text: in float32, where there are such."""

    def fits(row: dict[str, Any]) -> bool:
        full = row["method"]
        marked = next((mark for mark in ("written", "fisher") if mark in full), "")
        named = full.startswith(method) if ":tokens" in method else full == method
        fitted = row.get("fitted") == ("closed" if text == "closed" else "trained")
        place = row["plan"] == PLAN and row["removed_blocks"] == blocks and "failed" not in row
        return place and named and fitted and marked == (text if text in ("written", "fisher") else "")

    order = sorted(filter(fits, rows), key=lambda row: row.get("dtype") == "float32")
    return {row["text"]: row for row in order}


def _row(name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = found[TEXTS[0]]
    tokens = first.get("tokens", 0)
    shown: dict[str, Any] = {
        "": name,
        "tokens": f"{tokens:,}" if tokens else "",
        "dtype": first.get("dtype", ""),
        "parameters": f"{first['parameters'] / 1e6:.1f} M",
    }
    for text in TEXTS:
        row, title = found[text], text.partition(" ")[0]
        shown[title] = f"{row['log_perplexity']:.3f}"
        shown[f"{title} won back"] = _won(row)
    return shown


TABLES = {"recovered": table, "sizes": sizes}

if __name__ == "__main__":
    main()
