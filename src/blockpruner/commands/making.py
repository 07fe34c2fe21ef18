"""Smaller models: prune, recover, run, demo."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.command import crew_of, opened, opened_for, priced, print_json, say_spent, stream_memory, verb
from blockpruner.console import Progress, say
from blockpruner.errors import InputError
from blockpruner.options import (
    LOADING,
    ON_CPU,
    STORED,
    TEXT,
    Cluster,
    Dtype,
    Json,
    Loading,
    Model,
    Run,
    Seed,
    Source,
    Stream,
    Text,
    Window,
    Workers,
    token_count,
)

if TYPE_CHECKING:
    from blockpruner.mending import Task
    from blockpruner.surgery.checkpoint import Saved


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
    loading: Loading = ON_CPU,
    stream: Stream = False,
    as_json: Json = False,
) -> None:
    """Remove the blocks of a plan for good. Writes a checkpoint, reloads it in a fresh process and compares."""
    from blockpruner.artifacts import check_new_folder, read_json
    from blockpruner.loading.lending import lends
    from blockpruner.plan import Plan
    from blockpruner.registry import lookup
    from blockpruner.subject import save_subject
    from blockpruner.surgery.checkpoint import FORMS, Form

    check_new_folder(out)
    if not plan.is_file():
        raise InputError(f"{plan} is not a file", fix="give the plan.json that `blockpruner search` wrote")
    forms: dict[str, Form] = {name: name for name in FORMS}
    asked = "zeroed" if zeroed else form
    taken = lookup(asked, forms, "form of checkpoint") if asked else None
    read_json(plan)  # what is no JSON at all is said before the model is loaded
    subject = opened(model, loading, stream_memory(stream, None))
    if lends(subject.model):
        raise InputError(
            "prune --stream copies weights as they are in the files", fix="give their dtype, and no --device but cpu"
        )
    chosen = Plan.read(plan, subject.anatomy.outline)
    saved = save_subject(subject, chosen, out, first=first, form=taken, source=str(plan))
    _say_saved(saved, subject.identity.parameters, as_json)


@verb("blockpruner recover pruned --method linear:rank=64,lora --calibration alpaca --out recovered")
def recover(
    pruned: Annotated[Path, typer.Argument(metavar="PLAN_OR_PRUNED", help="plan.json, or a folder from `prune`.")],
    method: Annotated[
        str, typer.Option(help="bias, linear:rank=64, lora, ...; several with commas; `list` says more.")
    ],
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help="Text to fit on. " + Source)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the model.")],
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="The whole model; else as the plan says.")] = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to judge by; else the last fifth of that to fit on.")
    ] = None,
    first: Annotated[int | None, typer.Option(help="Only the first N steps of a nested plan are removed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it also if held-out text is worse off.")] = False,
    text: Text = TEXT,
    seed: Seed = 0,
    loading: Loading = STORED,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Checkpoints of a training; it resumes there. OUT.run if left out."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Win quality back: something small where blocks were, or training. Judged on held-out text, step by step."""
    from blockpruner.artifacts import check_new_folder
    from blockpruner.mending import forget, prepare
    from blockpruner.plan import Plan
    from blockpruner.recoveries import check_installed, parse_chain
    from blockpruner.tables import print_recovery

    check_new_folder(out, sources=(pruned,) if pruned.is_dir() else ())
    check_installed(parse_chain(method, seed=seed))  # a mistake is said before the model is loaded
    texts = text.options()
    plan = _plan_of(pruned)
    subject = opened_for(plan, dense, loading, "--dense")
    task = prepare(
        subject,
        Plan.read(plan, subject.anatomy.outline),
        method=method,
        calibration=calibration,
        held_out=held_out,
        first=first,
        force=force,
        seed=seed,
        source=str(plan),
        **texts,
    )
    folder = run or out.with_name(f"{out.name}.run")
    price = _price_of(task, folder, "where they stay" if run else "until the model is saved; with --run they stay")
    if dry_run:
        if as_json:
            print_json({"price": price})
        return
    mended = task.run(Progress(), folder)
    if not as_json:
        print_recovery(mended.record)
    saved = mended.save(out)
    if task.trains and run is None:
        forget(folder)
    _say_saved(saved, subject.identity.parameters, as_json, recovery=mended.record.model_dump(mode="json"))


def _say_saved(saved: "Saved", parameters: int, as_json: bool, **more: object) -> None:
    """What was saved; parameters: of the dense model."""
    from blockpruner.tables import print_saved

    if as_json:
        print_json({**asdict(saved), "folder": str(saved.folder), **more})
    else:
        print_saved(saved, parameters)


def _price_of(task: "Task", folder: Path, stay: str) -> list[str]:
    """What a recovery costs, said."""
    price = task.price()
    for line in price:
        say(f"price: {line}")
    if task.trains:
        say(f"checkpoints: {folder}, {stay}")
    return price


def _plan_of(pruned: Path) -> Path:
    """The plan in a file, or beside the weights of a pruned model."""
    plan = pruned / "plan.json" if pruned.is_dir() else pruned
    if not plan.is_file():
        raise InputError(f"{plan} is not a file", fix="give a plan.json, or a folder that `blockpruner prune` wrote")
    if pruned.is_dir() and (plan.parent / "recovery.json").is_file():
        say(f"{pruned} was recovered before: this begins anew, so name all methods together, as in linear,lora")
    return plan


@verb(
    "blockpruner run llm-drop-attention --model demo --target blocks=4 --calibration builtin --tokens 2048", name="run"
)
def run_recipe(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe by name (`list` has them), or a .toml file.")
    ],
    model: Annotated[str, typer.Option(metavar="MODEL", help="Hub name, folder, .gguf file, or `demo`.")],
    target: Annotated[str | None, typer.Option(help="Instead of the paper's: blocks=6, layers=3, params=-25%.")] = None,
    calibration: Annotated[str | None, typer.Option(metavar="SOURCE", help="Instead of the paper's. " + Source)] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="What the result is measured on.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens of calibration text, or all.")] = None,
    window: Window = None,
    data_tokens: Annotated[
        str | None, typer.Option("--data-tokens", metavar="N", help="Tokens that the result is measured on, or all.")
    ] = None,
    data_window: Annotated[
        int | None, typer.Option("--data-window", min=2, metavar="N", help="Tokens per window of these.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    loading: Loading = LOADING,
    run: Run = None,
    workers: Workers = 0,
    ray: Cluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Do what a paper did, on any model. Search, save the smaller model, measure it beside random removals."""
    from blockpruner import pipeline
    from blockpruner.price import NAME, Receipt
    from blockpruner.recipe import Recipe
    from blockpruner.tables import print_outcome

    crew = crew_of(workers, ray, model, loading)
    count, data_count = (None if text is None else token_count(text) or 0 for text in (tokens, data_tokens))
    chosen = Recipe.read(recipe).changed(
        calibration,
        data,
        target=target,
        tokens=count,
        window=window,
        data_tokens=data_count,
        data_window=data_window,
        seed=seed,
    )
    for difference in chosen.differences:
        say(f"differs from the paper: {difference}")
    folder = run or Path("runs", f"{Path(recipe).stem}-{Path(model).name}")
    subject = replace(opened(model, loading), stored=None)  # what is saved has the dtype that was loaded
    task = pipeline.prepared(chosen, subject, folder, Progress())
    price = priced(task, as_json and dry_run)
    if dry_run:
        return
    outcome, plan, _ = pipeline.run(chosen, task, price, folder, progress=Progress(), crew=crew)
    say_spent(Receipt.load(folder / NAME))
    say(f"plan: {folder / 'plan.json'} ({plan.stop_reason}); model: {folder / 'model'}")
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        print_outcome(outcome)


@verb("blockpruner demo --run runs/demo")
def demo(run: Run = None, dtype: Dtype = "auto") -> None:
    """Do the whole job on a small real model. Search, prune, save, reload, compare with random removals."""
    from blockpruner.demo import run_demo

    run_demo(run or Path("runs/demo"), dtype)
