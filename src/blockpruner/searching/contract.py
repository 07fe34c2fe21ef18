"""What a search sees and what it promises.

A search decides which masks to try; it knows moves and numbers, no tensors. It is deterministic. Everything else is
the business of the `driver`: evaluating, remembering, the journal, counting, progress and the reason to stop.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Protocol

from blockpruner.artifacts import Estimate, Work
from blockpruner.blocks import Mask, Move, Outline
from blockpruner.errors import CheckFailedError
from blockpruner.registry import lookup
from blockpruner.searching.leading import Bound
from blockpruner.searching.moves import GRANULARITIES, Target, offered
from blockpruner.searching.targets import Goals

DENSE: Mask = frozenset()

Progress = Callable[[int, int, str], None]
Values = tuple[float, ...]
Found = tuple[int, Mask, Values]  # micro-batch, mask, its values there: `pieces` for each window, window by window


class Objective(Protocol):
    """What a search minimises: mask -> loss, lower = better, as a mean over fixed windows that come in micro-batches.

    The losses of one mask on one micro-batch must be the same bits whatever else is asked for, before or at once.
    """

    @property
    def pieces(self) -> int:
        """How many values there are for each window, whose mean is its loss; more than 1 for searches that race."""
        ...

    @property
    def batches(self) -> int:
        """Number of micro-batches of windows."""
        ...

    @property
    def unit(self) -> str:
        """Of a loss, as in `nats per token`."""
        ...

    def losses(self, asked: Mapping[int, Sequence[Mask]]) -> Iterable[Found]:
        """The losses of masks on the windows of micro-batches, by number, in any order, as they become known.

        asked: per micro-batch the masks, each once. A loss may be NaN.
        """
        ...

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        """The counted work of evaluating `masks` on one micro-batch in one sweep."""
        ...


class BatchByBatch:
    """What objectives have in common that take one micro-batch after the other, all pieces whole; they say the rest."""

    pieces: int = 1

    def batch_losses(self, masks: Sequence[Mask], batch: int) -> Iterable[Values]:
        """Per mask, in order and as they become known, its values on one micro-batch."""
        raise NotImplementedError

    def losses(self, asked: Mapping[int, Sequence[Mask]]) -> Iterator[Found]:
        for batch, masks in asked.items():
            for mask, values in zip(masks, self.batch_losses(masks, batch), strict=True):
                yield batch, mask, values


@dataclass(frozen=True)
class Problem:
    """What a search sees of its task: which moves there are, and when enough is removed.

    protected: (stack, layer) of layers that no move may touch; sizes, unit: how many values the objective gives for
    each of its micro-batches, and of what; start: the moves of an earlier plan, for searches that improve one.
    InputError if the target cannot be reached, or is before anything is removed.
    """

    outline: Outline
    granularity: str
    target: Target | Goals
    protected: frozenset[tuple[str, int]] = frozenset()
    sizes: tuple[int, ...] = (1,)
    unit: str = ""
    start: tuple[Move, ...] = ()

    def __post_init__(self) -> None:
        self.target.check(self.outline, self.granularity, self.offered(DENSE))

    @property
    def batches(self) -> int:
        """Number of micro-batches of the objective."""
        return len(self.sizes)

    def moves(self, mask: Mask) -> tuple[Move, ...]:
        """The moves on offer on top of `mask`, in tie order; none after which the target cannot be met any more."""
        return self.target.leading(self.outline, mask, self.offered(mask), self._bounds)

    @cached_property
    def _bounds(self) -> Sequence[Bound]:
        return self.target.bounds(self.outline)

    def offered(self, mask: Mask) -> tuple[Move, ...]:
        """The moves on top of `mask`, in tie order, whatever the target is."""
        lookup(self.granularity, GRANULARITIES, "kind of move")
        return offered(self.granularity, self.outline, mask, self.protected)

    def reached(self, mask: Mask, steps: int) -> bool:
        """Whether `mask`, made by `steps` moves, removes enough; where the loss alone is the end, whether all went."""
        enough = self.target.reached(self.outline, mask, steps)
        return enough or (self.target.endless and not self.moves(mask))

    def most_steps(self) -> int:
        """The number of moves to the target; an upper bound where the target counts parameters."""
        return self.target.most_steps(self.outline, self.moves(DENSE))


Scores = Mapping[Move, Estimate | None]


@dataclass(frozen=True)
class Chosen:
    """A decision: the move taken, and what every move that stood against it would have led to.

    scores: the loss after each move, lower = better, or, where a criterion decided, its score, lower = goes first;
    None where it was not a finite number; ties: the moves that were not shown to be worse; loss: with the move gone, as
    far as the search knows it, which serves where it was not evaluated on everything.
    """

    move: Move
    scores: Scores
    ties: tuple[Move, ...] = ()
    loss: Estimate | None = None


@dataclass(frozen=True)
class Best:
    """The best whole set of decisions so far, of which the last reaches the target; it takes the place of any before.

    So that a search which decides only at its end leaves a plan wherever it is stopped.
    """

    decisions: tuple[Chosen, ...]


@dataclass(frozen=True)
class Partly:
    """Masks to be evaluated on some micro-batches alone, by their numbers: for looks that need not be exact."""

    masks: tuple[Mask, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """Like `Partly`, but answered with the values themselves, in the order of `batches`, to be compared one by one."""

    masks: tuple[Mask, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Ranked:
    """Moves to be scored on top of `mask` by the criterion of the run; the answer has higher = keep."""

    mask: Mask
    moves: tuple[Move, ...]


Losses = Mapping[Mask, Estimate | None]
Request = tuple[Mask, ...] | Partly | Pieces | Ranked | Chosen | Best
Proposals = Generator[Request, Any, None]
Scorer = Callable[[Mask, Sequence[Move]], Scores]


class Search(Protocol):
    """How masks are tried: a frozen dataclass, its fields the options of the method, one file in `searches/`.

    title, source: its name and paper; nested: whether every first part of its steps is itself a plan; ranks: whether
    it asks for the scores of a criterion; starts: whether it goes on from the moves of an earlier plan.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    nested: ClassVar[bool]
    ranks: ClassVar[bool]
    starts: ClassVar[bool]

    def propose(self, problem: Problem) -> Proposals:
        """Yield masks, or `Partly`, to be sent their losses; yield `Ranked` to be sent scores (None: not finite).

        Yield `Pieces` to be sent, by mask, the values on some micro-batches, NaN and all.

        Where it is nested: yield `Chosen` for each decision, in order. Where not: yield `Best` whenever there is a
        better one, and at the end, once its mask is evaluated on everything. Both are sent None, and are the plan.
        Deterministic: randomness comes from a seed and the number of the step, never from a generator kept between.
        """
        ...

    def evaluations(self, problem: Problem) -> int:
        """How many masks it will ask for; exact, or else an upper bound, which its docstring says."""
        ...


class Stop(StrEnum):
    """Why a search ended."""

    TARGET = "the target is reached"
    NO_MOVES = "no move is left"
    LOSS = "one more step would raise the loss by more than the target allows"
    BUDGET = "the budget of evaluations is used up; the steps are the best found within it"
    INTERRUPTED = "interrupted; the steps are the best found so far"


@dataclass(frozen=True)
class Step:
    """One removal: the move, the loss with it and all before it gone (None: not known, or not finite), see `Chosen`."""

    move: Move
    loss: Estimate | None
    scores: Scores
    ties: tuple[Move, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """What a search found, with its evidence.

    dense: the loss with nothing removed; evaluations: distinct masks evaluated, the dense one included; looks: the same
    times the micro-batches that each was evaluated on; work: of those evaluations. All include what a journal answered,
    so that a resumed run says the same.
    """

    steps: tuple[Step, ...]
    dense: Estimate
    stop_reason: Stop
    evaluations: int
    looks: int
    work: Work


def lowest(scores: Scores) -> Move:
    """The move of strictly lowest loss, the first of equals; CheckFailedError if no loss is finite."""
    finite = {move: score.value for move, score in scores.items() if score is not None}
    if not finite:
        names = ", ".join(str(move) for move in list(scores)[:3])
        raise CheckFailedError(
            f"none of the {len(scores)} candidates ({names}, ...) has a finite loss",
            fix="search in float32 (--dtype float32), or stop at an earlier target",
        )
    return min(finite, key=finite.__getitem__)
