"""Every recipe on the demo model, scaled down by one rule, and what BlockPruner's parts are worth there.

    python benchmarks/recipes.py --data "$BLOCKPRUNER_DATA" --json experiments/recipes.json

The rule: each recipe keeps its search, criterion, objective, moves, protected layers and BOS; its data become 2 windows
of 256 tokens of C4 documents 0 to 199 (32 MMLU items where it reads items), its target 6 blocks (3 layers where whole
layers go), and evolution is given about as many evaluations as the exhaustive search makes.

The ablations change one thing of BlockPruner each. All plans are then evaluated at once on C4 documents 200 to 299,
beside the dense model and 5 random removals of blocks and of layers. RUNS keeps what is known: the same command goes
on after an interruption.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search_cost import commit

from blockpruner.blocks import Mask, format_mask
from blockpruner.console import Progress
from blockpruner.contestants import at_random
from blockpruner.data import identity, read_data
from blockpruner.journal import Journal
from blockpruner.loading.models import load
from blockpruner.pipeline import prepared
from blockpruner.plan import Plan
from blockpruner.planning import find_plan
from blockpruner.recipe import Recipe, names
from blockpruner.searching.evaluations import Evaluations
from blockpruner.subject import Subject, open_subject

BLOCKS = 6
WINDOWS, WINDOW = 2, 256
ITEMS = 32
C4 = "text/c4_demo.jsonl"
ABLATIONS: dict[str, dict[str, Any]] = {
    "BlockPruner": {},
    "not iterated": {"search": "one-shot", "criterion": "leave-one-out"},
    "layers instead of blocks": {"moves": "layer", "target": f"layers={BLOCKS // 2}"},
    "block influence instead of loss": {"search": "one-shot", "criterion": "cosine"},
    "block influence, ranked again after each": {"search": "iterative", "criterion": "cosine"},
    "stock moves": {"moves": "stock", "target": f"blocks={BLOCKS}"},
    "Alpaca": {"calibration": "instruct/alpaca_sample.jsonl"},
    "Wikipedia": {"calibration": "text/wikipedia_demo.txt"},
    "1,024 tokens, in races": {"tokens": 1024, "search": "greedy"},
    "4,096 tokens, in races": {"tokens": 4096, "search": "greedy"},
    "16,384 tokens, in races": {"tokens": 16384, "search": "greedy"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/, tasks/ and instruct/")
    parser.add_argument("--only", nargs="*", help="names of recipes and ablations; all if left out")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    subject = open_subject(load("demo", dtype="bfloat16"))
    tasks = {name: scaled(Recipe.read(name), options.data) for name in names()}
    tasks |= {f"ablation: {name}": ablation(fields, options.data) for name, fields in ABLATIONS.items()}
    wanted = [name for name in tasks if not options.only or any(part in name for part in options.only)]
    plans: dict[str, Plan] = {}
    for name in wanted:
        print(f"--- {name}", flush=True)
        folder = options.runs / "".join(letter if letter.isalnum() else "-" for letter in name)
        plans[name] = find_plan(prepared(tasks[name], subject, folder), folder, Progress())
    figures = {
        "command": 'python benchmarks/recipes.py --data "$BLOCKPRUNER_DATA" --json experiments/recipes.json',
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
        "model": subject.identity.model_dump(mode="json"),
        "rule": (__doc__ or "").split("\n\n")[2],
        **compared(subject, {name: tasks[name] for name in wanted}, plans, options),
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def scaled(recipe: Recipe, data: Path) -> Recipe:
    """The recipe by the rule."""
    items = recipe.objective == "accuracy"
    source = f"{data / 'tasks/mmlu.jsonl'}[0:{ITEMS}]" if items else f"{data / C4}[0:200]"
    size = {} if items else {"tokens": WINDOWS * WINDOW, "window": WINDOW}
    target = f"layers={BLOCKS // 2}" if recipe.moves == "layer" else f"blocks={BLOCKS}"
    search = recipe.search
    if search.startswith("evolution"):  # whose looks are of as many tokens as the paper's in windows of this length
        search = f"evolution:equal=true,first={2048 // WINDOW},second=64,offspring=8,initial=16,generations=20"
    return recipe.changed(calibration=source, evaluation=f"{data / C4}[200:300]", target=target, search=search, **size)


def ablation(fields: dict[str, Any], data: Path) -> Recipe:
    """BlockPruner by the rule, one thing changed."""
    fields = dict(fields)
    if "calibration" in fields:
        fields["calibration"] = str(data / fields["calibration"])
    return scaled(Recipe.read("blockpruner"), data).changed(**fields)


def compared(
    subject: Subject, tasks: dict[str, Recipe], plans: dict[str, Plan], options: argparse.Namespace
) -> dict[str, Any]:
    """Held-back losses of all plans, and of what they are compared with, in one sweep with a journal of its own."""
    data: Path = options.data
    first = prepared(scaled(Recipe.read("blockpruner"), data), subject, options.runs)
    layers = prepared(scaled(Recipe.read("sleb"), data), subject, options.runs)
    some = next(iter(plans.values()))
    masks: dict[str, Mask] = {"dense": frozenset()}
    masks |= {f"{name}, blocks": mask for name, mask in at_random(first, some).items()}
    masks |= {f"{name}, layers": mask for name, mask in at_random(layers, some).items()}
    masks |= {name: plan.mask() for name, plan in plans.items()}
    measure = first.objective.measure
    held_out = read_data(subject, f"{data / C4}[200:300]", measure, tokens=4096, window=512)
    objective = held_out.objective(subject, measure)
    with Journal.open(options.runs / "evaluation.jsonl", identity(subject, held_out, objective, 0)) as journal:
        losses = Evaluations(objective, journal, Progress(), len(masks) * objective.batches).losses(
            masks.values(), "measuring"
        )
    whole, outline = subject.identity.parameters, subject.anatomy.outline
    rows: dict[str, Any] = {}
    for name, mask in masks.items():
        loss = losses[mask]
        rows[name] = {
            "removed": format_mask(mask),
            "parameters": whole - outline.removed_parameters(mask),
            "loss": loss.model_dump(mode="json") if loss else None,
        }
        if name in plans:
            plan, recipe = plans[name], tasks[name]
            rows[name] |= {
                "order": ["+".join(map(str, step.blocks)) for step in plan.steps],
                "work": plan.work.model_dump(mode="json") if plan.work else None,
                "evaluations": plan.evaluations,
                "calibration": recipe.calibration.model_dump(mode="json")
                | {"source": Path(recipe.calibration.source).name},
                "settings": recipe.model_dump(
                    include={"search", "criterion", "objective", "moves", "target", "protect"}
                ),
            }
    return {"evaluation": held_out.record.model_dump(mode="json"), "rows": rows}


if __name__ == "__main__":
    main()
