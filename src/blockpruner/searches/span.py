"""One run of layers that follow each other."""

from dataclasses import dataclass
from typing import ClassVar

from blockpruner.blocks import Move
from blockpruner.errors import InputError
from blockpruner.searching.contract import DENSE, Best, Chosen, Problem, Proposals, Ranked, Scores, lowest
from blockpruner.searching.moves import offered


@dataclass(frozen=True)
class Span:
    """Remove the n layers that follow each other in one stack and together score least by the criterion of the run.

    n is that of the target `layers=n` or `blocks=N`; for others the smallest n for which some span reaches the target.
    The first of equals. All layers of a span are whole, none is protected; a model with several stacks loses layers of
    one of them only.

    With `angular:tokens=last` it is the method of Gromov et al.; unlike in PruneMe's code the first layer may begin a
    span. With `cosine` it is the consecutive drop of LLM-Drop, whose code scores spans of n + 1 layers and drops n.

    The plan has one step per layer, by depth; the scores of all spans are with the first, the loss with the last.

    Cost: that of the criterion for at most as many spans as there are layers, and one evaluation.
    """

    title: ClassVar[str] = "Contiguous span of layers"
    source: ClassVar[str] = "Gromov et al. 2024, arXiv 2403.17887"
    nested: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    starts: ClassVar[bool] = False

    def propose(self, problem: Problem) -> Proposals:
        scores: Scores = yield Ranked(DENSE, _spans(problem))
        best = lowest(scores).blocks
        layers = [Move.of(*blocks) for blocks in problem.outline.layers().values() if best.issuperset(blocks)]
        decided = Best(tuple(Chosen(move, {} if place else scores) for place, move in enumerate(layers)))
        yield decided
        losses = yield (best,)
        lowest({Move(best): losses[best]})  # fails if it is not finite
        yield decided  # now with its loss

    def evaluations(self, problem: Problem) -> int:
        """Exact; those of the criterion are extra. InputError if no span reaches the target."""
        _spans(problem)
        return 1


def _spans(problem: Problem) -> tuple[Move, ...]:
    """All spans of the smallest length that reach the target, in tie order."""
    if problem.granularity not in ("block", "layer", "stock"):
        raise InputError(
            f"a span is made of whole layers, and the moves are {problem.granularity!r}", fix="use --moves layer"
        )
    length, inexact = 1, 0
    while spans := offered(f"span={length}", problem.outline, DENSE, problem.protected):
        if enough := tuple(span for span in spans if problem.reached(span.blocks, length)):
            if exact := tuple(s for s in enough if not problem.target.exceeded(problem.outline, s.blocks, length)):
                return exact
            inexact = inexact or length
        length += 1
    if inexact:
        raise InputError(
            f"{problem.target} cannot be met exactly by a span: one of {inexact} whole layers is too long",
            fix="ask for another number, or use another search",
        )
    raise InputError(
        f"no span reaches {problem.target}: at most {length - 1} layers that may go follow each other in one stack",
        fix="ask for less, protect fewer layers, or use another search",
    )
