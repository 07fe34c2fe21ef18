"""What can go: inspect, score, search."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.command import crew_of, opened, priced, print_json, say_spent, stream_memory, verb
from blockpruner.console import Progress, duration, say
from blockpruner.options import (
    LOADING,
    SEARCHING,
    TEXT,
    Cluster,
    Json,
    Loading,
    Memory,
    Model,
    Objective,
    Protect,
    Run,
    Searching,
    Seed,
    Source,
    Stream,
    Text,
    Workers,
)

if TYPE_CHECKING:
    from blockpruner.plan import Plan
    from blockpruner.price import Receipt
    from blockpruner.scoring import Comparison


@verb("blockpruner inspect demo")
def inspect(
    model: Model,
    loading: Loading = LOADING,
    as_json: Json = False,
) -> None:
    """Show every block of a model. Where it is, how large, what it costs, and that it was proved."""
    from blockpruner.tables import anatomy_json, print_anatomy

    subject = opened(model, loading)
    if as_json:
        print_json(anatomy_json(subject))
    else:
        print_anatomy(subject)


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
    text: Text = TEXT,
    seed: Seed = 0,
    loading: Loading = LOADING,
    stream: Stream = False,
    memory: Memory = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder: scores.json; resumes there.")
    ] = None,
    workers: Workers = 0,
    ray: Cluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Say how important each move is, by one criterion or several on the same data. Higher = keep."""
    from blockpruner.blocks import parse_mask
    from blockpruner.criteria import CRITERIA, parse_criterion
    from blockpruner.objectives import parse_objective
    from blockpruner.scoring import compare
    from blockpruner.scoring import score as scored
    from blockpruner.searching.moves import check_granularity
    from blockpruner.tables import print_scores

    names = list(CRITERIA) if criterion == ["all"] else criterion
    for name in names:
        parse_criterion(name)  # what is misspelt is said before the model is loaded
    parse_objective(objective)
    check_granularity(moves)
    gone, texts = parse_mask(removed), text.options()
    crew = crew_of(workers, ray, model, loading)
    comparison = compare(
        opened(model, loading, stream_memory(stream, memory, workers)),
        criteria=names,
        calibration=calibration,
        objective=objective,
        moves=moves,
        protect=protect,
        removed=gone,
        whatever_fits=criterion == ["all"],
        **texts,
        seed=seed,
    )
    price = _price_of(comparison)
    if dry_run:
        if as_json:
            print_json(price)
        return
    table = scored(comparison, run or Path("runs", Path(model).name), Progress(), crew)
    if as_json:
        print_json(table.model_dump(mode="json"))
    else:
        print_scores(table)


def _price_of(comparison: "Comparison") -> dict[str, object]:
    """What scoring costs, said."""
    passes, each = comparison.passes(), comparison.seconds()
    for name, number in passes.items():
        say(
            f"price: {name}: about {number:.3g} forward passes over the data, {duration(number * each)} on this machine"
        )
    return {"passes": passes, "seconds": round(each * sum(passes.values()), 1)}


@verb("blockpruner search demo --target blocks=6 --calibration builtin --tokens 1024 --window 256")
def search(
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            help="blocks=6, layers=3, params=-25%, memory=16GiB,context=32768,batch=8, speed=1.3x:decode "
            "or loss=+0.1; several joined by commas: all are met, blocks and layers exactly."
        ),
    ],
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help=Source)],
    how: Searching = SEARCHING,
    text: Text = TEXT,
    seed: Seed = 0,
    loading: Loading = LOADING,
    stream: Stream = False,
    memory: Memory = None,
    run: Run = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A plan to go on from, for swap, one-shot and iterative."),
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Evaluations of a mask at most.")] = None,
    workers: Workers = 0,
    ray: Cluster = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Find which blocks to remove. Writes plan.json into the run folder; killed, the same command goes on."""
    from blockpruner.plan import Plan
    from blockpruner.planning import check_words, prepare
    from blockpruner.price import search_for
    from blockpruner.searching.contract import Stop

    check_words(target=target, **vars(how))  # a mistake is said before the model is loaded
    texts = text.options()
    crew = crew_of(workers, ray, model, loading)
    subject = opened(model, loading, stream_memory(stream, memory, workers))
    run = run or Path("runs", Path(model).name)
    task = prepare(
        subject,
        target=target,
        costs=run / "costs.json",
        progress=Progress(),
        calibration=calibration,
        start=Plan.read(start, subject.anatomy.outline) if start else None,
        seed=seed,
        **vars(how),
        **texts,
    )
    price = priced(task, as_json and dry_run)
    if dry_run:
        return
    plan, receipt = search_for(task, price, run, Progress(), budget, crew)
    _say_found(plan, receipt, run, as_json)
    if plan.stop_reason == Stop.INTERRUPTED:
        raise KeyboardInterrupt
    _say_next(run, [model, *loading.again(), *(["--stream"] if stream else [])], calibration, how.recovery)


def _say_found(plan: "Plan", receipt: "Receipt", run: Path, as_json: bool) -> None:
    from blockpruner.tables import print_plan

    say_spent(receipt)
    say(f"plan: {run / 'plan.json'} ({plan.stop_reason})")
    if as_json:
        print_json(plan.model_dump(mode="json"))
    else:
        print_plan(plan)


def _say_next(run: Path, model: Sequence[str], calibration: str, recovery: str | None) -> None:
    """The commands that come after a search. model: its name, and the options that it was opened with."""
    plan = str(run / "plan.json")
    say(f"next: {shlex.join(['blockpruner', 'prune', *model, '--plan', plan, '--out', str(run / 'model')])}")
    if recovery:
        fit = ["--method", recovery, "--calibration", calibration, "--out", str(run / "recovered")]
        say(f"or: {shlex.join(['blockpruner', 'recover', plan, '--dense', *model, *fit])}")
