"""Why each block went, as data: scores, losses by class of token, what it did to the stream, and its partners."""

from typing import Any, ClassVar, Self

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.plan import BlockText, ModelIdentity, MoveText


class Choice(Record):
    """What the search said of a removal. All in its unit; None where it recorded nothing.

    rise: of the loss by this step; tried: how many moves stood for choice; next_best, behind: the second best, and by
    how much; ties: moves that it was not shown to beat; alone, of: its place, 1 = goes first, among the moves at the
    first step, when nothing was gone.
    """

    rise: float | None = None
    tried: int = 0
    next_best: MoveText | None = None
    behind: float | None = None
    ties: tuple[MoveText, ...] = ()
    alone: int | None = None
    of: int = 0


class CheapScore(Record):
    """What one criterion says of a move of the whole model. place: 1 = would go first; None: not among the others."""

    criterion: str
    score: Estimate | None
    place: int | None
    of: int


class ClassEffect(Record):
    """Losses of one class of tokens. by, name: the class; tokens: how many; share: of all that are predicted.

    before: the mean loss before the removal; change: by it, paired token by token, > 0 = worse. Both in nats per token;
    standard errors over windows, n windows that have such tokens. None where a loss is not finite.
    """

    by: str
    name: str
    tokens: int
    share: float
    before: Estimate | None
    change: Estimate | None


class StreamAccount(Record):
    """What a move does to the residual stream x when it adds u; over all positions but the first of each window.

    length: mean |u| / |x|; cosine: mean cos(u, x), > 0 along the stream, < 0 against it, 0 across; constant_share,
    linear_share: of mean |u|^2 on held-out windows, what the best constant, and the best linear map of x at root mean
    square one, make of it: 1 = all, <= 0 = nothing; tokens: that these were fitted and judged on; reason: why there is
    none of something.
    """

    length: Estimate | None = None
    cosine: Estimate | None = None
    constant_share: float | None = None
    linear_share: float | None = None
    tokens: tuple[int, int] = (0, 0)
    reason: str | None = None


class Interaction(Record):
    """I = L(given, a, b) - L(given, a) - L(given, b) + L(given), L the loss of the search without these blocks.

    I > 0: the two stand in for each other, each is needed more once the other is gone (redundant partners); I < 0: they
    work together, each is worth less once the other is gone. value: over the windows that all four were evaluated on;
    rise: what removing the partner costs there while this move is in place, so that it costs rise + value without it.
    A partner whose rise is large breaks the model, and what happens on top of that says little.
    """

    partner: MoveText
    given: tuple[BlockText, ...]
    rise: float
    value: Estimate


class StepExplanation(Record):
    """One removal. given: what was gone before it, or, in plans that are not nested, what else goes."""

    remove: tuple[BlockText, ...]
    given: tuple[BlockText, ...]
    choice: Choice
    scores: tuple[CheapScore, ...]
    classes: tuple[ClassEffect, ...]
    stream: StreamAccount
    partners: tuple[Interaction, ...]


class Explanation(Artifact):
    """A plan explained. whole: the whole plan against the dense model; definitions: of the classes, in words.

    calibration, question: what all but the choices and the partners were found on; notes: what is not here and why, and
    what is from elsewhere.
    """

    FORMAT: ClassVar[str] = "blockpruner.explanation"
    VERSION: ClassVar[int] = 1

    model: ModelIdentity
    calibration: dict[str, str | int | float | bool | None]
    question: str
    dtype: str
    seed: int
    definitions: dict[str, str]
    steps: tuple[StepExplanation, ...]
    whole: tuple[ClassEffect, ...]
    notes: dict[str, str]

    @classmethod
    def made(cls, **fields: Any) -> Self:
        return cls(format=cls.FORMAT, version=cls.VERSION, **fields)
