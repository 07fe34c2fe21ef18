"""What a step of training costs by each loss on the demo model: operations, counted, beside each other.

    python benchmarks/fisher_cost.py --data "$BLOCKPRUNER_DATA" --json experiments/fisher_cost.json

A pass forward and backward over WINDOWS windows of C4 of the model without the first 9 blocks of a plan, where the
weights of the blocks that are left ask for gradients (`blocks`), or low-rank factors beside them alone (`factors`).
All but `lm` run the dense model too. Operations are those of matrix products, as torch counts them; seconds are of
the machine of the run, once each.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from search_cost import commit
from torch.utils.flop_counter import FlopCounterMode

from blockpruner.anatomy.probing import asking, evaluating
from blockpruner.data import read_data
from blockpruner.loading.models import load
from blockpruner.objectives.loss import Loss
from blockpruner.plan import Plan
from blockpruner.repairs.at_the_head import AtTheHead
from blockpruner.repairs.factors import lora_targets, with_factors
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Trained
from blockpruner.repairs.taught import Taught
from blockpruner.subject import open_subject

WINDOWS, WINDOW, REMOVED = 2, 256, 9
SAMPLED = "kl of 16,384 tokens"
LOSSES = {
    "lm": Taught("lm"),
    "kl": Taught("kl"),
    "fisher": Taught("fisher"),
    SAMPLED: Taught("kl", vocabulary=16384),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--plan", type=Path, default=Path("experiments/recovery_plan.json"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    subject = open_subject(load("demo", dtype=options.dtype))
    model, anatomy = subject.model, subject.anatomy
    mask = Plan.read(options.plan, anatomy.outline).mask(REMOVED)
    source = f"{options.data / 'text/c4_demo.jsonl'}[0:40]"
    text = read_data(subject, source, Loss(), tokens=WINDOWS * WINDOW, window=WINDOW).examples
    plain = Pupil(model, anatomy, mask)
    kept = {n: p for block, part in anatomy.parts.items() if block not in mask for n, p in named(model, part.modules)}
    wrapped = with_factors(lora_targets(model, anatomy, mask, "all"), {"r": 16, "lora_alpha": 32}, Trained())
    small = {f"{at}.{n}": p for at, module in wrapped.items() for n, p in module.named_parameters() if "lora_" in n}
    rows: dict[str, Any] = {}
    for what, pupil, numbers in (
        ("blocks", plain, kept),
        ("factors", Pupil(model, anatomy, mask, modules=wrapped), small),
    ):
        for loss, taught in LOSSES.items():
            lesson: Any = taught.lesson(pupil, text)
            with evaluating(model), asking(model, list(numbers.values())):
                if isinstance(lesson, AtTheHead):
                    lesson.prepare()  # most of which is made once
                start, counter = time.perf_counter(), FlopCounterMode(display=False)
                with counter:
                    lesson.backward(text, 1.0)
            seconds = time.perf_counter() - start
            total = counter.get_total_flops()
            rows[f"{what}, {loss}"] = {"operations per token": total / (WINDOWS * WINDOW), "seconds": round(seconds, 2)}
            print(what, loss, rows[f"{what}, {loss}"], flush=True)
    for what in ("blocks", "factors"):
        for loss in ("fisher", SAMPLED):
            ours, theirs = (rows[f"{what}, {each}"]["operations per token"] for each in (loss, "kl"))
            rows[f"{what}, {loss} beside kl"] = ours / theirs
    figures = {
        "command": 'python benchmarks/fisher_cost.py --data "$BLOCKPRUNER_DATA" --json experiments/fisher_cost.json',
        "commit": commit(),
        "model": subject.identity.model_dump(mode="json"),
        "dtype": subject.dtype,
        "removed": sorted(map(str, mask)),
        "rows": rows,
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def named(model: Any, paths: Any) -> list[tuple[str, Any]]:
    return [(f"{path}.{n}", p) for path in paths for n, p in model.get_submodule(path).named_parameters()]


if __name__ == "__main__":
    main()
