"""The README's table of what recoveries win back, made from experiments/recovery.json.

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
)
PLACE = re.compile(
    r"(?<=<!-- recovered: made by benchmarks/recovery_table.py -->\n).*?(?=<!-- end of recovered -->)", re.DOTALL
)


def main() -> None:
    README.write_text(PLACE.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")


def table() -> str:
    """All of the ladder that was measured, cheapest first, between the plans that it stands between."""
    rows = json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    shown = [_row("(dense)", _found(rows, "plain", "closed", blocks=0))]
    shown.append(_row(f"(without {BLOCKS} blocks)", _found(rows, "plain", "closed")))
    shown.append(_row(f"(without {BLOCKS - 1})", _found(rows, "plain", "closed", blocks=BLOCKS - 1)))
    shown += [_row(name, found) for method, text, name in LADDER if (found := _found(rows, method, text))]
    return markdown(shown)


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
        share = row.get("recovered_share")
        shown[title] = f"{row['log_perplexity']:.3f}"
        won = "left out: worse on held-out text" if row.get("applied") is False else f"{share or 0:.0%}"
        shown[f"{title} won back"] = "" if share is None else won
    return shown


if __name__ == "__main__":
    main()
