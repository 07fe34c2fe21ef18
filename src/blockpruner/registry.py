"""Methods by name: one visible dict per shelf, one text form `name:key=value,key=value` for all of them."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from blockpruner.errors import InputError

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str], listing: str) -> str:
    """Advice: the known word that was perhaps meant, and the list of all."""
    close = difflib.get_close_matches(word, list(known), n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}{listing}: {', '.join(known) or 'none'}"


def lookup(name: str, registry: Mapping[str, T], noun: str) -> T:
    """The entry called `name`; InputError lists the right names and guesses which one was meant."""
    if name not in registry:
        raise InputError(f"{name!r} is not a known {noun}", fix=did_you_mean(name, registry, "choose one of"))
    return registry[name]


def split_methods(text: str) -> list[str]:
    """The methods of `linear:rank=64,lora:rank=8,seed=1`, each with its options.

    A part between commas begins a method unless it has a `=` before any `:`, and is an option of the one before then.
    """
    methods: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if methods and "=" in part.partition(":")[0]:
            methods[-1] += ("," if ":" in methods[-1] else ":") + part
        else:
            methods.append(part)
    return methods


def parse_method(text: str, registry: Mapping[str, type[T]], noun: str, **shared: object) -> T:
    """The method that `text` names, built with the options it gives: `random:seed=3`.

    registry: name -> frozen dataclass, whose fields (of its repr) are the options; noun: what the error calls it.
    shared: options of the whole run (a seed), for methods that have such a field and were not given it in `text`.
    InputError for an unknown name or option, an option given twice, and a value of the wrong type.
    """
    name, _, rest = (part.strip() for part in text.partition(":"))
    method = lookup(name, registry, noun)
    types = _option_types(method)
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InputError(f"{text!r}: {part!r} is not key=value", fix=f"write {name}:key=value,key=value")
        if key in given:
            raise InputError(f"{text!r} gives the option {key!r} twice", fix="give it once")
        if key not in types:
            fix = did_you_mean(key, types, f"options of {name}")
            raise InputError(f"the {noun} {name!r} has no option {key!r}", fix=fix)
        given[key] = _convert(value, types[key], f"{name}:{key}")
    return method(**{key: value for key, value in shared.items() if key in types} | given)


def format_method(method: object, registry: Mapping[str, type]) -> str:
    """The text that `parse_method` reads back as `method`, every option spelled out, defaults too.

    A method that is in no registry goes by the name of its class.
    """
    names = [name for name, known in registry.items() if known is type(method)]
    options = ",".join(f"{key}={getattr(method, key)}" for key in _option_types(type(method)))
    return (names[0] if names else type(method).__name__) + (f":{options}" if options else "")


def _option_types(method: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(method):
        return {}
    hints = get_type_hints(method)
    return {field.name: hints[field.name] for field in dataclasses.fields(method) if field.repr}


def _convert(value: str, hint: Any, where: str) -> Any:
    choices = {str(choice): choice for choice in get_args(hint)} if get_origin(hint) is Literal else {}
    if value in choices:  # pydantic takes no text for a literal number
        return choices[value]
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_strings(value)
    except ValidationError as error:
        raise InputError(f"{where}={value}: {error.errors()[0]['msg']}", fix="give a value of that kind") from error
