"""Every criterion on the demo model, on the same text: how far their rankings agree, and what a second task changes.

    python benchmarks/criteria.py --data "$BLOCKPRUNER_DATA" --json experiments/criteria.json

Scores rest on C4 documents 0 to 199; Shapley values are computed twice, of the language-modelling loss and of the error
on PIQA items. The K least important blocks of some rankings are then taken out at once and evaluated on text (C4
documents 200 to 299) and items that nothing was scored on. RUN keeps what is known: the same command goes on after an
interruption. Beside the JSON lies the picture, with the ranks and Spearman's correlations.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search_cost import commit

from blockpruner.blocks import Mask, Move
from blockpruner.console import Progress
from blockpruner.criteria import CRITERIA
from blockpruner.data import read_data
from blockpruner.importance.ranking import ranks
from blockpruner.loading.models import load
from blockpruner.objectives import parse_objective
from blockpruner.scores import CriterionScores, ScoreTable
from blockpruner.scoring import compare, score
from blockpruner.searching.evaluations import Evaluations
from blockpruner.subject import Subject, open_subject

TEXT = "text/c4_demo.jsonl"
ITEMS = "tasks/piqa.jsonl"
SETTINGS = {"shapley": "shapley:permutations=16"}
ITEM_ORDERS = "shapley:permutations=6"
COMPARED = ("leave-one-out", "cosine", "shapley", "deepest", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--remove", type=int, default=6, metavar="K")
    parser.add_argument("--run", type=Path, default=Path("runs/criteria"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    subject = open_subject(load(options.model, dtype=options.dtype))
    names = [SETTINGS.get(name, name) for name in CRITERIA]
    text = scored(subject, options, names, f"{options.data / TEXT}[0:200]", "loss", "text")
    figures: dict[str, Any] = {
        "command": 'python benchmarks/criteria.py --data "$BLOCKPRUNER_DATA" --json experiments/criteria.json',
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
        "settings": {key: getattr(options, key) for key in ("model", "dtype", "windows", "window", "items", "remove")},
        "text": text.model_dump(mode="json"),
        "agreement": text.agreement(),
    }
    written(figures, options.json)
    picture(text, options.json.with_suffix(".png"))
    source = f"{options.data / ITEMS}[0:{options.items}]"
    items = scored(subject, options, [ITEM_ORDERS], source, "accuracy", "items")
    rankings = by_name(text)
    compared = {name: rankings[name] for name in COMPARED} | {"shapley of PIQA": items.criteria[0]}
    figures |= {"items": items.model_dump(mode="json"), "removed": removed(subject, options, compared)}
    written(figures, options.json)
    for name, row in figures["removed"].items():
        loss, error = row["loss"]["value"], row["piqa error"]["value"]
        print(f"{name:24} loss {loss:.3f}  PIQA error {error:.3f}  {', '.join(row['blocks'])}")


def written(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def scored(
    subject: Subject, options: argparse.Namespace, names: list[str], source: str, objective: str, part: str
) -> ScoreTable:
    comparison = compare(
        subject,
        criteria=names,
        calibration=source,
        objective=objective,
        tokens=options.windows * options.window,
        window=options.window,
    )
    return score(comparison, options.run / part, Progress())


def by_name(table: ScoreTable) -> dict[str, CriterionScores]:
    return {one.criterion.partition(":")[0]: one for one in table.criteria}


def removed(subject: Subject, options: argparse.Namespace, rankings: dict[str, CriterionScores]) -> dict[str, Any]:
    """What is left without the K least important blocks of each ranking, on text and items that were not looked at."""
    first = {name: one.least_first[: options.remove] for name, one in rankings.items()}
    masks: dict[str, Mask] = {
        name: frozenset().union(*(Move.parse(m).blocks for m in moves)) for name, moves in first.items()
    }
    masks = {"dense": frozenset(), **masks}
    held_out = {
        "loss": ("loss", f"{options.data / TEXT}[200:300]"),
        "piqa error": ("accuracy", f"{options.data / ITEMS}[600:680]"),
    }
    found: dict[str, Any] = {name: {"blocks": list(first.get(name, ()))} for name in masks}
    for column, (objective, source) in held_out.items():
        measure = parse_objective(objective)
        data = read_data(subject, source, measure, tokens=4096, window=512)
        ready = data.objective(subject, measure)
        estimates = Evaluations(ready).losses(masks.values(), column)
        for name, mask in masks.items():
            estimate = estimates[mask]
            found[name][column] = estimate.model_dump() if estimate else None
    return found


def picture(table: ScoreTable, path: Path) -> None:
    """The rank of every block by every criterion, and how far these agree, as one PNG."""
    import altair

    named = by_name(table)
    order = list(named)
    rank_rows = []
    for name, one in named.items():
        known = {block: found.value for block, found in one.scores.items() if found}  # a block without a score is blank
        places = zip(known, ranks(list(known.values())), strict=True)
        rank_rows += [{"criterion": name, "block": block, "rank": place} for block, place in places]
    pairs = zip(order, table.agreement().values(), strict=True)
    agreement = [{"a": a, "b": b, "rho": rho} for a, row in pairs for b, rho in zip(order, row.values(), strict=True)]
    blocks = list(next(iter(named.values())).scores)
    left = (
        altair.Chart(altair.Data(values=rank_rows), title="Rank of each block: dark goes first", width=420, height=560)
        .mark_rect()
        .encode(
            x=altair.X("criterion:N", sort=order, title=None, axis=altair.Axis(labelAngle=-50)),
            y=altair.Y("block:N", sort=blocks, title=None),
            color=altair.Color("rank:Q", scale=altair.Scale(scheme="viridis"), title="rank"),
        )
    )
    base = altair.Chart(
        altair.Data(values=agreement), title="Spearman's rank correlation", width=560, height=560
    ).encode(
        x=altair.X("a:N", sort=order, title=None, axis=altair.Axis(labelAngle=-50)),
        y=altair.Y("b:N", sort=order, title=None),
    )
    scale = altair.Scale(scheme="redblue", domain=[-1, 1])
    colour = base.mark_rect().encode(color=altair.Color("rho:Q", scale=scale, title="correlation"))
    shade = altair.condition("abs(datum.rho) > 0.6", altair.value("white"), altair.value("black"))
    label = base.mark_text(fontSize=10).encode(text=altair.Text("rho:Q", format=".2f"), color=shade)
    (left | (colour + label)).resolve_scale(color="independent").save(str(path), scale_factor=1.2)


if __name__ == "__main__":
    main()
