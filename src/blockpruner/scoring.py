"""Criteria on one harness: the same model, moves and data for all that are compared."""

import logging
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, Unpack

from blockpruner.artifacts import run_folder
from blockpruner.blocks import Mask, Move, format_mask
from blockpruner.criteria import CRITERIA, parse_criterion
from blockpruner.data import Data, identity, read_data
from blockpruner.engine.hands import Crew
from blockpruner.engine.objective import ModelObjective
from blockpruner.engine.workers import spread
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Criterion, Lab
from blockpruner.journal import Journal
from blockpruner.objectives import OBJECTIVES, parse_objective
from blockpruner.registry import format_method
from blockpruner.scores import CriterionScores, ScoreTable
from blockpruner.searching.contract import DENSE, Objective, Progress
from blockpruner.searching.evaluations import Evaluations, Notes
from blockpruner.searching.moves import format_protected, offered, parse_protected
from blockpruner.subject import Subject
from blockpruner.texts.calibration import TextOptions

_log = logging.getLogger("blockpruner")


@dataclass(frozen=True)
class Comparison:
    """Criteria that are ready to score the same moves on the same data."""

    subject: Subject
    data: Data
    objective: ModelObjective
    criteria: tuple[Criterion, ...]
    granularity: str
    protected: frozenset[tuple[str, int]]
    moves: tuple[Move, ...]
    removed: Mask
    seed: int

    def passes(self) -> dict[str, float]:
        """About how many forward passes over all the data each criterion takes; a backward pass counts as two."""
        lab = self.lab()
        for criterion in self.criteria:
            self.subject.check_criterion(criterion)
        return {format_method(c, CRITERIA): c.cost(lab, self.moves) for c in self.criteria}

    def fitting(self) -> Self:
        """This without the criteria that are not defined for the model or the moves; a warning says why."""
        kept = []
        for criterion in self.criteria:
            try:
                self.subject.check_criterion(criterion)
                criterion.cost(self.lab(), self.moves)
                kept.append(criterion)
            except InputError as error:
                _log.warning("left out: %s: %s", format_method(criterion, CRITERIA), error.what)
        return replace(self, criteria=tuple(kept))

    def seconds(self) -> float:
        """How long one forward pass over all the data takes here, from one micro-batch that is timed."""
        return self.objective.seconds_of_pass(self.removed)

    def lab(
        self,
        journal: Journal | None = None,
        progress: Progress | None = None,
        passes: float = 0.0,
        objective: Objective | None = None,
    ) -> Lab:
        """What a criterion looks at; passes: about how many evaluations of masks it will ask for, of `objective`."""
        total = round(passes * self.objective.batches)
        return Lab(
            self.subject.model,
            self.subject.anatomy,
            self.data.examples,
            Evaluations(objective or self.objective, journal, progress, total),
            Notes(journal),
            self.removed,
            progress,
        )


def compare(
    subject: Subject,
    *,
    criteria: Sequence[str | Criterion],
    calibration: str,
    objective: str = "loss",
    moves: str = "block",
    protect: str = "",
    removed: Mask = DENSE,
    whatever_fits: bool = False,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Comparison:
    """Read the words of the command line into criteria that are ready to score; InputError for what is not right.

    criteria: by name, or objects of your own; removed: what is gone already; whatever_fits: leave out, with a warning,
    criteria that are not defined for this model or these moves.
    """
    outline = subject.anatomy.outline
    outline.check(removed, "what is removed already")
    protected = parse_protected(protect, outline)
    methods = tuple(parse_criterion(one, seed=seed) if isinstance(one, str) else one for one in criteria)
    found = offered(moves, outline, removed, protected)
    if not found:
        raise InputError(
            f"there is no {moves!r} move in this model, or every one touches a protected layer or what is gone already",
            fix="use other moves, protect fewer layers, or leave out --removed",
        )
    measure = parse_objective(objective, seed=seed)
    data = read_data(subject, calibration, measure, seed=seed, **text)
    ready = data.objective(subject, measure)
    comparison = Comparison(subject, data, ready, methods, moves, protected, found, removed, seed)
    return comparison.fitting() if whatever_fits else comparison


def score(
    comparison: Comparison, run: Path | None = None, progress: Progress | None = None, crew: Crew | None = None
) -> ScoreTable:
    """Score every move by every criterion, and leave scores.json in the run folder.

    Each criterion has a journal of its own there; killed, the same call goes on and ends in the same bytes.
    crew: workers for the criteria that ask for losses of masks; the scores are the same.
    """
    subject = comparison.subject
    comparison.passes()  # what does not fit is said before anything is spent
    with ExitStack() as held:
        sources = [subject.folder] if subject.folder else []
        folder = held.enter_context(run_folder(run, sources=sources)) if run else None
        objective = held.enter_context(spread(comparison.objective, crew))
        found = [_scored(comparison, criterion, objective, folder, progress) for criterion in comparison.criteria]
        table = ScoreTable.made(
            model=subject.identity,
            calibration=comparison.data.record.model_dump(mode="json"),
            question=comparison.data.examples.question,
            objective=format_method(comparison.objective.measure, OBJECTIVES),
            moves=comparison.granularity,
            protected=format_protected(comparison.protected),
            removed=tuple(str(block) for block in sorted(comparison.removed, key=lambda block: block.order)),
            seed=comparison.seed,
            dtype=subject.dtype,
            criteria=tuple(found),
        )
        if folder:
            table.save(folder / "scores.json")
    return table


def _scored(
    comparison: Comparison, criterion: Criterion, objective: Objective, folder: Path | None, progress: Progress | None
) -> CriterionScores:
    name = format_method(criterion, CRITERIA)
    with ExitStack() as held:
        journal = None
        if folder:
            path = folder / f"scores-{name.partition(':')[0]}-{zlib.crc32(name.encode()):08x}.jsonl"
            journal = held.enter_context(Journal.open(path, _identity(comparison, name)))
        cost = criterion.cost(comparison.lab(), comparison.moves)
        lab = comparison.lab(journal, progress, cost, objective)
        return CriterionScores.of(name, criterion.scores(lab, comparison.moves))


def _identity(comparison: Comparison, criterion: str) -> dict[str, str]:
    return {
        **identity(comparison.subject, comparison.data, comparison.objective, comparison.seed),
        "criterion": criterion,
        "moves": comparison.granularity,
        "protected": ",".join(format_protected(comparison.protected)),
        "removed": format_mask(comparison.removed),
    }
