"""The engine's tokens per second beside those of a plain forward pass with its loss, on the same model and windows.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py --data FILE.jsonl --json experiments/throughput.json

For each dtype one fresh process. In it the two take turns, window by window, the one that begins changing each time:
`engine` is the objective of a search, asked for the whole model's loss on one window; `plain` is model(window) and
torch's cross entropy in float32. The ratio is made of seconds of the processor; those of the clock, beside it, say more
of others on a shared machine. ratio: the median over pairs of plain / engine seconds; spread: their quartiles.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_cost import commit, public, write

COMMAND = 'OMP_NUM_THREADS=1 python benchmarks/throughput.py --data "$BLOCKPRUNER_DATA/text/c4_demo.jsonl" --json FILE'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--json", type=Path, help="where the figures go, besides standard output")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measured(options, options.contestant)))
        return
    begun, found = commit(), []
    for dtype in options.dtypes.split(","):
        asked = [sys.executable, __file__, *sys.argv[1:], "--contestant", dtype]
        said = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(said.splitlines()[-1]))
        print(json.dumps(found[-1], indent=2), flush=True)
    if options.json:
        shared = {"model": public(options.model), "window": options.window, "pairs": options.pairs}
        write(options.json, {**shared, "found": found, "command": COMMAND, "commit": begun})


def measured(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Both, in turns, in this process."""
    import torch

    from blockpruner.data import read_data
    from blockpruner.loading.models import load
    from blockpruner.objectives.loss import Loss
    from blockpruner.searching.contract import DENSE
    from blockpruner.subject import open_subject

    subject = open_subject(load(options.model, dtype=dtype, device="cpu"))
    data = read_data(subject, options.data, Loss(), window=options.window, tokens=options.window * options.pairs)
    objective = data.objective(subject, Loss(), batch_tokens=options.window)
    assert not objective.fallback, objective.fallback
    windows = data.examples.inputs["input_ids"]

    def engine(number: int) -> float:
        ((loss,),) = objective.batch_losses([DENSE], number)
        return loss

    @torch.inference_mode()
    def plain(number: int) -> float:
        window = windows[number : number + 1]
        logits = subject.model(input_ids=window, use_cache=False).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits.float(), window[0, 1:]))

    ways = {"engine": engine, "plain": plain}
    for way in ways.values():
        way(0)
    seconds: dict[str, list[float]] = {"engine": [], "plain": []}
    clock: dict[str, list[float]] = {"engine": [], "plain": []}
    gaps = []
    for number in range(len(windows)):
        losses = {}
        for name in list(ways)[:: 1 if number % 2 else -1]:
            losses[name], used, passed = timed(ways[name], number)
            seconds[name].append(used)
            clock[name].append(passed)
        gaps.append(abs(losses["engine"] - losses["plain"]))
    ratios = sorted(p / e for p, e in zip(seconds["plain"], seconds["engine"], strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "dtype": dtype,
        "ratio": quartiles[1],
        "spread": [quartiles[0], quartiles[2]],
        "tokens_per_processor_second": {
            name: options.window / statistics.median(each) for name, each in seconds.items()
        },
        "clock_ratio": statistics.median(p / e for p, e in zip(clock["plain"], clock["engine"], strict=True)),
        "largest_difference_of_losses": max(gaps),
    }


def timed(way: Callable[[int], float], number: int) -> tuple[float, float, float]:
    """What it gives, with the seconds of processor and clock that it took."""
    clock, processor = time.perf_counter(), time.process_time()
    value = way(number)
    return value, time.process_time() - processor, time.perf_counter() - clock


if __name__ == "__main__":
    main()
