"""What is what: evaluate, list."""

from pathlib import Path
from typing import Annotated

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


@verb("blockpruner evaluate demo pruned --data wikitext2 --tokens 16384")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models, side by side.")],
    data: Annotated[str, typer.Option("--data", "--calibration", metavar="SOURCE", help=Source)],
    text: Text = TEXT,
    seed: Seed = 0,
    prompt: Annotated[
        str, typer.Option(help="Greedy sample after this; empty for none.")
    ] = "The most important thing to know about water is",
    loading: Loading = LOADING,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Also write evaluation.json there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare models. Perplexity with standard error, bits per byte, size, cache and a greedy sample, side by side."""
    from blockpruner.artifacts import run_folder
    from blockpruner.evaluation.quality import Evaluation, evaluate_masks, greedy_sample, load_text
    from blockpruner.tables import print_evaluation

    found, records, sources = [], [], []
    for name in models:
        subject = opened(name, loading)
        windows = load_text(data, subject.tokenizer, subject.model, seed=seed, **text.options())
        (quality,) = evaluate_masks(subject.model, subject.anatomy, windows, {name: frozenset()}, progress=Progress())
        sample = greedy_sample(subject.model, subject.tokenizer, prompt) if prompt else None
        found.append(quality.model_copy(update={"sample": sample}))
        records.append(windows.record)
        sources += [subject.folder] if subject.folder else []
        del subject  # before the next one is loaded
    evaluation = Evaluation.of(found, records[0])
    if run is not None:
        with run_folder(run, sources=sources) as folder:
            evaluation.save(folder / "evaluation.json")
    if as_json:
        print_json(evaluation.model_dump(mode="json"))
    else:
        print_evaluation(evaluation)


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
