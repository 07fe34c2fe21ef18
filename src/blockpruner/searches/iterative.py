"""Rank, remove, and rank again what is left."""

from dataclasses import dataclass
from typing import ClassVar

from blockpruner.errors import InputError
from blockpruner.searches.one_shot import by_rank
from blockpruner.searching.contract import Problem, Proposals


@dataclass(frozen=True)
class Iterative:
    """As `one_shot`, but what is left is scored again, on top of what is gone, after every `every` removals.

    So that a score knows of the removals before it, with any criterion. It is the iterative variant of LLM-Drop,
    whose code, though, leaves out a whole layer when it measures again after one block of it is gone, and that of the
    Shapley values in "A deeper look"; here the states are those of the model as it is then.

    Cost: that of the criterion k / every times, rounded up, for k steps; one evaluation per step.
    """

    every: int = 1

    title: ClassVar[str] = "Iterative ranking"
    source: ClassVar[str] = "He et al. 2024, arXiv 2406.15786; Siddiqui et al. 2024, arXiv 2407.16286"
    nested: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    starts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(
                f"iterative: every={self.every} removes nothing between two rankings", fix="give 1 or more"
            )

    def propose(self, problem: Problem) -> Proposals:
        return by_rank(problem, self.every)

    def evaluations(self, problem: Problem) -> int:
        """Exact for a number of blocks or layers, an upper bound for parameters; those of the criterion are extra."""
        return problem.most_steps()
