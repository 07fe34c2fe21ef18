"""What searches cost on large models, from counted work: makes docs/scale.md.

    python benchmarks/scale.py

The searches are rehearsed on tiny models of the same depth as the large ones; their counts are multiplied by the sizes
of these. The law of the rehearsal's losses is that of five steps on a small model (`rehearsal.py`), so that what races
save is an extrapolation; the counts of the other searches are not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from growth import WINDOW, objective
from racing import published
from search_cost import commit

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask
from blockpruner.engine.masktree import sweep_traffic
from blockpruner.engine.objective import ModelObjective
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import STREAMED, Greedy
from blockpruner.searching import driver
from blockpruner.searching.contract import Problem
from blockpruner.searching.moves import Target
from blockpruner.searching.rehearsal import Rehearsal

TOKENS = 32768
SHARE = 0.4  # of a card's peak that a forward pass reaches
MEMORY = 64 * 2**30  # for states; what is beyond it is written to disk, and read again
SEARCHES = {"`exhaustive`": Exhaustive(), "`greedy`": Greedy(), "`greedy`, streamed": Greedy(growth=STREAMED)}
CARDS = {"A100 (312 TFLOP/s in bfloat16)": 312e12, "H100 SXM (989 TFLOP/s in bfloat16)": 989e12}
PAGE = Path("docs/scale.md")


class Row(NamedTuple):
    """A search and its work; where weights are streamed, how often all layers are read, and bytes of states spilled."""

    name: str
    work: Work
    reads: int
    spilled: int = 0


@dataclass(frozen=True)
class Large:
    """Shapes of a public model, from its configuration file. layer: parameters of one; removed: blocks."""

    name: str
    layers: int
    layer: float
    hidden: int
    vocabulary: int
    removed: int

    @property
    def parameters(self) -> float:
        return self.layers * self.layer + 2 * self.hidden * self.vocabulary


MODELS = (
    Large("Llama-2-7B", 32, 202.4e6, 4096, 32000, 17),
    Large("Llama-3.1-70B", 80, 855.7e6, 8192, 128256, 40),
    Large("Llama-3.1-405B", 126, 3187.7e6, 16384, 128256, 63),
)


def main() -> None:
    tables: list[str] = []
    for large in MODELS:
        ready = objective(large.layers, TOKENS)
        outline = ready.anatomy.outline
        problem = Problem(outline, "block", Target.parse(f"blocks={large.removed}"), sizes=ready.sizes)
        blocks = 2 * large.layers
        rows = [Row("published loop", published(ready, large.removed), sum(blocks - n for n in range(large.removed)))]
        for name, search in SEARCHES.items():
            spilled = list[int]()
            told = partial(count_spilled, ready, large, spilled)
            found = driver.run(search, problem, Rehearsal(ready, told=told))
            rows.append(Row(name, found.work, len(spilled), sum(spilled)))
            print(large.name, name, flush=True)
        tables.append(table(large, rows))
    PAGE.write_text(page(tables), encoding="utf-8")


def count_spilled(ready: ModelObjective, large: Large, spilled: list[int], asked: Mapping[int, Sequence[Mask]]) -> None:
    """Add what one request would spill, with states of the large model's width in bfloat16.

    Micro-batches of which the same is asked go as one, so that room is taken in larger pieces than it would be.
    """
    state, layers = 2 * large.hidden * TOKENS // ready.batches, ready.anatomy.stacks[0].layers
    alike = Counter(map(tuple, asked.values()))
    sized = {number: (masks, state * count) for number, (masks, count) in enumerate(alike.items())}
    spilled.append(sweep_traffic(layers, sized, MEMORY).spilled)


def operations(large: Large, work: Work) -> float:
    """Two per parameter and token, of half a layer for each block, and of the head."""
    blocks = work.attention_tokens + work.mlp_tokens
    return 2 * (blocks * large.layer / 2 + work.head_tokens * large.hidden * large.vocabulary)


def table(large: Large, found: Sequence[Row]) -> str:
    """One model: counts, operations, hours."""
    heads = " | ".join(f"hours, one {card}" for card in CARDS)
    weights, stack = 2 * large.parameters / 1e9, 2 * large.layers * large.layer / 1e9
    rows = [
        f"### {large.name}: {large.removed} of {2 * large.layers} blocks, {TOKENS:,} tokens",
        "",
        f"| search | block-tokens | head-tokens | 10^18 operations | {heads} | TB read | TB spilled |",
        "| --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(CARDS),
    ]
    for name, work, reads, spilled in found:
        total = operations(large, work)
        hours = " | ".join(f"{total / (SHARE * peak) / 3600:,.3g}" for peak in CARDS.values())
        blocks = work.attention_tokens + work.mlp_tokens
        read, moved = f"{reads * stack / 1e3:,.3g}", f"{spilled / 1e12:,.3g}"
        rows.append(
            f"| {name} | {blocks:.3g} | {work.head_tokens:.3g} | {total / 1e18:,.3g} | {hours} | {read} | {moved} |"
        )
    state, prefixes = 2 * large.hidden / 2**20, 2 * large.layers
    rows += [
        "",
        f"Weights in bfloat16: {weights:,.0f} GB. A prefix has {state * WINDOW:.1f} MiB per {WINDOW} tokens;",
        f"the first look of a step (1,024 tokens, at most {prefixes} prefixes) holds",
        f"{state * 1024 * prefixes / 1024:.1f} GiB of them, in memory or, beyond `--memory`, on disk.",
        f"With `--stream` every request for losses reads the layers' weights once: {stack:,.0f} GB.",
    ]
    return "\n".join(rows)


def page(tables: list[str]) -> str:
    cards = "; ".join(f"{card}, NVIDIA's data sheet, dense" for card in CARDS)
    return f"""# What a search costs on large models

Made by `python benchmarks/scale.py` (commit {commit()[:12]}). Counts come from searches that are rehearsed on models of
the same depth; a layer counts two operations per parameter and token, attention over {WINDOW} tokens of context is left
out (under 2 %). Hours assume that a forward pass reaches {SHARE:.0%} of the card's peak
({cards}); Llama 3 405B was trained at 38 to 43 % of it (arXiv 2407.21783, table 4).
Hours were not measured: no such card was at hand. The published loop evaluates every candidate on
every token with a full pass; `exhaustive` shares prefixes; `greedy` races, and what races save is extrapolated from a
model of 270 million parameters. Where weights are streamed, races take fewer looks at more text
(`growth={STREAMED:g}`); the published loop would read the weights once for each candidate at the least. The last two
columns are what `--stream --memory {MEMORY // 2**30}GiB` would move: weights are read, states that have no room are
written and read again. `exhaustive` reads weights least and spills most: it has all prefixes of all text at a layer at
once.

{(chr(10) * 2).join(tables)}

## Larger than memory, more than one machine

`--stream` keeps the weights on disk and reads each layer once for all the masks of a request; `--memory` bounds the
states. `--workers N` (or `--ray auto`) gives each process its own copy of the weights, and the first process keeps one
beside them: N + 1 copies, two of them on the first card. Neither changes a loss, and workers change no plan; with
`--stream` a race looks at more text at a time, so that it may end in another of the moves that are within epsilon of
each other. Fewer tokens are the cheapest saving of all: `--dry-run` says the price.
"""


if __name__ == "__main__":
    main()
