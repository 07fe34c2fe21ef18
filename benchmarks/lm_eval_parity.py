"""Are our numbers those of lm-evaluation-harness's own command? The demo model from a folder, PIQA and ARC-Easy.

    python benchmarks/lm_eval_parity.py --data "$BLOCKPRUNER_DATA" --json experiments/evaluation.json

Both sides read the same folder, in bfloat16, one item at a time; metrics, standard errors and every single item are
compared for equality. What both wrote is kept in --run.
"""

import argparse
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search_cost import commit

from blockpruner.artifacts import read_json, write_json
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.task_table import TaskResult, TaskTable
from blockpruner.evaluation.tasks import Harness
from blockpruner.loading.models import load

TASKS = ("local_piqa", "local_arc_easy")
DTYPE = "bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm_eval/ and tasks/")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--run", type=Path, default=Path("runs/lm_eval_parity"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    folder = options.run / "model"
    if not folder.exists():
        demo: Any = load("demo", dtype=DTYPE, device="cpu")
        demo.model.save_pretrained(folder)
        demo.tokenizer.save_pretrained(folder)
    theirs, their_items = by_command(options, folder)
    ours = {result.task: result for result in by_us(options, folder).results}
    rows = {task: compared(task, ours[task], theirs[task], their_items[task]) for task in TASKS}
    print(json.dumps(rows, indent=1))
    before = read_json(options.json) if options.json.exists() else {}
    figures = {
        "command": 'python benchmarks/lm_eval_parity.py --data "$BLOCKPRUNER_DATA" --json experiments/evaluation.json',
        "commit": commit(),
        "versions": {package: version(package) for package in ("lm-eval", "torch", "transformers", "blockpruner")},
        "model": f"demo, {DTYPE}",
        "limit": options.limit,
        "batch": 1,
        "equal": all(row["equal"] for row in rows.values()),
        "tasks": rows,
    }
    write_json(options.json, {**before, "lm_eval_parity": figures})


def by_command(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The results of the harness's own command and its samples, per task."""
    out = options.run / f"command-{options.limit}"
    if not out.exists():
        aside = options.run / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype={DTYPE}"]
        command += ["--device", "cpu", "--batch_size", "1", "--include_path", str(options.data / "lm_eval")]
        command += ["--tasks", ",".join(TASKS), "--limit", str(options.limit), "--log_samples"]
        subprocess.run([sys.executable, *command, "--output_path", str(aside)], check=True)
        aside.rename(out)
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (lines,) = out.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def by_us(options: argparse.Namespace, folder: Path) -> TaskTable:
    """The same through this package."""
    out = options.run / f"ours-{options.limit}.json"
    if not out.exists():
        harness = Harness(options.data / "lm_eval")
        loaded = load(str(folder), dtype=DTYPE, device="cpu")
        how: Any = {"contestant": "demo", "computation": "", "limit": options.limit, "batch": 1}
        found = [harness.run(loaded.model, loaded.tokenizer, Task(task), **how) for task in TASKS]
        TaskTable.of("demo", tuple(found)).save(out)
    return TaskTable.load(out)


def compared(task: str, ours: TaskResult, theirs: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {
        name: {
            "ours": one.value,
            "theirs": theirs[f"{name},none"],
            "stderr": [one.stderr, theirs[f"{name}_stderr,none"]],
        }
        for name, one in ours.metrics.items()
    }
    items = ours.items[task]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    different = sum(
        sample[name] != value
        for name, column in items.values.items()
        for sample, value in zip(samples, column, strict=True)
    )
    other = sum(not sample["doc_hash"].startswith(doc) for sample, doc in zip(samples, items.docs, strict=True))
    equal = not different and not other
    equal = equal and all(m["ours"] == m["theirs"] and m["stderr"][0] == m["stderr"][1] for m in metrics.values())
    return {"equal": equal, "items": len(items.docs), "items_that_differ": different + other, "metrics": metrics}


if __name__ == "__main__":
    main()
