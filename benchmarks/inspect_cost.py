"""What reading an anatomy takes, in time and in memory over the weights: the demo model, and layers of real width.

    python benchmarks/inspect_cost.py --json experiments/inspect_cost.json

`llama-7b-width` is a stack of 4 layers as wide as Llama 2 7B (hidden 4096, mlp 11008, 32 heads), with random weights.
Each model is read in a process of its own, in bfloat16. `pass_seconds` is one forward pass of the same 2 x 16 tokens,
so that `passes` compares machines; memory is the peak of resident memory while reading, over what was resident before.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODELS = ("demo", "llama-7b-width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go; stdout if left out")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measured(options.model)))
        return
    rows = {}
    for name in MODELS:
        done = subprocess.run(
            [sys.executable, __file__, "--model", name], check=True, stdout=subprocess.PIPE, text=True
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    command = "python benchmarks/inspect_cost.py --json experiments/inspect_cost.json"
    text = json.dumps({"command": command, "commit": commit, "models": rows}, indent=2) + "\n"
    if options.json:
        options.json.write_text(text, encoding="utf-8")
    print(text)


def measured(name: str) -> dict[str, Any]:
    import torch
    import transformers

    from blockpruner.anatomy.probing import example_inputs
    from blockpruner.anatomy.reading import read_anatomy

    model = _demo() if name == "demo" else _wide()
    inputs = example_inputs(model)
    with torch.no_grad():
        model(**inputs)
        start = time.perf_counter()
        for _ in range(3):
            model(**inputs)
        once = (time.perf_counter() - start) / 3
    before, peak, stop = _resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    anatomy = read_anatomy(model)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = max(
        sum(p.numel() * p.element_size() for p in model.get_submodule(layer.path).parameters())
        for layer in anatomy.stacks[0].layers
    )
    return {
        "blocks": len(anatomy.parts),
        "weight_bytes": weights,
        "largest_layer_bytes": layer,
        "seconds": round(seconds, 2),
        "pass_seconds": round(once, 3),
        "passes": round(seconds / once, 1),
        "extra_bytes": peak[0] - before,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _demo() -> Any:
    from blockpruner.loading.models import load

    return load("demo", dtype="bfloat16").model


def _wide() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
