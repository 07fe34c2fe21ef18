"""A recipe: a published procedure, or one of your own, as a TOML file that can be run on any model."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from blockpruner.artifacts import Artifact, Record
from blockpruner.errors import InputError
from blockpruner.registry import did_you_mean

SHELF = resources.files("blockpruner") / "recipes"


class Text(Record):
    """Which text, in the words of the command line; see `calibration.TextOptions`. tokens: 0 for all there is."""

    source: str
    tokens: int = Field(default=16384, ge=0)
    window: int | None = None
    bos: str = "auto"
    split: str | None = None
    column: str | None = None

    def options(self) -> dict[str, Any]:
        """What `read_data` takes beside the source."""
        return {**self.model_dump(exclude={"source"}), "tokens": self.tokens or None}


class Recipe(Artifact):
    """A procedure from a model to a plan.

    title, paper: what it repeats; differences: every deliberate one from the paper; search, criterion, objective,
    moves, protect, target: in the words of the command line, the paper's; recovery: the closed-form one that the search
    counts on, and that is fitted again to what it found; calibration: its data; evaluation: what the result is measured
    on.
    """

    FORMAT: ClassVar[str] = "blockpruner.recipe"
    VERSION: ClassVar[int] = 1

    title: str
    paper: str
    differences: tuple[str, ...] = ()
    search: str = "exhaustive"
    criterion: str | None = None
    objective: str = "loss"
    moves: str = "block"
    protect: str = ""
    target: str
    recovery: str | None = None
    seed: int = 0
    calibration: Text
    evaluation: Text = Text(source="wikitext2", split="test")

    @classmethod
    def read(cls, name: str) -> Self:
        """The recipe of this name that comes with the package, or in this TOML file; InputError says what is wrong."""
        path = Path(name)
        if name in names():
            text, source = (SHELF / f"{name}.toml").read_text(encoding="utf-8"), f"recipe {name}"
        elif path.suffix == ".toml" and path.is_file():
            text, source = path.read_text(encoding="utf-8"), str(path)
        else:
            fix = did_you_mean(name, names(), "give a .toml file, or choose one of")
            raise InputError(f"{name!r} is no recipe, and no .toml file", fix=fix)
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source} is not TOML: {error}", fix="mend the file at that place") from error
        return cls.from_value({"format": cls.FORMAT, "version": cls.VERSION, **value}, source)

    def changed(self, calibration: str | None = None, evaluation: str | None = None, **fields: Any) -> Self:
        """The recipe with other settings; a source of text replaces the recipe's own, its split and column too.

        fields: of the recipe, tokens and window of its calibration, and data_tokens and data_window of its evaluation;
        None leaves as it is.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        texts = {}
        for name, source, prefix in (("calibration", calibration, ""), ("evaluation", evaluation, "data_")):
            text: Text = getattr(self, name)
            elsewhere = {"source": source, "split": None, "column": None} if source else {}
            size = {key: given.pop(prefix + key) for key in ("tokens", "window") if prefix + key in given}
            texts[name] = text.model_copy(update={**elsewhere, **size})
        return type(self).model_validate(self.model_copy(update={**given, **texts}).model_dump())


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHELF.iterdir() if entry.name.endswith(".toml"))
