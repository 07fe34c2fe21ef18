"""The command line: one subcommand per verb. Parses, calls, prints; each verb imports what it needs when it runs.

Results go to stdout, everything else to stderr; exit codes are in `exits`.
"""

import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from blockpruner.console import Progress, duration, say, table
from blockpruner.errors import InputError
from blockpruner.exits import catch_signals, errors_said

if TYPE_CHECKING:
    from blockpruner.subject import Subject

P = ParamSpec("P")

app = typer.Typer(
    name="blockpruner",
    help="Find the attention and MLP blocks a Transformer does not need, remove them, and save a model that loads.",
    epilog="Start with: blockpruner demo",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, .gguf file, or `demo`.")]
Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder: journal, plan; resumes there. runs/MODEL if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or stored: as in the checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
RemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run code that lies in the checkpoint.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights from pickles, which can run code.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Source = "Hub data set, .txt/.jsonl/.parquet file, alpaca, wikitext2 or builtin; part of one: FILE.jsonl[0:200]."
Objective = Annotated[str, typer.Option(help="loss, kl, js, logits, embedding or accuracy; `list` says more.")]
Protect = Annotated[str, typer.Option(help="Layers never touched: 0,1,-1; plus: the first 4 and the last 2.")]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens of text to use, or all.")]
Window = Annotated[
    int | None, typer.Option(min=2, help="Tokens per window; 2048, or the model's context, if left out.")
]
Bos = Annotated[str, typer.Option(help="BOS once per stream, once per window, none, or auto.")]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set.")]
Column = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def verb(example: str, name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A subcommand whose help ends with an example, and whose every way to fail is a message and an exit code."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @app.command(name, epilog=f"Example: {example}")
        @functools.wraps(function)
        def command(*args: P.args, **options: P.kwargs) -> None:
            with errors_said():
                function(*args, **options)

        return command

    return register


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from blockpruner import __version__

        print(__version__)
        raise typer.Exit


@verb("blockpruner inspect demo")
def inspect(
    model: Model,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    remote: RemoteCode = False,
    pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Show every block of a model. Where it is, how large, what it costs, and that it was proved."""
    from blockpruner.tables import anatomy_json, print_anatomy

    subject = _open(model, dtype, device, revision, remote, pickle)
    if as_json:
        _print_json(anatomy_json(subject))
    else:
        print_anatomy(subject)


@verb("blockpruner search demo --target blocks=6 --calibration builtin --tokens 1024 --window 256")
def search(
    model: Model,
    target: Annotated[str, typer.Option(help="blocks=6, layers=3 or params=-25%.")],
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help=Source)],
    method: Annotated[str, typer.Option("--search", help="Search, with options as name:key=value.")] = "greedy",
    objective: Objective = "loss",
    moves: Annotated[str, typer.Option(help="block, attention, mlp, layer or stock.")] = "block",
    protect: Protect = "",
    tokens: Tokens = "16384",
    window: Window = None,
    bos: Bos = "auto",
    split: Split = None,
    column: Column = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    run: Run = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Evaluations of a mask at most.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    revision: Revision = None,
    remote: RemoteCode = False,
    pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Find which blocks to remove. Writes plan.json into the run folder; killed, the same command goes on."""
    from blockpruner.pipeline import find_plan, prepare, quote
    from blockpruner.searching import Stop
    from blockpruner.tables import print_plan

    task = prepare(
        _open(model, dtype, device, revision, remote, pickle),
        target=target,
        calibration=calibration,
        search=method,
        objective=objective,
        moves=moves,
        protect=protect,
        tokens=_tokens(tokens),
        window=window,
        bos=bos,
        split=split,
        column=column,
        seed=seed,
    )
    price, data = quote(task), task.data.record
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
    run = run or Path("runs", Path(model).name)
    plan = find_plan(task, run, Progress(), budget)
    say(f"plan: {run / 'plan.json'} ({plan.stop_reason})")
    if as_json:
        _print_json(plan.model_dump(mode="json"))
    else:
        print_plan(plan)
    if plan.stop_reason == Stop.INTERRUPTED:
        raise KeyboardInterrupt
    prune = ["blockpruner", "prune", model, "--plan", str(run / "plan.json"), "--out", str(run / "model")]
    say(f"next: {shlex.join(prune)}")


@verb("blockpruner score demo --criterion cosine --criterion leave-one-out --calibration builtin --tokens 2048")
def score(
    model: Model,
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help=Source + " Items for --objective accuracy.")],
    criterion: Annotated[
        list[str], typer.Option("--criterion", help="How to measure, with options as name:key=value; several, or all.")
    ],
    objective: Objective = "loss",
    moves: Annotated[str, typer.Option(help="block, attention, mlp, layer, stock or span=N.")] = "block",
    protect: Protect = "",
    removed: Annotated[str, typer.Option(help="What is gone already: attention.3+mlp.7.")] = "dense",
    tokens: Tokens = "16384",
    window: Window = None,
    bos: Bos = "auto",
    split: Split = None,
    column: Column = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder: scores.json; resumes there.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    revision: Revision = None,
    remote: RemoteCode = False,
    pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Say how important each move is, by one criterion or several on the same data. Higher = keep."""
    from blockpruner.blocks import parse_mask
    from blockpruner.criteria import CRITERIA, parse_criterion
    from blockpruner.scoring import compare
    from blockpruner.scoring import score as scored
    from blockpruner.tables import print_scores

    names = list(CRITERIA) if criterion == ["all"] else criterion
    for name in names:
        parse_criterion(name)  # what is misspelt is said before the model is loaded
    comparison = compare(
        _open(model, dtype, device, revision, remote, pickle),
        criteria=names,
        calibration=calibration,
        objective=objective,
        moves=moves,
        protect=protect,
        removed=parse_mask(removed),
        tokens=_tokens(tokens),
        window=window,
        bos=bos,
        split=split,
        column=column,
        seed=seed,
    )
    passes, each = comparison.passes(), comparison.seconds()
    for name, number in passes.items():
        say(
            f"price: {name}: about {number:.3g} forward passes over the data, {duration(number * each)} on this machine"
        )
    if dry_run:
        if as_json:
            _print_json({"passes": passes, "seconds": round(each * sum(passes.values()), 1)})
        return
    table = scored(comparison, run or Path("runs", Path(model).name), Progress())
    if as_json:
        _print_json(table.model_dump(mode="json"))
    else:
        print_scores(table)


@verb("blockpruner prune demo --plan runs/demo/plan.json --first 4 --out pruned")
def prune(
    model: Model,
    plan: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="plan.json; BlockPruner's and LLM-Drop's lists too.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the model.")],
    first: Annotated[int | None, typer.Option(help="Apply only the first N steps of a nested plan.")] = None,
    form: Annotated[str | None, typer.Option(help="stock, stand-ins or zeroed, else the best that fits.")] = None,
    zeroed: Annotated[bool, typer.Option("--zeroed", help="The same as --form zeroed: runs everywhere.")] = False,
    dtype: Dtype = "stored",
    device: Device = "cpu",
    revision: Revision = None,
    remote: RemoteCode = False,
    pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Remove the blocks of a plan for good. Writes a checkpoint, reloads it in a fresh process and compares."""
    from blockpruner.artifacts import check_new_folder, read_json
    from blockpruner.checkpoint import FORMS, Form
    from blockpruner.pipeline import save_subject
    from blockpruner.plan import Plan
    from blockpruner.registry import lookup
    from blockpruner.tables import print_saved

    check_new_folder(out)
    if not plan.is_file():
        raise InputError(f"{plan} is not a file", fix="give the plan.json that `blockpruner search` wrote")
    forms: dict[str, Form] = {name: name for name in FORMS}
    asked = "zeroed" if zeroed else form
    taken = lookup(asked, forms, "form of checkpoint") if asked else None
    read_json(plan)  # what is no JSON at all is said before the model is loaded
    subject = _open(model, dtype, device, revision, remote, pickle)
    chosen = Plan.read(plan, subject.anatomy.outline)
    saved = save_subject(subject, chosen, out, first=first, form=taken, source=str(plan))
    if as_json:
        _print_json({**asdict(saved), "folder": str(saved.folder)})
    else:
        print_saved(saved, subject.identity.parameters)


@verb("blockpruner evaluate demo pruned --data wikitext2 --tokens 16384")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models, side by side.")],
    data: Annotated[str, typer.Option("--data", "--calibration", metavar="SOURCE", help=Source)],
    tokens: Tokens = "16384",
    window: Window = None,
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
    revision: Revision = None,
    remote: RemoteCode = False,
    pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Compare models. Perplexity with standard error, bits per byte, size, cache and a greedy sample, side by side."""
    from blockpruner.artifacts import run_folder
    from blockpruner.evaluation.quality import Evaluation, evaluate_masks, greedy_sample, load_text
    from blockpruner.tables import print_evaluation

    found, records, sources = [], [], []
    for name in models:
        subject = _open(name, dtype, device, revision, remote, pickle)
        text = load_text(
            data,
            subject.tokenizer,
            subject.model,
            tokens=_tokens(tokens),
            window=window,
            bos=bos,
            split=split,
            column=column,
            seed=seed,
        )
        (quality,) = evaluate_masks(subject.model, subject.anatomy, text, {name: frozenset()}, progress=Progress())
        sample = greedy_sample(subject.model, subject.tokenizer, prompt) if prompt else None
        found.append(quality.model_copy(update={"sample": sample}))
        records.append(text.record)
        sources += [subject.folder] if subject.folder else []
        del subject  # before the next one is loaded
    evaluation = Evaluation.of(found, records[0])
    if run is not None:
        with run_folder(run, sources=sources) as folder:
            evaluation.save(folder / "evaluation.json")
    if as_json:
        _print_json(evaluation.model_dump(mode="json"))
    else:
        print_evaluation(evaluation)


@verb("blockpruner demo --run runs/demo")
def demo(run: Run = None, dtype: Dtype = "auto") -> None:
    """Do the whole job on a small real model. Search, prune, save, reload, compare with random removals."""
    from blockpruner.demo import run_demo

    run_demo(run or Path("runs/demo"), dtype)


@verb("blockpruner list --json", name="list")
def list_methods(as_json: Json = False) -> None:
    """List the searches, criteria, objectives, kinds of moves and targets."""
    from blockpruner.catalogue import catalogue

    shelves = catalogue()
    if as_json:
        _print_json(shelves)
        return
    for title, rows in shelves.items():
        table(title.capitalize(), tuple(rows[0]), [tuple(row.values()) for row in rows])


def _tokens(text: str) -> int | None:
    """A number of tokens, or None for all there are."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--tokens {text} is no number of tokens", fix="give a whole number above 0, or all")
    return int(text)


def _open(model: str, dtype: str, device: str, revision: str | None, remote: bool, pickle: bool) -> "Subject":
    from blockpruner.models import load
    from blockpruner.subject import open_subject

    say(f"loading {model}")
    return open_subject(
        load(model, dtype=dtype, device=device, revision=revision, allow_remote_code=remote, allow_pickle=pickle)
    )


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Entry point of the console script."""
    catch_signals()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


if __name__ == "__main__":
    main()
