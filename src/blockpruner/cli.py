"""The command line: one subcommand per verb. Parses, calls, prints; each verb imports what it needs when it runs.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a bug of ours (traceback in a file), 2 bad input,
3 a check failed, 4 the machine lacks something, 5 the run folder is busy or was begun otherwise, 130/143 interrupted.
"""

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.console import Progress, duration, say, table
from blockpruner.errors import BlockprunerError, InputError

if TYPE_CHECKING:
    from blockpruner.pipeline import Subject

app = typer.Typer(
    name="blockpruner",
    help="Find the attention and MLP blocks a Transformer does not need, remove them, and save a model that loads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, .gguf file, or `demo`.")]
Run = Annotated[Path, typer.Option("--run", metavar="DIR", help="Run folder: journal, plan, results. Resumes there.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or stored.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Data = Annotated[
    str, typer.Option(metavar="SOURCE", help="Hub data set, .txt/.jsonl/.parquet, alpaca, wikitext2, builtin.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of text to use.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Bos = Annotated[str, typer.Option(help="BOS at the start of the stream, of each window, none, or auto.")]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set.")]
Column = Annotated[str | None, typer.Option(help="Column that holds the text.")]
RemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run code that lies in the checkpoint.")]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: stops like Ctrl-C, with its own exit code."""


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from blockpruner import __version__

        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: blockpruner inspect demo")
def inspect(
    model: Model, dtype: Dtype = "auto", device: Device = "auto", remote: RemoteCode = False, as_json: Json = False
) -> None:
    """Show every block of a model: where it is, how large, what it costs, and that it was proved."""
    from blockpruner.tables import anatomy_json, print_anatomy

    subject = _open(model, dtype, device, remote)
    if as_json:
        _print_json(anatomy_json(subject))
    else:
        print_anatomy(subject)


@app.command(
    epilog="Example: blockpruner search demo --target blocks=6 --calibration builtin --tokens 1024 --window 256"
)
def search(
    model: Model,
    target: Annotated[str, typer.Option(help="blocks=6, layers=3 or params=-25%.")],
    calibration: Data,
    method: Annotated[str, typer.Option("--search", help="Search, with options as name:key=value.")] = "greedy",
    objective: Annotated[str, typer.Option(help="What is minimised: loss.")] = "loss",
    moves: Annotated[str, typer.Option(help="block, attention, mlp, layer or stock.")] = "block",
    protect: Annotated[str, typer.Option(help="Layers never touched: 0,1,-1.")] = "",
    tokens: Tokens = 16384,
    window: Window = 2048,
    bos: Bos = "auto",
    split: Split = None,
    column: Column = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    run: Run = Path("runs/search"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    remote: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find which blocks to remove, and write plan.json into the run folder. Killed? Run the same command again."""
    from blockpruner.pipeline import find_plan, prepare, quote
    from blockpruner.tables import print_plan

    if objective != "loss":
        raise InputError(f"{objective!r} is not a known objective", fix="use --objective loss")
    task = prepare(
        _open(model, dtype, device, remote),
        target=target,
        calibration=calibration,
        search=method,
        moves=moves,
        protect=protect,
        tokens=tokens,
        window=window,
        bos=bos,
        split=split,
        column=column,
        seed=seed,
    )
    price, data = quote(task), task.calibration.record
    say(
        f"price: {price.evaluations} evaluations of {data.windows} windows x {data.window} tokens; about "
        f"{price.work.attention_tokens:,} attention-, {price.work.mlp_tokens:,} mlp- and "
        f"{price.work.head_tokens:,} head-tokens, {duration(price.seconds)} on this machine"
    )
    if dry_run:
        if as_json:
            _print_json(
                {"evaluations": price.evaluations, **price.work.model_dump(), "seconds": round(price.seconds, 1)}
            )
        return
    plan = find_plan(task, run, Progress())
    if as_json:
        _print_json(plan.model_dump(mode="json"))
    else:
        print_plan(plan)
    say(f"plan: {run / 'plan.json'} ({plan.stop_reason})")
    if plan.stop_reason and "interrupted" in plan.stop_reason:
        raise KeyboardInterrupt
    say(f"next: blockpruner prune {model} --plan {run / 'plan.json'} --out {run / 'model'}")


@app.command(epilog="Example: blockpruner prune demo --plan runs/search/plan.json --first 4 --out pruned")
def prune(
    model: Model,
    plan: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="plan.json; BlockPruner's and LLM-Drop's lists too.")
    ],
    out: Out,
    first: Annotated[int | None, typer.Option(help="Apply only the first N steps of a nested plan.")] = None,
    form: Annotated[
        str | None, typer.Option(help="stock, stand-ins or zeroed; the best that fits if left out.")
    ] = None,
    dtype: Dtype = "stored",
    device: Device = "cpu",
    remote: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove the blocks of a plan for good and write a checkpoint, reloaded in a fresh process and compared."""
    from blockpruner.artifacts import check_new_folder
    from blockpruner.checkpoint import FORMS
    from blockpruner.pipeline import save_subject
    from blockpruner.plan import Plan
    from blockpruner.tables import print_saved

    if form is not None and form not in FORMS:
        raise InputError(f"{form!r} is not a form of checkpoint", fix=f"choose one of {', '.join(FORMS)}")
    check_new_folder(out)
    if not plan.is_file():
        raise InputError(f"{plan} is not a file", fix="give the plan.json that `blockpruner search` wrote")
    subject = _open(model, dtype, device, remote)
    chosen = Plan.read(plan, subject.anatomy.outline)
    chosen.check(subject.anatomy.outline, subject.identity, str(plan))
    saved = save_subject(subject, chosen, out, first=first, form=form)
    if as_json:
        _print_json({**asdict(saved), "folder": str(saved.folder)})
    else:
        print_saved(saved, subject.identity.parameters)


@app.command(epilog="Example: blockpruner evaluate demo pruned --data wikitext2:wiki.valid.raw --tokens 16384")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models, side by side.")],
    data: Annotated[
        str, typer.Option("--data", "--calibration", metavar="SOURCE", help="Text to evaluate on; see search.")
    ],
    tokens: Tokens = 16384,
    window: Window = 2048,
    bos: Bos = "auto",
    split: Split = None,
    column: Column = None,
    seed: Seed = 0,
    prompt: Annotated[
        str, typer.Option(help="Greedy sample after this; empty for none.")
    ] = "The most important thing to know about water is",
    dtype: Dtype = "auto",
    device: Device = "auto",
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Also write evaluation.json there.")] = None,
    remote: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Perplexity with standard error, bits per byte, size, cache and a greedy sample; several models side by side."""
    from blockpruner.artifacts import run_folder
    from blockpruner.evaluation.quality import Evaluation, evaluate_masks, greedy_sample, load_text
    from blockpruner.tables import print_evaluation

    found, records, dtypes = [], [], []
    for name in models:
        subject = _open(name, dtype, device, remote)
        text = load_text(
            data, subject.tokenizer, window=window, tokens=tokens, seed=seed, bos=bos, split=split, column=column
        )
        (quality,) = evaluate_masks(subject.model, subject.anatomy, text, {name: frozenset()}, progress=Progress())
        sample = greedy_sample(subject.model, subject.tokenizer, prompt) if prompt else None
        found.append(quality.model_copy(update={"sample": sample}))
        records.append(text.record)
        dtypes.append(subject.dtype)
        del subject  # before the next one is loaded
    evaluation = Evaluation.of(found, records[0], dtypes[0])
    if run is not None:
        with run_folder(run) as folder:
            evaluation.save(folder / "evaluation.json")
    if as_json:
        _print_json(evaluation.model_dump(mode="json"))
        return
    print_evaluation(evaluation)
    if len({record.fingerprint for record in records}) > 1:
        say("note: these models split the text into different tokens; compare bits per byte, not perplexity")


@app.command(epilog="Example: blockpruner demo --run runs/demo")
def demo(run: Run = Path("runs/demo"), dtype: Dtype = "auto") -> None:
    """The whole job on a small real model: search, prune, save, reload, compare with random removals."""
    from blockpruner.demo import run_demo

    run_demo(run, dtype)


@app.command(name="list", epilog="Example: blockpruner list --json")
def list_methods(as_json: Json = False) -> None:
    """List the searches, kinds of moves and targets."""
    from blockpruner.moves import GRANULARITIES
    from blockpruner.searches import ALIASES, SEARCHES

    searches = [{"name": name, "title": s.title, "source": s.source} for name, s in SEARCHES.items()]
    moves = [{"name": name, "meaning": (f.__doc__ or "").strip().splitlines()[0]} for name, f in GRANULARITIES.items()]
    targets = ["blocks=6", "layers=3", "params=-25%"]
    if as_json:
        _print_json(
            {"searches": searches, "aliases": ALIASES, "moves": moves, "targets": targets, "objectives": ["loss"]}
        )
        return
    table("Searches (--search)", ("name", "method", "source"), [(s["name"], s["title"], s["source"]) for s in searches])
    table("Moves (--moves)", ("name", "meaning"), [(m["name"], m["meaning"]) for m in moves])
    print("Aliases: " + ", ".join(f"{short} = {name}" for short, name in ALIASES.items()))
    print("Targets (--target): " + ", ".join(targets))


def _open(model: str, dtype: str, device: str, remote: bool) -> "Subject":
    from blockpruner.models import load
    from blockpruner.pipeline import open_subject

    say(f"loading {model}")
    return open_subject(load(model, dtype=dtype, device=device, allow_remote_code=remote))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def _errors_said() -> Iterator[None]:
    """Turn every way to fail into one message on stderr and its exit code."""
    try:
        yield
    except BlockprunerError as error:
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except Terminated:
        say(f"stopped; resume with: {_command()}")
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        say(f"interrupted; resume with: {_command()}")
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except MemoryError:
        say("error: not enough memory\n  next: use a smaller --window, --dtype bfloat16, or a smaller model")
        raise SystemExit(4) from None
    except Exception:
        from blockpruner.artifacts import write_bytes

        file = Path(tempfile.gettempdir(), f"blockpruner-{os.getpid()}.txt")
        write_bytes(file, f"{_command()}\n{traceback.format_exc()}".encode())
        say(f"error: a bug in blockpruner; the traceback is in {file}\n  next: report it with that file")
        raise SystemExit(1) from None


def _command() -> str:
    return shlex.join(["blockpruner", *sys.argv[1:]])


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def main() -> None:
    """Entry point of the console script."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _terminate)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _errors_said():
        app()


if __name__ == "__main__":
    main()
