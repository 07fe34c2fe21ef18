"""docs/architectures.md, made of what the sweep has measured.

python benchmarks/architectures_page.py experiments/architecture_sweep.json docs/architectures.md
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
HEADS = {"causal": "Causal language models", "masked": "Masked language models", "seq2seq": "Encoder-decoders"}
TOTALS = {
    "mapped": "entries in the three mappings of transformers",
    "instantiated": "of these make a tiny model that runs on text",
    "proved": "anatomy found and proved",
    "exact": "every removal equals zeroed projections, bit for bit",
    "cache_consistent_before": "causal ones whose cached generation agrees with uncached before anything is removed",
    "cache_equal": "of these still agree without the mixing blocks of layers 0, 1 and last",
    "layer_reload_equal": "whole layers removed, saved, and opened by plain transformers: equal logits",
    "block_reload_equal": "single blocks removed, saved, and opened (registered type, remote code): equal logits",
    "refused": "refused with a reason",
    "silently_wrong": "comparisons that came out wrong without an error",
}


def main(source: str, target: str) -> None:
    Path(target).write_text(page(json.loads(Path(source).read_text(encoding="utf-8"))), encoding="utf-8")


def page(sweep: Mapping[str, Any]) -> str:
    """The whole page as markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in sweep["versions"].items())
    lines = [
        "# Architectures",
        "",
        f"Measured on {sweep['date']} with {versions}: every entry of three mappings of",
        "transformers as a tiny model with random weights, two periods or more of its pattern of layers, in float32,",
        "on text.",
        "Made by `make sweep`, then",
        "`python benchmarks/architectures_page.py experiments/architecture_sweep.json docs/architectures.md`.",
        "What is refused is refused by name: [teaching.md](teaching.md) tells how to read the reasons.",
        "",
        "| | architectures |",
        "| --- | ---: |",
        *(f"| {text} | {sweep['totals'][name]} |" for name, text in TOTALS.items()),
        "",
        "- **removal**: largest difference of logits between blocks removed and the same blocks with their last",
        "  projection zero, over one block of each kind, and the first two and the last together.",
        "- **cache**: of the ways to generate that agree before removal (dynamic and static cache, left padding, a",
        "  loop that feeds token by token), those that agree after.",
        "- **layers**: whole layers removed (one in the middle, the first; of each stack) whose checkpoint plain",
        "  transformers opens with equal logits. Others are saved with stand-ins instead, as single blocks are.",
        "- **blocks**: a checkpoint without an attention and an mlp, opened after `import blockpruner` and by its own",
        "  code.",
        "- **search**: the mask tree agrees with plain forward passes, or plain passes are used.",
    ]
    for head, title in HEADS.items():
        rows = [row for row in sweep["rows"] if row["architecture"].startswith(f"{head}/")]
        lines += ["", f"## {title}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    columns = ("architecture", "blocks found", "removal", "cache", "layers", "blocks", "search", "remark")
    head = [f"| {' | '.join(columns)} |", "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |"]
    return head + [f"| {' | '.join(cells(row))} |" for row in rows]


def cells(row: Row) -> list[str]:
    name = row["architecture"].partition("/")[2]
    if not row.get("proved"):
        return [name, "refused" if row.get("instantiated") else "not built", *["-"] * 5, remark(row)]
    ways = [found for found in row.get("generation", {}).values() if found["before"] == "equal"]
    layers = list(row.get("layer_reload", {}).values())
    reloads = [row.get("registered"), row.get("remote")]
    gaps = [gap for gap in row["removal"].values() if gap is not None]
    return [
        name,
        ", ".join(f"{count} {kind}" for kind, count in row["blocks"].items()),
        f"{max(gaps, default=0):.2g}",
        f"{sum(found['after'] == 'equal' for found in ways)}/{len(ways)}" if ways else "-",
        f"{layers.count('equal')}/{len(layers)}",
        f"{reloads.count('equal')}/2",
        row.get("mask_tree", "-").partition(":")[0],
        remark(row),
    ]


def remark(row: Row) -> str:
    """The reasons, a sentence each."""
    found = [row.get("crash"), row.get("reason"), *row.get("wrong", ())]
    found += [f"layer {layer}: {text}" for layer, text in row.get("layer_reload", {}).items() if text != "equal"]
    found += [f"{way}: {row[way]}" for way in ("registered", "remote") if row.get(way, "equal") != "equal"]
    texts = [" ".join(text.split()).replace("|", "/") for text in found if text]
    return "; ".join(text if len(text) <= 160 else f"{text[:157]}..." for text in texts)


if __name__ == "__main__":
    main(*sys.argv[1:])
