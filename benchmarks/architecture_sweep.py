"""Every causal, masked and encoder-decoder architecture of transformers, tiny and random: what works, what is refused.

    python benchmarks/architecture_sweep.py --jobs 2 --json experiments/architecture_sweep.json

A process that has imported torch and transformers, and never this package, forks one child per architecture, which
runs the checks of `architecture_checks`; a second child, where this package cannot be imported, opens the checkpoints
that the first one wrote: plain ones without a layer, and the one without blocks by its own remote code. Results are
appended to RUN/journal.jsonl, so that the same command goes on after an interruption; a journal that other code or
other versions have written is refused. Exit code 1 when anything came out wrong without an error.
"""

import argparse
import datetime
import fnmatch
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests"), str(REPO / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time, one thread each")
    parser.add_argument("--only", default="*", help="patterns of architectures: causal/llama,masked/*")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a child is stopped")
    parser.add_argument("--run", type=Path, default=Path("runs/architecture_sweep"))
    parser.add_argument("--fresh", action="store_true", help="forget what the journal has")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    patterns = options.only.split(",")
    wanted = [e for e in warm().entries() if any(fnmatch.fnmatch(str(e), pattern) for pattern in patterns)]
    options.run.mkdir(parents=True, exist_ok=True)
    journal = options.run / "journal.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    header = {"versions": versions(), "code": fingerprint()}
    rows = recalled(journal, header)
    print(heading(), flush=True)
    todo = [entry for entry in wanted if str(entry) not in rows]
    for row in measured(todo, options.jobs, options.limit):
        with journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[row["architecture"]] = row
        print(line(row), flush=True)
    found = [rows[str(entry)] for entry in wanted]
    sums = totals(found)
    show(found, sums)
    if options.json:
        if fingerprint() != header["code"]:
            raise SystemExit("the code was changed meanwhile, so these rows are not all of one: nothing was written")
        told = [{**row, "reason": remark(row)} for row in found]
        write(options.json, {**about(options), **header, "totals": sums, "rows": told})
    sys.exit(sums["silently_wrong"] > 0)


def warm() -> Any:
    """The module `zoo`, with all loaded that every child needs, this package apart."""
    for name in ("architecture_reloads", "pydantic", "torch.utils.flop_counter", "transformers.generation"):
        importlib.import_module(name)
    zoo: Any = importlib.import_module("zoo")
    model = zoo.build("causal/llama")
    model.generate(**zoo.inputs(model), max_new_tokens=2, pad_token_id=0)
    return zoo


def versions() -> dict[str, str]:
    return {
        "blockpruner": tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def fingerprint() -> str:
    """Of all code that the results depend on."""
    files = [*(REPO / "src").rglob("*.py"), *(REPO / "tests").glob("zoo*.py"), *Path(__file__).parent.glob("arch*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(REPO).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def recalled(journal: Path, header: Row) -> dict[str, Row]:
    """The rows of an earlier session, by architecture; what a killed one left of a last line is cut off."""
    whole, _, torn = (journal.read_bytes() if journal.exists() else b"").rpartition(b"\n")
    lines = [json.loads(text) for text in whole.splitlines()]
    if lines and lines[0] != header:
        raise SystemExit(f"{journal} is of {lines[0]}, and this is {header}: add --fresh, or name another --run")
    if not lines or torn:
        journal.write_text("".join(json.dumps(value) + "\n" for value in [header, *lines[1:]]))
    return {row["architecture"]: row for row in lines[1:]}


def measured(todo: list[Any], jobs: int, limit: float) -> Iterable[Row]:
    """The row of each entry, as they become ready; each comes from a process of its own."""
    running: dict[int, tuple[Any, Path]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    entry = todo.pop(0)
                    folder = Path(scratch, str(entry).replace("/", "-"))
                    folder.mkdir()
                    running[forked(lambda e=entry, f=folder: whole_row(e, f, limit), folder / "row.json")] = (
                        entry,
                        folder,
                    )
                pid, _ = os.wait()
                entry, folder = running.pop(pid)
                yield finished(folder / "row.json") | {"architecture": str(entry)}
                shutil.rmtree(folder)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGTERM)


def forked(work: Callable[[], Row], result: Path) -> int:
    """Start a child that writes what `work` returns to `result`; its output goes beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: all that torch has here are idle
        pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        try:
            made = work()
        except Exception as error:
            traceback.print_exc()
            made = {"crash": f"{type(error).__name__}: {error}"[:400]}
        result.write_text(json.dumps(made))
    finally:
        os._exit(0)


def finished(result: Path) -> Row:
    return json.loads(result.read_text()) if result.exists() else {"crash": "the process ended without a result"}


def child(work: Callable[[], Row], result: Path, limit: float) -> Row:
    """What `work` returns in a child of this process, which is stopped after `limit` seconds."""
    pid = forked(work, result)
    end = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"crash": f"not ready after {limit:g} seconds"}
        time.sleep(0.01)
    return finished(result)


def whole_row(entry: Any, folder: Path, limit: float) -> Row:
    """Both children of one entry, and what they found together."""
    start = time.monotonic()
    row = child(lambda: with_package(entry, folder), folder / "with.json", limit)
    cases = row.pop("cases", [])
    opened = [case for case in cases if "outcome" not in case]
    if opened:
        reloads = importlib.import_module("architecture_reloads")
        answers = child(lambda: reloads.opened(opened, folder), folder / "without.json", limit)
        for case in opened:
            case["outcome"] = answers.get(case["name"], answers.get("crash", "no answer"))
    outcomes = {case["name"]: case["outcome"] for case in cases}
    if cases:
        row["dense_reload"] = outcomes.pop("dense")
        remote = row["remote"] = outcomes.pop("blocks", "none was written")
        row["layer_reload"] = {name.removeprefix("layer "): found for name, found in outcomes.items()}
        if remote.startswith("differs"):
            row.setdefault("wrong", []).append(f"checkpoint by its remote code: {remote}")
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def with_package(entry: Any, folder: Path) -> Row:
    """In a child: build the model and run all checks that need this package."""
    zoo: Any = importlib.import_module("zoo")
    row: Row = {"class": zoo.model_class(entry).__name__, "instantiated": False}
    try:
        model, reference = zoo.build(entry), zoo.build(entry)
        inputs = zoo.inputs(model)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return row | {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    row |= {"instantiated": True, "parameters": sum(p.numel() for p in model.parameters())}
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
    checks = importlib.import_module("architecture_checks")
    return row | checks.check(model, reference, entry.head, inputs, folder)


def generation_before(row: Row) -> list[str]:
    """The ways of caching that agree with plain generation on the whole model."""
    return [way for way, found in row.get("generation", {}).items() if found["before"] == "equal"]


def totals(rows: list[Row]) -> dict[str, int]:
    """Architectures by what holds for them; silently_wrong counts comparisons."""
    causal = [row for row in rows if row["architecture"].startswith("causal/")]
    consistent = [row for row in causal if generation_before(row)]
    return {
        "mapped": len(rows),
        "instantiated": sum(row.get("instantiated", False) for row in rows),
        "proved": sum(row.get("proved", False) for row in rows),
        "exact": sum(row.get("exact", False) for row in rows),
        "cache_consistent_before": len(consistent),
        "cache_equal": sum(
            all(row["generation"][way]["after"] == "equal" for way in generation_before(row)) for row in consistent
        ),
        "layer_reload_equal": sum(set(row.get("layer_reload", {}).values()) == {"equal"} for row in rows),
        "block_reload_equal": sum(row.get("registered") == row.get("remote") == "equal" for row in rows),
        "refused": sum(row.get("instantiated", False) and not row.get("proved", False) for row in rows),
        "silently_wrong": sum(len(row.get("wrong", ())) for row in rows),
    }


COLUMNS = ("proved", "attention", "mlp", "other", "cache", "layers", "blocks", "tree", "seconds")


def heading() -> str:
    return f"{'architecture':36}" + "".join(f"{name:>10}" for name in COLUMNS)


def line(row: Row) -> str:
    """One line of the table."""
    return f"{row['architecture']:36}" + "".join(f"{text:>10}" for text in cells(row)) + f"  {remark(row)[:100]}"


def cells(row: Row) -> list[str]:
    gaps = row.get("removal", {})
    before = generation_before(row)
    kept = sum(row["generation"][way]["after"] == "equal" for way in before)
    layers = row.get("layer_reload", {}).values()
    block = [row.get(way) for way in ("registered", "remote")]
    return [
        "yes" if row.get("proved") else "no" if row.get("instantiated") else "-",
        *("-" if gaps.get(kind) is None else f"{float(gaps[kind]):.2g}" for kind in ("attention", "mlp", "other")),
        f"{kept}/{len(before)}" if before else "-",
        f"{sum(text == 'equal' for text in layers)}/{len(layers)}" if layers else "-",
        f"{block.count('equal')}/2" if any(block) else "-",
        str(row.get("mask_tree", "-")).partition(":")[0],
        f"{row.get('seconds', 0):.1f}",
    ]


def remark(row: Row) -> str:
    """The worst there is to say."""
    said = [row.get("crash"), *(f"WRONG: {text}" for text in row.get("wrong", ())), row.get("reason")]
    said += [f"{check}: {text}" for check, text in row.get("errors", {}).items()]
    said += [f"layer {name}: {text}" for name, text in row.get("layer_reload", {}).items() if text != "equal"]
    said += [f"{way}: {row[way]}" for way in ("registered", "remote") if row.get(way, "equal") != "equal"]
    return next((text for text in said if text), "")


def show(rows: list[Row], sums: Mapping[str, int]) -> None:
    print("\n" + "\n".join(f"{name:26}{value:>6}" for name, value in sums.items()))
    trees = Counter(row["mask_tree"].partition(":")[0] for row in rows if "mask_tree" in row)
    print("mask tree: " + ", ".join(f"{name} {count}" for name, count in trees.items()))


def about(options: argparse.Namespace) -> Row:
    """Where the figures come from."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    words = ["python", "benchmarks/architecture_sweep.py"]
    words += [] if options.only == "*" else ["--only", options.only]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": " ".join(words), "commit": told.stdout.strip(), "date": today}


def write(path: Path, value: object) -> None:
    """The whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


if __name__ == "__main__":
    main()
