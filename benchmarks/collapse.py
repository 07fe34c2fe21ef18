"""Does the verdict on what a model writes tell a collapsed model from a good one? Measured on the demo model.

    python benchmarks/collapse.py --data "$BLOCKPRUNER_DATA" --json experiments/evaluation.json

The thresholds of `evaluation.verdict` were chosen by what is printed for prompts A (C4 documents 0 to 199), and are
judged on prompts B (documents 200 to 299): silent on the dense model, on bfloat16 and on a plan of 2 blocks, raised
where 12 random blocks of 36 are gone. What was written is kept in --run, so that only verdicts are made again.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from search_cost import commit

from blockpruner.artifacts import read_json, write_json
from blockpruner.console import say
from blockpruner.evaluation.generation import prompts_of, read_by, written_by
from blockpruner.evaluation.verdict import THRESHOLDS, judged
from blockpruner.evaluation.writings import Written
from blockpruner.loading.models import load
from blockpruner.searching.permutations import shuffled
from blockpruner.subject import Subject, open_subject
from blockpruner.surgery.removal import skipped
from blockpruner.texts.calibration import load_calibration

TEXTS = {"A": "text/c4_demo.jsonl[0:200]", "B": "text/c4_demo.jsonl[200:300]"}
PLAN = ("attention.7", "mlp.8", "attention.17", "attention.9", "attention.16", "mlp.9")  # blockpruner, recipes.json
GONE = {"dense": 0, "bfloat16": 0, "plan of 2": 2, "plan of 6": 6}  # how many of PLAN
NAMES = {
    "A": ("dense", "plan of 2", "plan of 6", "random 0", "random 1"),
    "B": ("dense", "random 10", "plan of 2", "bfloat16", "random 11", "plan of 6", "random 12"),
}
COLLAPSED = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--run", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for which in TEXTS:
        write_all(options, which)
    report(options)


def place(options: argparse.Namespace, which: str, name: str) -> Path:
    return options.run / which / f"{name}.json"


def write_all(options: argparse.Namespace, which: str) -> None:
    """Everything that is written for one set of prompts, read by the dense model in float32; what is there stays."""
    missing = [name for name in NAMES[which] if not place(options, which, name).exists()]
    if not missing:
        return
    dense = open_subject(load("demo", dtype="float32", device="cpu"))
    data = load_calibration(str(options.data / TEXTS[which]), dense.tokenizer, window=64, windows=64)
    prompts = prompts_of(data, dense.tokenizer)
    for name in missing:
        say(f"prompts {which}: {name}")
        removed = gone(dense, name)
        if name == "bfloat16":
            half = load("demo", dtype="bfloat16", device="cpu")
            written = written_by(half.model, dense.tokenizer, prompts, name=name, computation="")
        else:
            with skipped(dense.model, removed, anatomy=dense.anatomy) as model:
                written = written_by(model, dense.tokenizer, prompts, name=name, computation="")
        written = read_by(dense.model, dense.tokenizer, prompts, written)
        write_json(
            place(options, which, name),
            {
                "commit": commit(),
                "prompts": data.record.model_dump(),
                "removed": removed,
                **written.model_dump(mode="json"),
            },
        )


def gone(dense: Subject, name: str) -> list[str]:
    if name in GONE:
        return list(PLAN[: GONE[name]])
    blocks = list(map(str, dense.anatomy.parts))
    return [blocks[number] for number in shuffled(len(blocks), "collapse", name)[:COLLAPSED]]


def report(options: argparse.Namespace) -> None:
    found: dict[str, Any] = {}
    for which in TEXTS:
        kept = {name: read_json(place(options, which, name)) for name in NAMES[which]}
        fields = Written.model_fields
        written = {
            name: Written.model_validate_json(json.dumps({key: value[key] for key in fields}))
            for name, value in kept.items()
        }
        rows = {}
        for name, one in written.items():
            judgement = judged(written["dense"], one)
            rows[name] = {"removed": kept[name]["removed"], **judgement.model_dump(mode="json")}
            figures = {
                key: round(value["value"], 3)
                for key, value in rows[name].items()
                if isinstance(value, dict) and "value" in value
            }
            print(f"{which} {name:10} {judgement.verdict:10} {figures} {judgement.reasons}")
        found[which] = {"prompts": kept["dense"]["prompts"], "commit": kept["dense"]["commit"], "contestants": rows}
    verdicts = {name: row["verdict"] for name, row in found["B"]["contestants"].items()}
    silent = all(verdicts[name] != "collapsed" for name in ("dense", "bfloat16", "plan of 2"))
    raised = all(verdict == "collapsed" for name, verdict in verdicts.items() if name.startswith("random"))
    print("on B: silent where it should be" if silent else "on B: FALSE ALARM", "- raised" if raised else "- MISSED")
    before = read_json(options.json) if options.json.exists() else {}
    figures = {
        "command": 'python benchmarks/collapse.py --data "$BLOCKPRUNER_DATA" --json experiments/evaluation.json',
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
        "model": "demo, float32",
        "thresholds": THRESHOLDS,
        "thresholds_set_on": "A",
        "verdicts_on_B": verdicts,
        "silent": silent,
        "raised": raised,
        "prompts": found,
    }
    write_json(options.json, {**before, "collapse": figures})


if __name__ == "__main__":
    main()
