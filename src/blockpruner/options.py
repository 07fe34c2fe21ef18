"""The options that several commands of the command line share; a command takes those of a group as one parameter."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.errors import InputError

if TYPE_CHECKING:
    from blockpruner.texts.calibration import TextOptions

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, .gguf file, or `demo`.")]
Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run folder: journal, plan; resumes there. runs/MODEL if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or stored: as in the checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
RemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run code that lies in the checkpoint.")]
Stream = Annotated[bool, typer.Option("--stream", help="Leave the layers' weights in their files: larger than memory.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="States in memory with --stream: 512MiB, 2GiB; rest on disk.")
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights from pickles, which can run code.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Source = "Hub data set, .txt/.jsonl/.json/.parquet file, alpaca, wikitext2 or builtin; part of one: FILE.jsonl[0:200]."
Objective = Annotated[
    str, typer.Option(help="loss, sampled-loss, kl, js, logits, embedding or accuracy; `list` says more.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that share the losses, each with the model; 0: none.")]
Cluster = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="Where workers are: host:port, or auto.")]
Protect = Annotated[str, typer.Option(help="Layers never touched: 0,1,-1; plus: the first 4 and the last 2.")]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens of text to use, or all.")]
Window = Annotated[
    int | None, typer.Option(min=2, help="Tokens per window; if left out 2048 (512 in races), or the model's context.")
]
Bos = Annotated[str, typer.Option(help="BOS once per stream, once per window, none, or auto.")]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set.")]
Column = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


@dataclass(frozen=True)
class Text:
    """How text becomes windows."""

    tokens: Tokens = "16384"
    window: Window = None
    bos: Bos = "auto"
    split: Split = None
    column: Column = None

    def options(self) -> "TextOptions":
        """As functions take them; InputError for what is not right whatever the model, so ask before that is loaded."""
        from blockpruner.texts.calibration import check_bos

        check_bos(self.bos)
        return {
            "tokens": token_count(self.tokens),
            "window": self.window,
            "bos": self.bos,
            "split": self.split,
            "column": self.column,
        }


@dataclass(frozen=True)
class Searching:
    """How a plan is looked for."""

    search: Annotated[str, typer.Option(help="Search, with options as name:key=value.")] = "greedy"
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What ranks the moves, for searches that rank; cosine if left out, or FILE.json[:NAME] of `score`."
        ),
    ] = None
    objective: Objective = "loss"
    moves: Annotated[str, typer.Option(help="block, attention, mlp, layer or stock.")] = "block"
    protect: Protect = ""
    recovery: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Score each removal with bias or linear:rank=64 in its place.")
    ] = None
    device_spec: Annotated[
        str | None, typer.Option(metavar="CARD", help="Compute speed for l4, l40s, a100, h100; else measured here.")
    ] = None


@dataclass(frozen=True)
class Loading:
    """How a model is opened."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    revision: Revision = None
    remote: RemoteCode = False
    pickle: Pickle = False

    def again(self) -> list[str]:
        """The options with which another command opens the same model; it has a dtype and a device of its own."""
        revision = ["--revision", self.revision] if self.revision else []
        return [*revision, *["--allow-remote-code"] * self.remote, *["--allow-pickle"] * self.pickle]


# The defaults of a command are those of an instance of its own; prune and recover keep to what the files hold.
TEXT, SEARCHING = Text(), Searching()
LOADING, STORED, ON_CPU = Loading(), Loading(dtype="stored"), Loading(dtype="stored", device="cpu")


def token_count(text: str) -> int | None:
    """A number of tokens, or None for all there are."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--tokens {text} is no number of tokens", fix="give a whole number above 0, or all")
    return int(text)
