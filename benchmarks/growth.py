"""How the cost of a search grows with the depth of the model and with the calibration text: counted work.

    python benchmarks/growth.py --json experiments/growth.json

One in twelve of the blocks of tiny Llama models goes, by three searches: the published loop (every candidate, every
token, a full pass), `exhaustive` and `greedy`. Work is counted in block-tokens and head-tokens. What a race needs
depends on the losses, which are those of a rehearsal: their law is that of a real model's first five steps. The counts
of the exhaustive search are set beside those of a real run on the shallowest model, whose winners are others. Beside
the JSON lies a picture with the fitted exponents.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from racing import published
from search_cost import commit
from transformers import AutoModelForCausalLM, LlamaConfig

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.engine.objective import ModelObjective
from blockpruner.planning import BATCH_TOKENS, SEGMENT
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import Greedy
from blockpruner.searching import driver
from blockpruner.searching.contract import Problem
from blockpruner.searching.moves import Target
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.texts.examples import Signs, examples_of

DEPTHS = (12, 24, 48, 96)
TOKENS = (2048, 8192, 32768, 131072)
WINDOW = 256
SHARE = 12  # one in so many blocks goes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("experiments/growth.json"))
    options = parser.parse_args()
    sizes = [(depth, 8192) for depth in DEPTHS] + [(24, tokens) for tokens in TOKENS if tokens != 8192]
    rows = [row for depth, tokens in sizes for row in counted(depth, tokens)]
    fits = {axis: fitted(rows, axis) for axis in ("depth", "tokens")}
    figures = {
        "command": "python benchmarks/growth.py --json experiments/growth.json",
        "commit": commit(),
        "checked": checked(),
        "exponents": fits,
        "rows": rows,
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    picture(rows, fits, options.json.with_suffix(".png"))
    print(json.dumps(fits, indent=1))


def objective(depth: int, tokens: int) -> ModelObjective:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=depth,
        num_attention_heads=1,
        max_position_embeddings=WINDOW,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = torch.randint(0, 64, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    examples = examples_of(model, windows, Signs())
    return ModelObjective(model, read_anatomy(model), examples, batch_tokens=BATCH_TOKENS, segment=SEGMENT)


def counted(depth: int, tokens: int) -> list[dict[str, Any]]:
    """The work of each search on this model and text."""
    ready = objective(depth, tokens)
    outline = ready.anatomy.outline
    removed = len(outline.blocks) // SHARE
    problem = Problem(outline, "block", Target.parse(f"blocks={removed}"), sizes=ready.sizes)
    rehearsal = Rehearsal(ready)
    works = {"published loop": published(ready, removed)}
    for name, search in (("exhaustive", Exhaustive()), ("greedy", Greedy())):
        works[name] = driver.run(search, problem, rehearsal).work
    print(f"{depth} layers, {tokens} tokens", flush=True)
    return [
        {
            "search": name,
            "depth": depth,
            "tokens": tokens,
            "removed": removed,
            "block_tokens": work.attention_tokens + work.mlp_tokens,
            "head_tokens": work.head_tokens,
        }
        for name, work in works.items()
    ]


def checked() -> dict[str, float]:
    """The counts of a rehearsal over those of a search that is really run: prefixes are shared by other winners.

    How the blocks divide between kinds depends on the winners most, their sum hardly.
    """
    ready = objective(DEPTHS[0], 1024)
    problem = Problem(ready.anatomy.outline, "block", Target.parse("blocks=2"), sizes=ready.sizes)
    real, rehearsed = (driver.run(Exhaustive(), problem, each).work for each in (ready, Rehearsal(ready)))
    blocks = [work.attention_tokens + work.mlp_tokens for work in (rehearsed, real)]
    kinds = real.model_dump()
    return {
        "block_tokens": blocks[0] / blocks[1],
        **{kind: said / kinds[kind] for kind, said in rehearsed.model_dump().items()},
    }


def fitted(rows: list[dict[str, Any]], axis: str) -> dict[str, dict[str, float]]:
    """Exponents of block- and head-tokens in the depth at 8,192 tokens, or in the tokens at 24 layers."""
    held = {"depth": ("tokens", 8192), "tokens": ("depth", 24)}[axis]
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["search"] for row in rows):
        chosen = [row for row in rows if row["search"] == name and row[held[0]] == held[1]]
        x = [math.log(row[axis]) for row in chosen]
        found[name] = {
            what: round(linear_regression(x, [math.log(row[what]) for row in chosen]).slope, 3)
            for what in ("block_tokens", "head_tokens")
        }
    return found


def picture(rows: list[dict[str, Any]], fits: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Block-tokens against depth and against tokens, on logarithmic axes."""
    import altair

    def panel(axis: str, title: str, chosen: list[dict[str, Any]]) -> Any:
        named = [
            {**row, "search": f"{row['search']}: exponent {fits[axis][row['search']]['block_tokens']:.2f}"}
            for row in chosen
        ]
        log = altair.Scale(type="log")
        return (
            altair.Chart(altair.Data(values=named), title=title, width=380, height=320)
            .mark_line(point=True)
            .encode(
                x=altair.X(f"{axis}:Q", scale=altair.Scale(type="log", base=2), title=axis),
                y=altair.Y("block_tokens:Q", scale=log, title="block-tokens"),
                color=altair.Color("search:N", title="search", sort=None),
            )
        )

    left = panel("depth", "Layers, at 8,192 tokens", [row for row in rows if row["tokens"] == 8192])
    right = panel("tokens", "Calibration tokens, at 24 layers", [row for row in rows if row["depth"] == 24])
    (left | right).resolve_scale(color="independent").save(str(path), scale_factor=1.5)


if __name__ == "__main__":
    main()
