"""What BlockPruner's loop costs, and what the same search costs here: removals, counted work, seconds, peak memory.

    DATA="$BLOCKPRUNER_DATA/text/c4_demo.jsonl[0:200]"
    python benchmarks/search_cost.py --data "$DATA" --json experiments/search_cost.json

Two contestants, each in a process of its own, one after the other. `paper_loop` is written out below and shares no code
with the search: one full forward pass of the model per candidate and window, blocks skipped by replacing the forward of
`self_attn` and `mlp` (so it runs on Llama-like models). `exhaustive` is `blockpruner search`. Both count the work they
really do. Interrupted, the same command goes on: the loop keeps its losses in RUN/paper_loop.jsonl, the search has
its journal, and a contestant that has finished under the same settings is not run again; under others it is refused.
Seconds are those of all sessions, up to the last evaluation of each; peak memory and commit are of the last session.
"""

import argparse
import json
import math
import os
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
    options.run.mkdir(parents=True, exist_ok=True)
    if options.contestant:
        begun = commit()
        result = {"paper_loop": paper_loop, "exhaustive": exhaustive}[options.contestant](options)
        write(options.run / f"{options.contestant}.json", {**result, "commit": begun})
        return
    wanted = expected(options)
    paths = {name: options.run / f"{name}.json" for name in CONTESTANTS}
    for path in filter(Path.exists, paths.values()):
        check(path, json.loads(path.read_text()).get("settings", {}), wanted)
    for name in CONTESTANTS:
        if not paths[name].exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--contestant", name], check=True)
    found = {name: json.loads(path.read_text()) for name, path in paths.items()}
    for name, path in paths.items():
        check(path, found[name].pop("settings"), wanted)
    shared = {key: wanted[key] for key in ("model", "windows", "window", "dtype")}
    figures = {**shared, "command": command(options, parser), "commit": commits(found), "settings": wanted, **found}
    write(options.json or options.run / "search_cost.json", figures)
    show(found)


def settings(options: argparse.Namespace, fingerprint: str) -> dict[str, Any]:
    """All that the figures of a contestant depend on, the machine and the code apart."""
    import torch

    return {
        "model": public(options.model),
        "data": public(options.data),
        "windows": options.windows,
        "window": options.window,
        "steps": options.steps,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "calibration": fingerprint,
    }


def expected(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that both contestants will have, known without loading the model."""
    from blockpruner.loading.models import load_tokenizer

    return settings(options, calibration(options, load_tokenizer(options.model)).record.fingerprint)


def check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Stop if `path` holds results under other settings than those wanted."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        lines = [f"  {key}: {found.get(key, 'absent')} -> {wanted.get(key, 'absent')}" for key in keys]
        raise SystemExit("\n".join([f"{path} has other settings; remove it, or name another --run:", *lines]))


def public(text: str) -> str:
    """A path below the data folder by the name of the folder's variable; any other text as it is."""
    folder = os.environ.get("BLOCKPRUNER_DATA")
    if folder and Path(text).resolve().is_relative_to(Path(folder).resolve()):
        return f"$BLOCKPRUNER_DATA/{Path(text).resolve().relative_to(Path(folder).resolve()).as_posix()}"
    return text


def command(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that makes these figures, from the repository's root; where the run lies makes no difference."""
    words = ["python", "benchmarks/search_cost.py"]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        words.insert(0, f"OMP_NUM_THREADS={threads}")
    for name, value in vars(options).items():
        if name != "run" and value != parser.get_default(name):
            text = public(str(value))
            words += [f"--{name}", f'"{text}"' if text.startswith("$") else shlex.quote(text)]
    return " ".join(words)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def commits(found: dict[str, Any]) -> str:
    """The commit of both contestants; where they differ, today's, with both named."""
    made = {name: result["commit"] for name, result in found.items()}
    if len(set(made.values())) == 1:
        return made[CONTESTANTS[0]]
    return f"{commit()} ({', '.join(f'{name}: {value}' for name, value in made.items())})"


def show(found: dict[str, Any]) -> None:
    loop, ours = (found[name] for name in CONTESTANTS)
    print(f"{'':20}{'paper loop':>16}{'exhaustive':>16}{'ratio':>8}")
    for key in ("attention_tokens", "mlp_tokens", "head_tokens", "seconds", "peak_rss_bytes"):
        print(f"{key:20}{loop[key]:>16,.0f}{ours[key]:>16,.0f}{ours[key] / loop[key]:>8.3f}")
    print(f"final loss: {loop['final_loss']:.6f} and {ours['final_loss']:.6f}")
    print("the same removals" if loop["removed"] == ours["removed"] else "DIFFERENT removals")
    for name in CONTESTANTS:
        print(f"{name}: {', '.join(found[name]['removed'])}")


def calibration(options: argparse.Namespace, tokenizer: Any) -> Any:
    from blockpruner.texts.calibration import load_calibration

    if tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    return load_calibration(options.data, tokenizer, window=options.window, windows=options.windows, quiet=True)


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write(path: Path, value: object) -> None:
    """The whole file or none: that it is there says that its contestant has finished."""
    from blockpruner.artifacts import write_json

    write_json(path, value)


def recalled(path: Path) -> list[dict[str, Any]]:
    """The records of a file that grows line by line; what a killed process left of a last line is cut off."""
    if not path.exists():
        return []
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def paper_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Every step, every remaining block: run the whole model without it, take the strictly lowest perplexity."""
    from blockpruner.loading.models import load

    loaded = load(options.model, dtype=options.dtype)
    data = calibration(options, loaded.tokenizer)
    wanted = settings(options, data.record.fingerprint)
    journal = options.run / "paper_loop.jsonl"
    header, *known = recalled(journal) or [{"settings": wanted}]
    check(journal, header.get("settings", {}), wanted)
    if not known:
        journal.write_text(json.dumps(header) + "\n")
    memo = {tuple(record["removed"]): record for record in known}
    model: Any = loaded.model
    measure = measured(model, data.windows.to(model.device))
    units = [f"{kind}.{index}" for kind in ("attention", "mlp") for index in range(len(model.get_decoder().layers))]
    removed: list[str] = []
    best = math.nan
    for step in range(options.steps):
        best, choice = math.inf, None
        for unit in units:
            if unit in removed:
                continue
            key = (*removed, unit)
            if key not in memo:
                memo[key] = {"removed": key, **measure(key)}
                append(journal, memo[key])
            if memo[key]["perplexity"] < best:
                best, choice = memo[key]["perplexity"], unit
        if choice is None:
            raise SystemExit("no finite perplexity")
        removed.append(choice)
        print(f"paper loop, step {step + 1}: {choice}, perplexity {best:.4f}", file=sys.stderr, flush=True)
    sums = ("attention_tokens", "mlp_tokens", "head_tokens", "seconds")
    return {
        "settings": wanted,
        "removed": removed,
        "final_loss": math.log(best),
        **{name: sum(record[name] for record in memo.values()) for name in sums},
        "peak_rss_bytes": peak(),
    }


def measured(model: Any, windows: Any) -> Callable[[tuple[str, ...]], dict[str, float]]:
    """A function: the blocks to skip -> perplexity, counted work and seconds of one pass over all windows."""
    import torch

    counts: dict[str, int] = {}
    skipped: set[str] = set()

    def switch(module: torch.nn.Module, kind: str, index: int) -> None:
        whole: Callable[..., Any] = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if f"{kind}.{index}" in skipped:
                nothing = torch.zeros_like(hidden)
                return (nothing, None) if kind == "attention" else nothing
            counts[f"{kind}_tokens"] += hidden.shape[0] * hidden.shape[1]
            return whole(*args, **kwargs)

        module.forward = forward

    for index, layer in enumerate(model.get_decoder().layers):
        switch(layer.self_attn, "attention", index)
        switch(layer.mlp, "mlp", index)

    @torch.no_grad()
    def measure(removed: tuple[str, ...]) -> dict[str, float]:
        start = time.perf_counter()
        skipped.clear()
        skipped.update(removed)
        counts.update(attention_tokens=0, mlp_tokens=0, head_tokens=0)
        losses = []
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
            counts["head_tokens"] += len(window) - 1
        perplexity = math.exp(math.fsum(losses) / len(losses))
        return {"perplexity": perplexity, "seconds": time.perf_counter() - start, **counts}

    return measure


def exhaustive(options: argparse.Namespace) -> dict[str, Any]:
    """The same search on the mask tree; its dense evaluation, which the loop does not make, is counted too."""
    from blockpruner.console import Progress
    from blockpruner.loading.models import load
    from blockpruner.planning import find_plan, prepare
    from blockpruner.searching.contract import Stop
    from blockpruner.subject import open_subject

    subject = open_subject(load(options.model, dtype=options.dtype))
    times, show_progress = options.run / "search" / "seconds.jsonl", Progress()
    known = recalled(times)
    mark = time.perf_counter()

    def progress(done: int, total: int, message: str) -> None:
        """After each evaluation, so that what a killed session has taken is known as well as what it has found."""
        nonlocal mark
        now = time.perf_counter()
        record = {"seconds": now - mark}
        known.append(record)
        append(times, record)
        mark = now
        show_progress(done, total, message)

    task = prepare(
        subject,
        target=f"blocks={options.steps}",
        calibration=options.data,
        search="exhaustive",
        tokens=options.windows * options.window,
        window=options.window,
        quiet=True,
    )
    plan = find_plan(task, options.run / "search", progress)
    final = plan.steps[-1].loss if plan.steps else None
    if plan.stop_reason != Stop.TARGET or plan.work is None or final is None:
        raise SystemExit("the search did not finish")
    return {
        "settings": settings(options, task.data.record.fingerprint),
        "removed": [name for step in plan.steps for name in step.remove],
        **plan.work.model_dump(),
        "final_loss": final.value,
        "seconds": sum(record["seconds"] for record in known) + time.perf_counter() - mark,
        "peak_rss_bytes": peak(),
    }


if __name__ == "__main__":
    main()
