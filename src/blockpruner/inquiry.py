"""What is asked of a plan that is to be explained: masks, criteria, text, and what a run folder has already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack

from blockpruner.artifacts import Work
from blockpruner.blocks import Mask, Move
from blockpruner.criteria import CRITERIA, parse_criterion
from blockpruner.data import Data, read_data
from blockpruner.engine.limits import usual_window
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import InputError
from blockpruner.evaluation.interactions import Seen
from blockpruner.evidence import known_scores, seen_losses
from blockpruner.importance.criterion import Criterion, Lab
from blockpruner.journal import Journal
from blockpruner.objectives.embedding import Embedding
from blockpruner.objectives.loss import Loss
from blockpruner.plan import Plan
from blockpruner.registry import format_method
from blockpruner.scores import CriterionScores
from blockpruner.searching.contract import DENSE, Progress
from blockpruner.searching.evaluations import Evaluations, Notes
from blockpruner.searching.moves import offered, parse_protected
from blockpruner.subject import Subject
from blockpruner.texts.calibration import TextOptions
from blockpruner.texts.examples import question

CHEAP = ("cosine", "relative-magnitude", "update-norm", "magnitude")
TOKENS, WINDOW = 4096, 512
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Inquiry:
    """An explanation that is ready to be made.

    criteria: to be computed; known: scores that are there already; seen: the losses of the search; notes: see
    `Explanation`.
    """

    subject: Subject
    plan: Plan
    data: Data
    objective: ModelObjective
    criteria: tuple[Criterion, ...]
    known: tuple[CriterionScores, ...]
    seen: Seen | None
    seed: int
    notes: Mapping[str, str]

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        return tuple(Move.of(*step.blocks) for step in self.plan.steps)

    @cached_property
    def given(self) -> tuple[Mask, ...]:
        """What was gone before each step; in a plan that is not nested, all else that goes."""
        if not self.plan.nested:
            return tuple(self.plan.mask() - move.blocks for move in self.moves)
        before = [DENSE]
        for move in self.moves[:-1]:
            before.append(before[-1] | move.blocks)
        return tuple(before)

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """Those whose losses are wanted, token by token; none where no tokens are predicted."""
        if self.data.examples.question == "states":
            return ()
        after = (given | move.blocks for given, move in zip(self.given, self.moves, strict=True))
        return tuple(dict.fromkeys([DENSE, *self.given, *after]))

    @cached_property
    def rivals(self) -> tuple[Move, ...]:
        """The moves that each removal is ranked among: those the search had, else the first kind that has them all."""
        outline, method = self.subject.anatomy.outline, self.plan.method
        protected = parse_protected(",".join(method.protected), outline) if method else frozenset[tuple[str, int]]()
        kinds = (method.moves,) if method else ("block", "layer", "stock")
        found = [offered(kind, outline, DENSE, protected) for kind in kinds]
        return next((moves for moves in found if set(self.moves) <= set(moves)), found[0])

    def lab(self, journal: Journal | None = None, progress: Progress | None = None, mask: Mask = DENSE) -> Lab:
        total = len(self.masks) * self.objective.batches
        losses = Evaluations(self.objective, journal, progress, total)
        subject = self.subject
        return Lab(subject.model, subject.anatomy, self.data.examples, losses, Notes(journal), mask, progress)

    def price(self) -> tuple[int, float, float]:
        """Masks; passes over the text besides, of the layers alone; seconds, from one micro-batch that is timed."""
        passes = sum(criterion.cost(self.lab(), self.rivals) for criterion in self.criteria) + len(self.moves)
        batches = range(self.objective.batches)
        work = sum((self.objective.work(self.masks, batch) for batch in batches), Work())
        body = sum((self.objective.work([DENSE], batch) for batch in batches), Work())
        body = body.model_copy(update={"head_tokens": 0})
        return len(self.masks), passes, self.objective.seconds(work) + passes * self.objective.seconds(body)


def inquire(
    subject: Subject,
    plan: Plan,
    *,
    calibration: str = "builtin",
    criteria: Sequence[str] = CHEAP,
    folder: Path | None = None,
    seed: int = 0,
    **text: Unpack[TextOptions],
) -> Inquiry:
    """Make ready to explain `plan`; InputError for what is not right, also a plan of another model.

    folder: of the run that found the plan: its scores.json and journal.jsonl are used where they fit; calibration,
    text: what all else is found on; TOKENS in windows of WINDOW where left out.
    """
    plan.check(subject.anatomy.outline, subject.identity, "the plan")
    if not plan.steps:
        raise InputError("the plan removes nothing, so there is nothing to explain", fix="give a plan with steps")
    methods = tuple(parse_criterion(name, seed=seed) for name in criteria)
    measure = Embedding() if question(subject.model) == "states" else Loss()
    text = {"tokens": TOKENS, **text, "window": text.get("window") or min(WINDOW, usual_window(subject.model))}
    return inquiry_on(subject, plan, read_data(subject, calibration, measure, seed=seed, **text), methods, folder, seed)


def inquiry_on(
    subject: Subject, plan: Plan, data: Data, criteria: Sequence[Criterion], folder: Path | None = None, seed: int = 0
) -> Inquiry:
    """The same for data that are read already."""
    predicts, notes = data.examples.question != "states", dict[str, str]()
    if not predicts:
        notes["classes"] = f"{type(subject.model).__name__} predicts no tokens"
    if plan.method and plan.method.recovery:
        notes["recovery"] = f"the search judged with {plan.method.recovery}; losses by class are without it"
    ready = data.objective(subject, Loss() if predicts else Embedding(), batch_tokens=BATCH_TOKENS, segment=1)
    inquiry = Inquiry(subject, plan, data, ready, (), (), None, seed, notes)
    known = known_scores(folder, subject.identity, inquiry.rivals, notes)
    seen = seen_losses(folder, subject.identity, notes)
    done = {scores.criterion for scores in known}
    left = [criterion for criterion in criteria if format_method(criterion, CRITERIA) not in done]
    return replace(inquiry, criteria=_fitting(inquiry, left, notes), known=known, seen=seen)


def _fitting(inquiry: Inquiry, criteria: Sequence[Criterion], notes: dict[str, str]) -> tuple[Criterion, ...]:
    """Those that are defined for this model and these moves; why the others are not goes into `notes`."""
    fit = []
    for criterion in criteria:
        try:
            inquiry.subject.check_criterion(criterion)
            criterion.cost(inquiry.lab(), inquiry.rivals)
            fit.append(criterion)
        except InputError as error:
            notes[format_method(criterion, CRITERIA)] = error.what
    return tuple(fit)
