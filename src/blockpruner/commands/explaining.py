"""Why it went: explain."""

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.command import opened_for, print_json, verb
from blockpruner.console import Progress, duration, say
from blockpruner.options import LOADING, Bos, Column, Json, Loading, Seed, Source, Split, Text, Tokens


@verb("blockpruner explain runs/demo --model demo --data builtin --tokens 2048")
def explain(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Run folder, folder of a pruned model, or plan file.")],
    model: Annotated[str | None, typer.Option(help="The whole model; the one that the plan names if left out.")] = None,
    data: Annotated[str, typer.Option("--data", "--calibration", metavar="SOURCE", help=Source)] = "builtin",
    tokens: Tokens = "4096",
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window; 512, or the model's context, if left out.")
    ] = None,
    bos: Bos = "auto",
    split: Split = None,
    column: Column = None,
    criteria: Annotated[
        str | None, typer.Option(help="Criteria beside the search, joined by commas; four cheap ones if left out.")
    ] = None,
    seed: Seed = 0,
    loading: Loading = LOADING,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Where explanation.json goes; DIR if that is a run folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the price and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Say why each block went. Cheap scores beside it, which tokens pay, what it did to the stream, its partners."""
    from blockpruner.criteria import parse_criterion
    from blockpruner.explaining import explain as explained
    from blockpruner.explanation_tables import print_explanation
    from blockpruner.frontier import plan_file
    from blockpruner.inquiry import CHEAP, inquire
    from blockpruner.plan import Plan
    from blockpruner.registry import split_methods

    file = plan_file(folder)
    texts = Text(tokens, window, bos, split, column).options()
    named = CHEAP if criteria is None else split_methods(criteria)
    for name in named:
        parse_criterion(name)  # what is misspelt is said before the model is loaded
    subject = opened_for(file, model, loading)
    inquiry = inquire(
        subject,
        Plan.read(file, subject.anatomy.outline),
        calibration=data,
        criteria=named,
        folder=file.parent,
        seed=seed,
        **texts,
    )
    masks, passes, seconds = inquiry.price()
    record = inquiry.data.record
    said = f"{masks} masks and about {passes:.3g} passes of the layers on {record.windows} x {record.window} tokens"
    say(f"price: {said}; {duration(seconds)} on this machine")
    if dry_run:
        if as_json:
            print_json({"masks": masks, "passes": passes, "seconds": round(seconds, 1)})
        return
    found = explained(inquiry, run or _run_folder(Path(folder)), Progress())
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_explanation(found)


def _run_folder(folder: Path) -> Path | None:
    """`folder` if results may go there: not into that of a model, nor beside a plan file."""
    return folder if folder.is_dir() and not (folder / "config.json").exists() else None
