"""The plan: the chosen removals as data, in order, with the evidence for each. It can be written by hand.

The least there is: `{"format": "blockpruner.plan", "version": 1, "steps": [{"remove": ["attention.3"]}]}`.
A plan says nothing of when, where or how fast it was found, so the same search ends in the same bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from blockpruner.artifacts import Artifact, Estimate, Record, Work, read_json
from blockpruner.blocks import Block, Mask, Move, Outline
from blockpruner.errors import InputError
from blockpruner.foreign import read_moves
from blockpruner.registry import format_method
from blockpruner.searches import SEARCHES
from blockpruner.searching.contract import Problem, Search, SearchResult
from blockpruner.searching.moves import format_protected


def _parses(text: str, kind: type[Block] | type[Move]) -> str:
    try:
        kind.parse(text)
    except InputError as error:
        raise PydanticCustomError("blocks", "{what}", {"what": error.what}) from error
    return text


BlockText = Annotated[str, AfterValidator(lambda text: _parses(text, Block))]
MoveText = Annotated[str, AfterValidator(lambda text: _parses(text, Move))]


class ModelIdentity(Record):
    """Which model a plan is for. name: as on the hub, or the last part of a folder's path; parameters: how many."""

    name: str
    model_type: str
    parameters: int
    fingerprint: str


class Method(Record):
    """How a plan was found, in the words of the command line.

    criterion: of a search that ranks; recovery: what stood in the place of removed blocks in all losses but the dense;
    windows: of the calibration, from the first (counted from 0) up to the second, that all losses are of, the dense one
    too, where a recovery was fitted on the others; null where losses are of all windows, and in plans with a recovery
    from versions that did not write it (then the last half).
    """

    search: str
    criterion: str | None = None
    objective: str
    moves: str
    target: str
    protected: tuple[str, ...]
    seed: int
    dtype: str
    recovery: str | None = None
    windows: tuple[int, int] | None = None


class PlanStep(Record):
    """Blocks removed together. loss: with them and all steps before gone; scores: that of every move that was tried;
    ties: the moves that these were not shown to beat.

    A null says that a loss is not known, in scores that it was not a finite number.
    """

    remove: tuple[BlockText, ...] = Field(min_length=1)
    loss: Estimate | None = None
    scores: dict[MoveText, Estimate | None] = Field(default_factory=dict)
    ties: tuple[MoveText, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(map(Block.parse, self.remove))


class Plan(Artifact):
    """Removals in order. nested: whether every first part of the steps is itself a plan."""

    FORMAT: ClassVar[str] = "blockpruner.plan"
    VERSION: ClassVar[int] = 1

    model: ModelIdentity | None = None
    calibration: dict[str, str | int | float | bool | None] | None = None
    method: Method | None = None
    nested: bool = True
    dense_loss: Estimate | None = None
    steps: tuple[PlanStep, ...]
    stop_reason: str | None = None
    evaluations: int | None = None
    work: Work | None = None

    @field_validator("steps")
    @classmethod
    def _removes_nothing_twice(cls, steps: tuple[PlanStep, ...]) -> tuple[PlanStep, ...]:
        seen: dict[Block, int] = {}
        for number, step in enumerate(steps):
            for block in step.blocks:
                if block in seen:
                    message = "{block} is removed twice, by steps {first} and {second} (counted from 0)"
                    where = {"block": str(block), "first": seen[block], "second": number}
                    raise PydanticCustomError("duplicate", message, where)
                seen[block] = number
        return steps

    @classmethod
    def read(cls, path: Path, outline: Outline | None = None) -> Self:
        """The plan in `path`: ours, or a removal list of BlockPruner or LLM-Drop (see `foreign`).

        outline: of the model, needed for lists that name what is kept. InputError names the file and the field.
        """
        value = read_json(path)
        if isinstance(value, dict) and "format" in value:
            return cls.from_value(value, str(path))
        return cls.of(*read_moves(value, str(path), outline))

    @classmethod
    def of(cls, *moves: Move) -> Self:
        """A plan of `moves` in this order, without evidence."""
        return cls.from_value(
            {"format": cls.FORMAT, "version": cls.VERSION, "steps": [{"remove": _texts(move)} for move in moves]},
            "this plan",
        )

    @classmethod
    def from_search(
        cls,
        result: SearchResult,
        *,
        search: Search,
        criterion: str | None = None,
        problem: Problem,
        objective: str,
        recovery: str | None = None,
        windows: tuple[int, int] | None = None,
        seed: int,
        dtype: str,
        model: ModelIdentity | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> Self:
        """The plan of what `search` found for `problem`, with all its evidence."""
        method = Method(
            search=format_method(search, SEARCHES),
            criterion=criterion,
            objective=objective,
            moves=problem.granularity,
            target=str(problem.target),
            protected=format_protected(problem.protected),
            seed=seed,
            dtype=dtype,
            recovery=recovery,
            windows=windows,
        )
        steps = tuple(
            PlanStep(
                remove=_texts(step.move),
                loss=step.loss,
                scores={str(move): score for move, score in step.scores.items()},
                ties=tuple(map(str, step.ties)),
            )
            for step in result.steps
        )
        return cls(
            format=cls.FORMAT,
            version=cls.VERSION,
            model=model,
            calibration=None if calibration is None else dict(calibration),
            method=method,
            nested=search.nested,
            dense_loss=result.dense,
            steps=steps,
            stop_reason=result.stop_reason.value,
            evaluations=result.evaluations,
            work=result.work,
        )

    def mask(self, first: int | None = None) -> Mask:
        """The blocks that go, by all steps or by the `first` ones; InputError if there are not so many."""
        count = len(self.steps) if first is None else first
        if first is not None and not 1 <= first <= len(self.steps):
            raise InputError(
                f"the first {first} steps were asked for, and the plan has {len(self.steps)}",
                fix=f"ask for 1 to {len(self.steps)}, or for all by leaving out --first",
            )
        if count < len(self.steps) and not self.nested:
            raise InputError(
                f"the first {count} of {len(self.steps)} steps are no plan: its search chose the steps only together",
                fix="use the whole plan, or search again with a smaller target",
            )
        return frozenset(block for step in self.steps[:count] for block in step.blocks)

    def cut(self, first: int) -> Self:
        """The plan of the first `first` steps; what was said of the whole search is left out."""
        self.mask(first)
        whole = {"stop_reason": None, "evaluations": None, "work": None}
        return self.model_copy(update={"steps": self.steps[:first], **whole})

    def check(self, outline: Outline, model: ModelIdentity | None, source: str) -> None:
        """InputError, naming `source`, if the plan is for another model, or names blocks that this one lacks."""
        if self.model is not None and model is not None and self.model.fingerprint != model.fingerprint:
            raise InputError(
                f"{source} was made for {_describe(self.model)}, and this is {_describe(model)}",
                fix='search again for this model, or remove the entry "model" to apply the block names as they are',
            )
        outline.check(self.mask(), source)


def _texts(move: Move) -> tuple[str, ...]:
    return tuple(str(block) for block in sorted(move.blocks, key=lambda block: block.order))


def _describe(model: ModelIdentity) -> str:
    return f"{model.name} ({model.model_type}, {model.parameters:,} parameters, fingerprint {model.fingerprint[:12]})"
