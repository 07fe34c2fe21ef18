"""What BlockPruner's loop costs, and what the same search costs here: removals, counted work, seconds, peak memory.

    DATA="$BLOCKPRUNER_DATA/text/c4_demo.jsonl[0:200]"
    python benchmarks/search_cost.py --data "$DATA" --json experiments/search_cost.json

Two contestants, each in a process of its own, one after the other. `paper_loop` is written out below and shares no code
with the search: one full forward pass of the model per candidate and window, blocks skipped by replacing the forward of
`self_attn` and `mlp` (so it runs on Llama-like models). `exhaustive` is `blockpruner search`. Both count the work they
really do. Interrupted, the same command goes on: the loop keeps its losses in RUN/paper_loop.jsonl, the search has
its journal, and a contestant that has finished is not run again.
"""

import argparse
import json
import math
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTESTANTS = ("paper_loop", "exhaustive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="builtin", help="calibration text; a committed figure rests on real text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--run", type=Path, default=Path("runs/search_cost"))
    parser.add_argument("--json", type=Path, help="where the figures go; RUN/search_cost.json if left out")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        options.run.mkdir(parents=True, exist_ok=True)
        result = {"paper_loop": paper_loop, "exhaustive": exhaustive}[options.contestant](options)
        (options.run / f"{options.contestant}.json").write_text(json.dumps(result, indent=2) + "\n")
        return
    for name in CONTESTANTS:
        if not (options.run / f"{name}.json").exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--contestant", name], check=True)
    found = {name: json.loads((options.run / f"{name}.json").read_text()) for name in CONTESTANTS}
    figures = {
        "model": options.model,
        "command": shlex.join(["python", "benchmarks/search_cost.py", *map(public, sys.argv[1:])]),
        "commit": commit(),
        "windows": options.windows,
        "window": options.window,
        "dtype": options.dtype,
        **found,
    }
    path = options.json or options.run / "search_cost.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    show(found)


def public(argument: str) -> str:
    """Data files by the name of the folder's variable, not by where they lie on this machine."""
    name = Path(argument)
    return f"$BLOCKPRUNER_DATA/{name.parent.name}/{name.name}" if name.is_absolute() else argument


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def show(found: dict[str, Any]) -> None:
    loop, ours = (found[name] for name in CONTESTANTS)
    print(f"{'':20}{'paper loop':>16}{'exhaustive':>16}{'ratio':>8}")
    for key in ("attention_tokens", "mlp_tokens", "head_tokens", "seconds", "peak_rss_bytes"):
        print(f"{key:20}{loop[key]:>16,.0f}{ours[key]:>16,.0f}{ours[key] / loop[key]:>8.3f}")
    print(f"final loss: {loop['final_loss']:.6f} and {ours['final_loss']:.6f}")
    print("the same removals" if loop["removed"] == ours["removed"] else "DIFFERENT removals")
    for name in CONTESTANTS:
        print(f"{name}: {', '.join(found[name]['removed'])}")


def opened(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its windows, loaded the same way for both."""
    from blockpruner.calibration import load_calibration
    from blockpruner.models import load

    loaded = load(options.model, dtype=options.dtype)
    if loaded.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    text = load_calibration(options.data, loaded.tokenizer, window=options.window, windows=options.windows, quiet=True)
    return loaded.model, text.windows.to(loaded.model.device)


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def paper_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Every step, every remaining block: run the whole model without it, take the strictly lowest perplexity."""
    import torch

    model, windows = opened(options)
    counts = {"attention_tokens": 0, "mlp_tokens": 0, "head_tokens": 0}
    layers = model.get_decoder().layers
    skipped: set[tuple[str, int]] = set()

    def switch(module: torch.nn.Module, unit: tuple[str, int]) -> None:
        whole: Callable[..., Any] = module.forward
        counted = "attention_tokens" if unit[0] == "attention" else "mlp_tokens"

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if unit in skipped:
                nothing = torch.zeros_like(hidden)
                return (nothing, None) if unit[0] == "attention" else nothing
            counts[counted] += hidden.shape[0] * hidden.shape[1]
            return whole(*args, **kwargs)

        module.forward = forward

    for index, layer in enumerate(layers):
        switch(layer.self_attn, ("attention", index))
        switch(layer.mlp, ("mlp", index))

    @torch.no_grad()
    def perplexity() -> float:
        losses = []
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
            counts["head_tokens"] += len(window) - 1
        return math.exp(math.fsum(losses) / len(losses))

    journal = options.run / "paper_loop.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    memo = {tuple(record["removed"]): record for record in known}
    before = sum(record["seconds"] for record in known)
    start = time.perf_counter()
    units = [(kind, index) for kind in ("attention", "mlp") for index in range(len(layers))]
    removed: list[tuple[str, int]] = []
    best = math.nan
    for step in range(options.steps):
        best, choice = math.inf, None
        for unit in units:
            if unit in removed:
                continue
            key = tuple(f"{kind}.{index}" for kind, index in [*removed, unit])
            if key not in memo:
                skipped.clear()
                skipped.update(removed, [unit])
                mark, since = dict(counts), time.perf_counter()
                value = perplexity()
                record = {
                    "removed": key,
                    "perplexity": value,
                    "seconds": time.perf_counter() - since,
                    **{name: counts[name] - mark[name] for name in counts},
                }
                memo[key] = record
                with journal.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if memo[key]["perplexity"] < best:
                best, choice = memo[key]["perplexity"], unit
        if choice is None:
            raise SystemExit("no finite perplexity")
        removed.append(choice)
        print(
            f"paper loop, step {step + 1}: {choice[0]}.{choice[1]}, perplexity {best:.4f}", file=sys.stderr, flush=True
        )
    return {
        "removed": [f"{kind}.{index}" for kind, index in removed],
        **{name: sum(record[name] for record in memo.values()) for name in counts},
        "final_loss": math.log(best),
        "seconds": before + time.perf_counter() - start,
        "peak_rss_bytes": peak(),
    }


def exhaustive(options: argparse.Namespace) -> dict[str, Any]:
    """The same search on the mask tree; its dense evaluation, which the loop does not make, is counted too."""
    from blockpruner.console import Progress
    from blockpruner.models import load
    from blockpruner.pipeline import find_plan, open_subject, prepare

    subject = open_subject(load(options.model, dtype=options.dtype))
    start = time.perf_counter()
    task = prepare(
        subject,
        target=f"blocks={options.steps}",
        calibration=options.data,
        search="exhaustive",
        tokens=options.windows * options.window,
        window=options.window,
        quiet=True,
    )
    plan = find_plan(task, options.run / "search", Progress())
    final = plan.steps[-1].loss
    if plan.work is None or final is None:
        raise SystemExit("the search did not finish")
    return {
        "removed": [name for step in plan.steps for name in step.remove],
        **plan.work.model_dump(),
        "final_loss": final.value,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak(),
    }


if __name__ == "__main__":
    main()
