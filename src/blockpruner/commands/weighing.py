"""What it weighs: bench, pareto."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.command import opened, opened_for, print_json, verb
from blockpruner.console import Progress, say
from blockpruner.errors import InputError
from blockpruner.options import LOADING, TEXT, Json, Loading, Seed, Source, Text

if TYPE_CHECKING:
    from blockpruner.artifacts import Estimate
    from blockpruner.blocks import Mask
    from blockpruner.evaluation.speed import Contestant
    from blockpruner.searching.costs import Card, Costs
    from blockpruner.subject import Subject
    from blockpruner.texts.calibration import TextOptions


@verb("blockpruner bench demo --plan runs/demo/plan.json --protocol quick:context=128 --limit 4GiB")
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, side by side; the first is the base.")
    ],
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan", metavar="FILE", help="The first model without this plan, or FILE[:N], its first N steps."
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="quick, shortened-llama, llm-drop or sleb, with options as name:rounds=20,new=64.")
    ] = "quick",
    batch: Annotated[str | None, typer.Option(help="Batch sizes instead of the protocol's: 1,8.")] = None,
    context: Annotated[str | None, typer.Option(help="Prompt lengths instead of the protocol's: 512,2048.")] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Say the largest batch and context in 16GiB.")
    ] = None,
    loading: Loading = LOADING,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Also write benchmark.json there.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory. Prefill and decode apart, in turns, with intervals; cache counted and measured."""
    from blockpruner.artifacts import run_folder
    from blockpruner.evaluation.speed import Benchmark, Contestant, measure
    from blockpruner.evaluation.timing import parse_protocol
    from blockpruner.searching.costs import parse_bytes
    from blockpruner.weighing_tables import print_benchmark

    asked = parse_protocol(protocol)
    sizes = [
        (b, c) for b in _numbers("--batch", batch, asked.batch) for c in _numbers("--context", context, asked.context)
    ]
    most = None if limit is None else parse_bytes(limit)
    subjects = [opened(name, loading) for name in models]
    contestants = [Contestant(name, subject) for name, subject in zip(models, subjects, strict=True)]
    contestants[1:1] = [_without(subjects[0], text) for text in plan or ()]
    cells = [
        measure(contestants, replace(asked, batch=b, context=c), limit=most, progress=Progress()) for b, c in sizes
    ]
    found = Benchmark.of(asked, subjects[0], cells, most)
    if run is not None:
        with run_folder(run, sources=[subject.folder for subject in subjects if subject.folder]) as folder:
            found.save(folder / "benchmark.json")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_benchmark(found)


@verb("blockpruner pareto runs/demo --model demo --plot pareto.png")
def pareto(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Run folders, or plan files.")],
    model: Annotated[str | None, typer.Option(help="The model; that of the first plan if left out.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help=f"Judge all points by this text. {Source}")] = None,
    text: Text = TEXT,
    seed: Seed = 0,
    budget: Annotated[float, typer.Option("--within", help="Recommend what loses no more than this, in nats.")] = 0.1,
    device_spec: Annotated[
        str | None, typer.Option("--device-spec", metavar="CARD", help="Decode time for l4, h100.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a PNG.")] = None,
    loading: Loading = LOADING,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Also write pareto.json there.")] = None,
    as_json: Json = False,
) -> None:
    """Weigh quality against size, cache and speed. All depths of one or several plans, and where to begin."""
    from blockpruner.artifacts import run_folder
    from blockpruner.frontier import pareto_of, plan_file, read_plans
    from blockpruner.frontier_picture import check_picture, picture
    from blockpruner.searching.costs import parse_card
    from blockpruner.weighing_tables import print_pareto

    card, texts = parse_card(device_spec) if device_spec else None, text.options()
    if plot is not None:
        check_picture(plot)
    if not 0 <= budget < float("inf"):
        raise InputError(f"--within {budget} is no number of nats", fix="give 0 or more, as in --within 0.1")
    for folder in folders:
        plan_file(folder)  # a mistake is said before the model is loaded
    subject = opened_for(plan_file(folders[0]), model, loading)
    plans, costs = read_plans(folders, subject.anatomy.outline)
    for name, one in plans.items():
        one.check(subject.anatomy.outline, subject.identity, name)
    found = pareto_of(
        subject,
        plans,
        costs=next(iter(costs.values()), None) if card is None else _computed(subject, card),
        judge=None if data is None else _judge(subject, data, seed, texts),
        judged_by=data or "",
        budget=budget,
    )
    if run is not None:
        with run_folder(run, sources=[subject.folder] if subject.folder else []) as folder:
            found.save(folder / "pareto.json")
    if plot is not None:
        picture(found, plot)
        say(f"drawn: {plot}")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_pareto(found)


def _numbers(option: str, text: str | None, default: int) -> list[int]:
    if text is None:
        return [default]
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text, re.ASCII):
        raise InputError(f"{option} {text} is no list of numbers", fix=f"give numbers above 0: {option} 1,8")
    return [int(number) for number in text.split(",")]


def _without(subject: "Subject", text: str) -> "Contestant":
    """The model without the plan in a file, or its first steps: `plan.json[:3]`."""
    from blockpruner.evaluation.speed import Contestant
    from blockpruner.plan import Plan

    found = re.fullmatch(r"(.*?)(?:\[:(\d{1,6})\])?", text)
    file, first = found.groups() if found else (text, None)
    plan = Plan.read(Path(file), subject.anatomy.outline)
    plan.check(subject.anatomy.outline, subject.identity, file)
    return Contestant(f"without {text}", subject, plan.mask(int(first) if first else None))


def _computed(subject: "Subject", card: "Card") -> "Costs":
    """The time of decoding one sequence on a card that is not here."""
    from blockpruner.evaluation.compute import on_card
    from blockpruner.evaluation.memory import read_ledger
    from blockpruner.searching.targets import Speed

    return on_card(read_ledger(subject.model, subject.anatomy), card, Speed(Fraction(2)))


def _judge(
    subject: "Subject", data: str, seed: int, text: "TextOptions"
) -> "Callable[[Mapping[str, Mask]], Mapping[str, Estimate]]":
    """What evaluates masks on this text."""
    from blockpruner.evaluation.quality import evaluate_masks, load_text

    windows = load_text(data, subject.tokenizer, subject.model, seed=seed, **text)

    def judge(masks: "Mapping[str, Mask]") -> "Mapping[str, Estimate]":
        found = evaluate_masks(subject.model, subject.anatomy, windows, masks, progress=Progress())
        return {one.name: one.loss for one in found}

    return judge
