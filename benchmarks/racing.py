"""What races save on the demo model: work and final loss beside the published loop and the exhaustive search.

    python benchmarks/racing.py --data "$BLOCKPRUNER_DATA" --json experiments/search_cost.json

REMOVED blocks go by TOKENS tokens of C4, in draws of 40 documents each, by races over OBJECTIVE; the exhaustive search
over the loss itself, which is what a race is to agree with, runs on the first draw alone. Final losses are those on the
calibration text, on all of it and over the whole vocabulary, whatever a race went by. The counts of the published loop
(every candidate, every token, a full pass) are arithmetic, and are checked by the plain loop of search_cost.py. Work is
also given as one number: as operations, two per weight and token, and as seconds, at what a token costs in blocks and
in the head on the machine of the run. RUNS keeps what is known: the same command goes on, and draws that are in the
JSON already, for the same model and settings, stay as they are, each with its commit. Each of WORKERS computes with one
thread, and finds the bits that a single process with one thread does. The figures become `racing` in the JSON.
"""

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search_cost import commit

from blockpruner.artifacts import Work
from blockpruner.console import Progress
from blockpruner.engine.hands import Crew
from blockpruner.engine.objective import ModelObjective
from blockpruner.loading.models import load
from blockpruner.objectives.loss import Loss
from blockpruner.planning import Task, find_plan, prepare
from blockpruner.price import quote
from blockpruner.searching.contract import DENSE, Stop
from blockpruner.searching.evaluations import Evaluations
from blockpruner.subject import Subject, open_subject

C4 = "text/c4_demo.jsonl"
KEPT = ("whole vocabulary", "reference")  # by other settings than the draws
DOCUMENTS = 40  # per draw; the text for calibration is documents 0 to 199


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--removed", type=int, default=9)
    parser.add_argument("--objective", default="sampled-loss")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the work")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="the exhaustive search on the first draw as well")
    parser.add_argument("--dtype", default="bfloat16", help="of what is run now; rows that are there keep theirs")
    parser.add_argument("--runs", type=Path, default=Path("runs/racing"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    subject = open_subject(load("demo", dtype=options.dtype))
    figures = begun(subject, options)
    for draw in map(str, range(options.draws)):
        if draw not in figures["draws"]:
            figures["draws"][draw] = searched(subject, options, int(draw), "greedy", options.objective)
            write(options.json, figures)
    if options.reference and not figures["reference"]:
        figures["reference"] = searched(subject, options, 0, "exhaustive", "loss")
        write(options.json, figures)
    print(json.dumps(figures.get("share of the published loop"), indent=1))


def begun(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """What is in the JSON for this model and these settings, or the beginning of it."""
    settings = {
        "settings": {key: getattr(options, key) for key in ("tokens", "window", "removed", "objective")},
        "model": subject.identity.model_dump(mode="json"),
    }
    kept = read(options.json).get("racing", {})
    if settings.items() <= kept.items():
        return kept
    same = settings["settings"] | {"objective": kept.get("settings", {}).get("objective")}
    if not (settings | {"settings": same}).items() <= kept.items():
        kept = {}
    return {
        "command": 'python benchmarks/racing.py --draws 5 --reference --dtype float32 --data "$BLOCKPRUNER_DATA" '
        "--json experiments/search_cost.json",
        "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
        **settings,
        "reference": None,
        **{key: kept[key] for key in KEPT if key in kept},
        "draws": {},
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, figures: dict[str, Any]) -> None:
    """Put them into the file beside what else is there, with what they come to."""
    spent = [row["share of the published loop"]["operations"] for row in figures["draws"].values()]
    if spent:
        figures["share of the published loop"] = {"median": statistics.median(spent), "worst": max(spent)}
    reference, first = figures["reference"], figures["draws"].get("0")
    if reference and first:
        figures["loss beside the reference"] = first["final loss"]["value"] / reference["final loss"]["value"] - 1
    part = path.with_suffix(".part")
    part.write_text(json.dumps(read(path) | {"racing": figures}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def searched(subject: Subject, options: argparse.Namespace, draw: int, search: str, objective: str) -> dict[str, Any]:
    """One search on one draw: its plan, what it cost, and what the published loop would have."""
    documents = f"[{DOCUMENTS * draw}:{DOCUMENTS * (draw + 1)}]"
    task = prepare(
        subject,
        target=f"blocks={options.removed}",
        calibration=f"{options.data / C4}{documents}",
        search=search,
        objective=objective,
        tokens=options.tokens,
        window=options.window,
    )
    print(f"--- {search}, draw {draw}", flush=True)
    price = quote(task)
    crew = Crew(options.workers, "demo", dtype=options.dtype) if options.workers else None
    named = search if objective == "loss" else f"{search}-{objective.replace(':', '-')}"
    plan = find_plan(task, options.runs / f"{named}-{draw}", Progress(), crew=crew)
    if plan.stop_reason != Stop.TARGET:  # a Ctrl-C: the same command goes on
        raise KeyboardInterrupt
    assert plan.work is not None
    whole = task.data.objective(subject, Loss())
    final = Evaluations(whole).losses([plan.mask()], "measuring")[plan.mask()]
    return {
        "commit": commit(),
        "dtype": options.dtype,
        "search": plan.method.search if plan.method else "",
        "objective": plan.method.objective if plan.method else "",
        "documents": documents,
        "steps": ["+".join(map(str, step.blocks)) for step in plan.steps],
        "ties": {number: list(step.ties) for number, step in enumerate(plan.steps, 1) if step.ties},
        "pieces": [statistics.fmean(s.n for s in step.scores.values() if s) for step in plan.steps],
        "loss": plan.steps[-1].loss.model_dump() if plan.steps[-1].loss else None,
        "final loss": final.model_dump() if final else None,
        "work": plan.work.model_dump(mode="json"),
        "price": {"work": price.work.model_dump(mode="json"), "of the work": priced(task, price.work, plan.work)},
        "share of the published loop": shares(whole, plan.work, published(whole, len(plan.steps))),
    }


def published(objective: ModelObjective, steps: int) -> Work:
    """The work of the published loop: for each candidate all blocks that are left, and the head, on all data."""
    whole = sum((objective.work([DENSE], batch) for batch in range(objective.batches)), Work())
    blocks = len(objective.anatomy.outline.blocks)
    tokens = (whole.attention_tokens + whole.mlp_tokens) / blocks
    candidates = [blocks - step for step in range(steps)]
    mixed = round(sum(count * (count - 1) * tokens for count in candidates) / 2)
    return Work(attention_tokens=mixed, mlp_tokens=mixed, head_tokens=sum(candidates) * whole.head_tokens)


def shares(objective: ModelObjective, work: Work, loop: Work) -> dict[str, float]:
    """`work` as a share of that of the loop: of blocks, of the head, and of both."""
    blocks = (work.attention_tokens + work.mlp_tokens) / (loop.attention_tokens + loop.mlp_tokens)
    return {
        "blocks": blocks,
        "head": work.head_tokens / loop.head_tokens,
        "operations": operations(objective, work) / operations(objective, loop),
        "seconds": objective.seconds(work) / objective.seconds(loop),
    }


def operations(objective: ModelObjective, work: Work) -> float:
    """Two per weight and token, with the mean over all blocks of a kind; scores of attention are left out."""
    held: dict[str, list[int]] = {"attention": [], "mlp": []}
    for block, parameters in objective.anatomy.outline.parameters.items():
        held["mlp" if block.kind == "mlp" else "attention"].append(parameters)
    head = objective.model.get_output_embeddings()
    assert head is not None
    blocks = work.attention_tokens * statistics.fmean(held["attention"]) + work.mlp_tokens * statistics.fmean(
        held["mlp"]
    )
    return 2 * (blocks + work.head_tokens * head.weight.numel())


def priced(task: Task, said: Work, spent: Work) -> float:
    """What was said before the search as a share of what it took, in seconds of this machine."""
    return task.objective.seconds(said) / task.objective.seconds(spent)


if __name__ == "__main__":
    main()
