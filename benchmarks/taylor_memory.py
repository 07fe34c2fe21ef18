"""What `taylor` takes in memory, beside the weights and the activations of one window.

    OMP_NUM_THREADS=1 python benchmarks/taylor_memory.py --data "$BLOCKPRUNER_DATA/text/c4_demo.jsonl" --json FILE

Two contestants, each in a fresh process. `taylor` scores every block. `plain` runs one window forward and backward with
nothing of ours: its activations are the bytes of all tensors that autograd saves for the backward pass (counted by
torch.autograd.graph.saved_tensors_hooks, each storage once, parameters apart), with gradients asked for of the same
weights. Peaks are ru_maxrss less what the process held before the model was loaded (Python, torch, transformers); on
Linux the peak is set back after loading, which for a moment may hold more. The ratio is peak of taylor / (bytes of the
weights + activations of one window). Beside it, the peak of `plain` itself, with the gradients of all blocks.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from search_cost import calibration, commit, peak, public, write

CONTESTANTS = ("plain", "taylor")

COMMAND = (
    'OMP_NUM_THREADS=1 python benchmarks/taylor_memory.py --data "$BLOCKPRUNER_DATA/text/c4_demo.jsonl" '
    "--json experiments/taylor_memory.json"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="builtin", help="calibration text; a committed figure rests on real text")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="where the figures go, besides standard output")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measured(options)))
        return
    found = {name: in_fresh_process(name) for name in CONTESTANTS}
    weights, activations = found["plain"]["weights_bytes"], found["plain"].pop("activations_bytes")
    figures = {
        **found["plain"].pop("versions"),
        "command": COMMAND,
        "commit": commit(),
        "model": public(options.model),
        "windows": options.windows,
        "window": options.window,
        "dtype": options.dtype,
        "weights_bytes": weights,
        "activations_of_one_window_bytes": activations,
        "taylor_peak_bytes": found["taylor"]["peak_bytes"],
        "plain_peak_bytes": found["plain"]["peak_bytes"],
        "before_loading_bytes": {name: found[name]["before_bytes"] for name in CONTESTANTS},
        "taylor_ru_maxrss_bytes": found["taylor"]["ru_maxrss_bytes"],
        "ratio": found["taylor"]["peak_bytes"] / (weights + activations),
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        write(options.json, figures)


def in_fresh_process(name: str) -> dict[str, Any]:
    asked = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
    return json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from blockpruner.anatomy.reading import read_anatomy
    from blockpruner.criteria.taylor import Taylor
    from blockpruner.importance.block_weights import holdings, staying
    from blockpruner.importance.criterion import Lab
    from blockpruner.importance.gradients import windows_of
    from blockpruner.loading.models import load
    from blockpruner.searching.evaluations import Evaluations
    from blockpruner.searching.moves import block
    from blockpruner.texts.examples import Signs, examples_of

    gc.collect()
    before = resident()
    loaded = load(options.model, dtype=options.dtype)
    model: Any = loaded.model
    windows = calibration(options, loaded.tokenizer).windows
    anatomy = read_anatomy(model)
    examples = examples_of(model, windows, Signs.of(loaded.tokenizer))
    gc.collect()
    set_peak_back()
    result: dict[str, Any] = {"weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}
    if options.contestant == "taylor":
        nobody: Any = None  # no loss of a mask is asked for
        Taylor().scores(Lab(model, anatomy, examples, Evaluations(nobody)), block(anatomy.outline, frozenset()))
    else:
        names = staying(holdings(model, anatomy), frozenset())
        result["activations_bytes"] = one_window(model, windows_of(model, examples)[0], names)
    result["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    return {**result, "before_bytes": before, "ru_maxrss_bytes": peak(), "peak_bytes": peak() - before}


def one_window(model: Any, row: Any, names: list[str]) -> int:
    """Bytes of what autograd saves in one forward pass with a loss, which is then run backward."""
    import torch

    model.requires_grad_(False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    saved: dict[int, int] = {}

    def count(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()  # all of them live until the backward pass
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = model(**row.inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), row.targets.flatten(), ignore_index=-100)
        total = sum(saved.values())
        loss.backward()
    return total


def resident() -> int:
    """Bytes held now; the peak so far where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else peak()


def set_peak_back() -> None:
    """From here on, the peak is that of what follows."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


if __name__ == "__main__":
    main()
