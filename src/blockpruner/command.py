"""What every command is made of: the app, how a verb is registered, and what several verbs do alike."""

import functools
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from blockpruner.console import duration, say
from blockpruner.errors import InputError
from blockpruner.exits import errors_said

if TYPE_CHECKING:
    from blockpruner.hands import Crew
    from blockpruner.planning import Price, Task
    from blockpruner.subject import Subject

P = ParamSpec("P")
DEFAULT_MEMORY = "1GiB"  # of states, for --stream without --memory

app = typer.Typer(
    name="blockpruner",
    help="Find the attention and MLP blocks a Transformer does not need, remove them, and save a model that loads.",
    epilog="Start with: blockpruner demo",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def say_price(price: "Price", task: "Task") -> None:
    data, ranked = task.data.record, f"; {price.passes:.3g} passes to rank" if price.passes else ""
    say(
        f"price: {price.evaluations} evaluations of {data.windows} windows x {data.window} tokens; about "
        f"{price.work.attention_tokens:,} attention-, {price.work.mlp_tokens:,} mlp- and "
        f"{price.work.head_tokens:,} head-tokens{ranked}; {duration(price.seconds)} on this machine"
    )


def token_count(text: str) -> int | None:
    """A number of tokens, or None for all there are."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--tokens {text} is no number of tokens", fix="give a whole number above 0, or all")
    return int(text)


def stream_memory(stream: bool, memory: str | None, workers: int = 0) -> int | None:
    """How many bytes of states a streamed run holds in memory; None where nothing is streamed."""
    if stream and workers:
        raise InputError("workers hold the model in memory, so they do not stream it", fix="leave out one of the two")
    if not stream:
        if memory is not None:
            raise InputError("--memory is for runs with --stream", fix="add --stream, or leave out --memory")
        return None
    found = re.fullmatch(r"(\d+)([KMGT]i?B)", memory or DEFAULT_MEMORY)
    if found is None:
        raise InputError(f"--memory {memory} is no size", fix="give one as in 512MiB or 2GB")
    return int(found[1]) * (1024 if "i" in found[2] else 1000) ** ("KMGT".index(found[2][0]) + 1)


def opened(
    model: str, dtype: str, device: str, revision: str | None, remote: bool, pickle: bool, memory: int | None = None
) -> "Subject":
    """The model, proved; with `memory`, in bytes, one that is streamed."""
    from blockpruner.models import load
    from blockpruner.streaming import load_streamed
    from blockpruner.subject import open_subject

    say(f"loading {model}")
    if memory is not None:
        if pickle:
            raise InputError("--stream reads safetensors, no pickles", fix="leave out --allow-pickle, or --stream")
        loaded = load_streamed(model, dtype=dtype, device=device, revision=revision, allow_remote_code=remote)
        return open_subject(loaded, memory)
    return open_subject(
        load(model, dtype=dtype, device=device, revision=revision, allow_remote_code=remote, allow_pickle=pickle)
    )


def crew_of(
    workers: int, address: str | None, model: str, dtype: str, revision: str | None, remote: bool, pickle: bool
) -> "Crew | None":
    """The workers that were asked for; None for none."""
    if not workers:
        if address:
            raise InputError("--ray says where workers are, and there are none", fix="add --workers 8")
        return None
    from blockpruner.hands import Crew

    return Crew(workers, model, address, dtype, revision, remote, pickle)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
