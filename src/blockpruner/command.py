"""What every command is made of: the app, how a verb is registered, and what several verbs do alike."""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpruner.console import duration, say
from blockpruner.errors import InputError, MachineError
from blockpruner.exits import errors_said
from blockpruner.options import Loading

if TYPE_CHECKING:
    from blockpruner.engine.hands import Crew
    from blockpruner.planning import Task
    from blockpruner.price import Price, Receipt
    from blockpruner.subject import Subject

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


def verb(example: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A subcommand whose help ends with an example, and whose every way to fail is a message and an exit code.

    A parameter whose default is a dataclass (a group of `options`) stands for an option per field.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, Any] = {
            p.name: p.default for p in inspect.signature(function).parameters.values() if is_dataclass(p.default)
        }

        @functools.wraps(function)
        def command(**given: Any) -> None:
            with errors_said():
                for parameter, group in groups.items():
                    given[parameter] = replace(group, **{field.name: given.pop(field.name) for field in fields(group)})
                function(**given)

        signature = inspect.signature(function)
        parts = [part for parameter in signature.parameters.values() for part in _parts(parameter)]
        command.__dict__["__signature__"] = signature.replace(parameters=parts)
        command.__annotations__ = {part.name: part.annotation for part in parts}
        return app.command(name, epilog=f"Example: {example}")(command)

    return register


def _parts(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """The options that a parameter of a command stands for; all by name, so that their order is free."""
    group = parameter.default
    if not is_dataclass(group):
        return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(group, field.name), annotation=field.type
        )
        for field in fields(group)
    ]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from blockpruner import __version__

        print(__version__)
        raise typer.Exit


def say_price(price: "Price", task: "Task") -> None:
    target, most = task.problem.target, "at most " if task.cut_short else ""
    beside = "to fit replacements" if task.replacing and not task.search.ranks else "to rank"
    data, ranked = task.data.record, f"; {price.passes:.3g} passes {beside}" if price.passes else ""
    say(
        f"price: {most}{price.evaluations} evaluations of {data.windows} windows x {data.window} tokens; about "
        f"{price.work.attention_tokens:,} attention-, {price.work.mlp_tokens:,} mlp- and "
        f"{price.work.head_tokens:,} head-tokens{ranked}; {_bytes_of(price)}{duration(price.seconds)} on this machine"
    )
    if target.sources:
        say(f"target: {target} (costs: {target.sources})")


def priced(task: "Task", as_json: bool) -> "Price":
    """The price of a search, said; as_json: on standard output too."""
    from blockpruner.price import quote

    if task.replacing:
        say(f"recovery inside the search: {task.replacing.identity}")
    price = quote(task)
    say_price(price, task)
    if as_json:
        print_json(price.model_dump(mode="json"))
    return price


def say_spent(receipt: "Receipt") -> None:
    """What a search took, beside its price."""
    said, spent = receipt.said, receipt.spent
    kinds = {name.replace("_tokens", "-"): value for name, value in spent.work.model_dump().items()}
    shares = [
        f"{value / before:.2f} of the {kind}tokens"
        for (kind, value), before in zip(kinds.items(), said.work.model_dump().values(), strict=True)
        if before
    ]
    rest = " since it was killed" if receipt.resumed else ""
    say(f"spent: {', '.join(shares)} that were said; {_bytes_of(spent)}{duration(spent.seconds)}{rest}")


def _bytes_of(price: "Price") -> str:
    """What is read, spilled and held, as far as it is anything, and known."""
    from blockpruner.searching.costs import readable_bytes

    sizes = {"read": price.traffic.read, "spilled": price.traffic.spilled, "of memory": price.memory}
    return "".join(f"{readable_bytes(size)} {what}; " for what, size in sizes.items() if size)


def stream_memory(stream: bool, memory: str | None, workers: int = 0) -> int | None:
    """How many bytes of states a streamed run holds in memory; None where nothing is streamed."""
    if stream and workers:
        raise InputError("workers hold the model in memory, so they do not stream it", fix="leave out one of the two")
    if not stream:
        if memory is not None:
            raise InputError("--memory is for runs with --stream", fix="add --stream, or leave out --memory")
        return None
    from blockpruner.searching.costs import parse_bytes

    return parse_bytes(memory or DEFAULT_MEMORY)


def opened(model: str, how: Loading, memory: int | None = None) -> "Subject":
    """The model, proved; with `memory`, in bytes, one that is streamed."""
    from blockpruner.loading.models import load
    from blockpruner.loading.streaming import load_streamed
    from blockpruner.subject import open_subject

    say(f"loading {model}")
    common: Any = {"dtype": how.dtype, "device": how.device, "revision": how.revision}
    if memory is None:
        return open_subject(load(model, **common, allow_remote_code=how.remote, allow_pickle=how.pickle))
    if how.pickle:
        raise InputError("--stream reads safetensors, no pickles", fix="leave out --allow-pickle, or --stream")
    return open_subject(load_streamed(model, **common, allow_remote_code=how.remote), memory)


def opened_for(file: Path, model: str | None, how: Loading, option: str = "--model") -> "Subject":
    """The model of that name, proved; else the one that the plan in `file` is for, of a folder its last part."""
    from blockpruner.plan import Plan

    if model is not None:
        return opened(model, how)
    named = Plan.read(file).model
    if named is None:
        raise InputError(f"{file} does not say which model it is for", fix=f"name the whole model with {option}")
    try:
        return opened(named.name, how)
    except (InputError, MachineError) as error:
        fix = f"{error.fix}; the whole model can be named with {option}"
        raise type(error)(f"{file} is for {named.name!r}: {error.what}", fix=fix) from error


def crew_of(workers: int, address: str | None, model: str, how: Loading) -> "Crew | None":
    """The workers that were asked for; None for none."""
    if not workers:
        if address:
            raise InputError("--ray says where workers are, and there are none", fix="add --workers 8")
        return None
    from blockpruner.engine.hands import Crew

    return Crew(workers, model, address, how.dtype, how.revision, how.remote, how.pickle)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
