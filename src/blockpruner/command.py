"""What every command is made of: the app, how a verb is registered, and what several verbs do alike."""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from blockpruner.console import duration, say
from blockpruner.errors import InputError
from blockpruner.exits import errors_said

if TYPE_CHECKING:
    from blockpruner.planning import Price, Task
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


def opened(model: str, dtype: str, device: str, revision: str | None, remote: bool, pickle: bool) -> "Subject":
    from blockpruner.models import load
    from blockpruner.subject import open_subject

    say(f"loading {model}")
    return open_subject(
        load(model, dtype=dtype, device=device, revision=revision, allow_remote_code=remote, allow_pickle=pickle)
    )


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
