"""How often races err and what they cost, on recorded losses of a real model.

    python benchmarks/racing.py --reference --data "$BLOCKPRUNER_DATA" --json experiments/search_cost.json
    python benchmarks/racing_simulation.py record --run runs/racing/exhaustive-0
    python benchmarks/racing_simulation.py simulate

`record` takes the losses of every candidate at every step, per 128 tokens, from the journal of an exhaustive search
into the JSON. `simulate` races them in orders of their own for each seed: an error is a step whose winner is worse than
the best by more than epsilon, on all that was recorded; the cost is the share of (candidate, piece) that was looked at.
A longer text than was recorded is drawn from it with replacement, micro-batch by micro-batch, and is then the truth.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from search_cost import commit

from blockpruner.blocks import Block, Mask, Outline, parse_mask
from blockpruner.searching.contract import Problem, Values
from blockpruner.searching.moves import Target
from blockpruner.searching.permutations import number
from blockpruner.searching.racing import Race

RANKS = (1, 3, 7, 19)
DIGITS = 5  # of a loss: what is rounded away is a hundredth of the spread of a mean

NOTHING = Outline((Block("mlp", 0),), {Block("mlp", 0): 1}, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["record", "simulate"])
    parser.add_argument("--run", type=Path, help="run folder of an exhaustive search")
    parser.add_argument("--races", type=int, default=400)
    parser.add_argument("--json", type=Path, default=Path("experiments/racing_simulation.json"))
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    figures = {"recorded": recorded(options.run)} if options.task == "record" else simulated(kept, options.races)
    options.json.write_text(json.dumps(kept | figures) + "\n", encoding="utf-8")


def recorded(run: Path) -> dict[str, Any]:
    """Of each step that is complete in the journal: the mask before it, and each candidate's losses by micro-batch."""
    held: dict[Mask, dict[int, list[float]]] = {}
    for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        record = record.get("record", record)
        if "mask" in record:
            losses = [round(float(loss), DIGITS) for loss in record["losses"]]
            held.setdefault(parse_mask(record["mask"]), {})[record["batch"]] = losses
    batches = max(map(len, held.values()))
    whole = {mask: [each[b] for b in range(batches)] for mask, each in held.items() if len(each) == batches}
    steps, gone = [], frozenset[Any]()
    while True:
        found = {next(iter(mask - gone)): whole[mask] for mask in whole if gone < mask and len(mask) == len(gone) + 1}
        if len(found) < 2:
            return {"run": run.name, "steps": steps}
        steps.append({"removed": sorted(map(str, gone)), "losses": {str(block): found[block] for block in found}})
        gone |= {min(found, key=lambda block: statistics.fmean(x for part in found[block] for x in part))}


def simulated(kept: dict[str, Any], races: int) -> dict[str, Any]:
    """Errors and costs for texts of the recorded length and of four times that, with and without earlier steps."""
    steps = kept["recorded"]["steps"]
    rows = [scenario(steps, races, times, before) for times in (1, 4) for before in (False, True)]
    for row in rows:
        print(json.dumps(row))
    return {
        "command": "python benchmarks/racing_simulation.py simulate",
        "commit": commit(),
        "spread": spread(steps),
        "rows": rows,
    }


def scenario(steps: Sequence[dict[str, Any]], races: int, times: int, before: bool) -> dict[str, Any]:
    """So many races along the recorded steps. share: of all (candidate, piece) that were looked at."""
    errors, excess, shares = [0] * len(steps), list[float](), [list[float]() for _ in steps]
    finished, total = 0, 0
    for seed in range(races):
        texts = text(len(next(iter(steps[0]["losses"].values()))), times, seed)
        past: list[dict[str, Values]] = []
        for number_of_step, step in enumerate(steps):
            values = {name: [tuple(parts[index]) for index in texts] for name, parts in step["losses"].items()}
            truth = {name: statistics.fmean(x for part in parts for x in part) for name, parts in values.items()}
            winner, seen = raced(Race(seed=seed), values, past if before else [])
            loss = truth[winner] - min(truth.values())
            errors[number_of_step] += loss > Race().epsilon
            excess.append(loss)
            total = sum(map(len, next(iter(values.values()))))
            shares[number_of_step].append(statistics.fmean(len(found) / total for found in seen.values()))
            finished += len(seen[winner]) == total
            past.insert(0, seen)
    count = races * len(steps)
    rate = sum(errors) / count
    return {
        "pieces": total,
        "earlier steps used": before,
        "races": count,
        "claimed": Race().delta,
        "errors": rate,
        "standard error": (rate * (1 - rate) / count) ** 0.5,
        "errors by step": [each / races for each in errors],
        "mean excess": statistics.fmean(excess),
        "share": statistics.fmean(x for each in shares for x in each),
        "share by step": [statistics.fmean(each) for each in shares],
        "went to the end": finished / count,
    }


def text(batches: int, times: int, seed: int) -> list[int]:
    """Which recorded micro-batches make up the text: all once, or so many times as many drawn with replacement."""
    if times == 1:
        return list(range(batches))
    return [number("text", seed, place) % batches for place in range(times * batches)]


def raced(
    race: Race, values: dict[str, list[Values]], past: Sequence[dict[str, Values]]
) -> tuple[str, dict[str, Values]]:
    """The winner of one race among recorded candidates, and what was seen of each."""
    masks = {parse_mask(name): name for name in values}
    sizes = tuple(map(len, next(iter(values.values()))))
    problem = Problem(NOTHING, "block", Target.parse("blocks=1"), sizes=sizes)
    before = [{mask: seen[name] for mask, name in masks.items() if name in seen} for seen in past]
    running, answer = race.run(problem, tuple(masks), before=before), None

    def seen(mask: Mask, batch: int) -> Values:
        return values[masks[mask]][batch] if mask else (0.0,) * sizes[batch]

    while True:
        try:
            request = next(running) if answer is None else running.send(answer)
        except StopIteration as end:
            return masks[end.value.kept[0]], {masks[mask]: found for mask, found in end.value.values.items()}
        answer = {mask: tuple(x for batch in request.batches for x in seen(mask, batch)) for mask in request.masks}


def spread(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per step, of the differences to the best: standard deviation of a piece, how far behind some ranks are, how alike
    neighbours are (correlation of lag 1), and how much is new since the step before: sqrt(1 - r^2), r the correlation
    with what the same two differed by then."""
    rows, before = [], dict[str, list[float]]()
    for step in steps:
        flat = {name: [x for part in parts for x in part] for name, parts in step["losses"].items()}
        order = sorted(flat, key=lambda name: statistics.fmean(flat[name]))
        apart = {name: [a - b for a, b in zip(flat[name], flat[order[0]], strict=True)] for name in order[1:9]}
        pairs = [list(pairwise(each)) for each in apart.values()]
        lag = [statistics.correlation(*zip(*pair, strict=True)) for pair in pairs]
        then = {name: [a - b for a, b in zip(before[name], before[order[0]], strict=True)] for name in apart if before}
        new = [math.sqrt(1 - statistics.correlation(apart[name], then[name]) ** 2) for name in then]
        rows.append(
            {
                "best": order[0],
                "behind": {
                    rank: statistics.fmean(flat[order[rank]]) - statistics.fmean(flat[order[0]]) for rank in RANKS
                },
                "deviation of a piece, first 8": statistics.fmean(map(statistics.stdev, apart.values())),
                "correlation of neighbours, first 8": statistics.fmean(lag),
                "new since the step before, first 8": statistics.fmean(new) if new else None,
            }
        )
        before = flat
    return rows


if __name__ == "__main__":
    main()
