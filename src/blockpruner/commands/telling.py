"""What is what: evaluate, list."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.command import opened, print_json, verb
from blockpruner.console import Progress, table
from blockpruner.options import (
    LOADING,
    TEXT,
    Json,
    Loading,
    Seed,
    Source,
    Text,
)

if TYPE_CHECKING:
    from blockpruner.evaluation.assessment import Contestant

Protocol = Annotated[
    str | None, typer.Option(help="As a paper measures perplexity: blockpruner, shortened-llama, deeper-look, ...")
]
Suite = Annotated[str | None, typer.Option(help="Tasks: quick, paper, full, or a paper's: blockpruner, mmlu, ...")]
Tasks = Annotated[str | None, typer.Option(metavar="NAMES", help="Tasks of lm-eval by name: piqa,boolq.")]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", metavar="DIR", help="Task files of your own; their Python code is run.")
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Items per task; all, or as the suite says, if left out.")]
Shots = Annotated[int | None, typer.Option(metavar="N", help="Examples before each question, in place of the suite's.")]
Batch = Annotated[int, typer.Option(min=1, help="Requests of a task at a time.")]
Generate = Annotated[bool, typer.Option("--generate", help="Let the models write, and say whether one collapsed.")]


@dataclass(frozen=True)
class Questions:
    """What is to be found out beside perplexity."""

    protocol: Protocol = None
    suite: Suite = None
    tasks: Tasks = None
    include_path: IncludePath = None
    limit: Limit = None
    shots: Shots = None
    batch: Batch = 1
    generate: Generate = False


QUESTIONS = Questions()


@verb("blockpruner evaluate demo pruned --data wikitext2 --suite quick --generate --run runs/compared")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="One or more models; the first is the reference.")
    ],
    data: Annotated[str | None, typer.Option("--data", "--calibration", metavar="SOURCE", help=Source)] = None,
    text: Text = TEXT,
    questions: Questions = QUESTIONS,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="The reference, if not the first.")] = None,
    seed: Seed = 0,
    prompt: Annotated[
        str, typer.Option(help="Greedy sample after this; empty for none.")
    ] = "The most important thing to know about water is",
    loading: Loading = LOADING,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Keep all results there; resumes.")] = None,
    as_json: Json = False,
) -> None:
    """Compare models: perplexity and bits per byte, tasks of lm-eval item by item, and what each model writes."""
    from blockpruner.artifacts import check_outside, run_folder
    from blockpruner.evaluation.assess import assess
    from blockpruner.evaluation.assessment import Contestant, Wanted, recovered_with
    from blockpruner.evaluation.suites import chosen_tasks
    from blockpruner.evaluation_tables import print_assessment

    @contextmanager
    def contestant(name: str) -> "Iterator[Contestant]":
        subject = opened(name, loading)
        if run is not None:
            check_outside(run, [subject.folder] if subject.folder else [])
        seen = recovered_with(subject.folder)
        yield Contestant(subject.model, subject.tokenizer, subject.anatomy, seen=seen)

    tasks, limit = chosen_tasks(questions.suite, questions.tasks, questions.shots, questions.limit)
    wanted = Wanted(
        data=data,
        text=text.options(),
        seed=seed,
        protocol=questions.protocol,
        prompt=prompt if data else "",
        tasks=tasks,
        limit=limit,
        batch=questions.batch,
        include_path=questions.include_path,
        generate=questions.generate,
    )
    wanted.check()
    names = models if reference is None else [reference, *(name for name in models if name != reference)]
    folders = [Path(name) for name in names]
    with run_folder(run, sources=folders) if run else nullcontext():
        found = assess(names, contestant, wanted, run=run, progress=Progress())
    if as_json:
        print_json(found.as_json())
    else:
        print_assessment(found)


@verb("blockpruner list --json", name="list")
def list_methods(as_json: Json = False) -> None:
    """List the searches, criteria, objectives, recoveries, recipes, kinds of moves and targets."""
    from blockpruner.catalogue import catalogue

    shelves = catalogue()
    if as_json:
        print_json(shelves)
        return
    for title, rows in shelves.items():
        table(title.capitalize(), tuple(rows[0]), [tuple(row.values()) for row in rows])
