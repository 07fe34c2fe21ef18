"""What stands in an outcome: the dense model, the pruned one, what was recovered, and as much removed at random."""

from collections.abc import Mapping

from blockpruner.anatomy.parts import Layer, layer_stand_ins
from blockpruner.blocks import Mask, format_mask
from blockpruner.data import Data
from blockpruner.mending import Mended
from blockpruner.objectives import in_full
from blockpruner.outcome import Contestant
from blockpruner.plan import Plan
from blockpruner.planning import Task
from blockpruner.searches.random import Random
from blockpruner.searching import driver
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.standin import Replacement

RANDOMS = 5


def recovered(task: Task, data: Data, mended: Mended) -> Contestant:
    """What the recovered model is worth by the objective of the task on other data."""
    subject, mask, repair = mended.subject, mended.plan.mask(), mended.repair

    def filling(layer: Layer, removed: Mask) -> dict[str, Replacement]:
        return {
            path: repair.replacements[path] for path in layer_stand_ins(layer, removed) if path in repair.replacements
        }

    losses = Evaluations(data.objective(subject, in_full(task.objective.measure), filling)).losses([mask], "measuring")
    left = subject.identity.parameters - subject.anatomy.outline.removed_parameters(mask)
    return Contestant(removed=format_mask(mask), parameters=left + repair.added_parameters, loss=losses[mask])


def at_random(task: Task, plan: Plan, number: int = RANDOMS) -> dict[str, Mask]:
    """Masks that reach the target of `plan` by the same kind of moves at random, in as many if its end was the loss."""
    free, most = Rehearsal(task.objective), len(plan.steps) if task.problem.target.endless else None
    results = {seed: driver.run(Random(seed), task.problem, free, keep=False) for seed in range(number)}
    return {
        f"random {seed}": frozenset().union(*(step.move.blocks for step in result.steps[:most]))
        for seed, result in results.items()
    }


def measured(task: Task, data: Data, masks: Mapping[str, Mask]) -> dict[str, Contestant]:
    """The loss of the model without each mask, by the objective of the task on other data."""
    subject, outline = task.subject, task.subject.anatomy.outline
    objective = data.objective(subject, in_full(task.objective.measure))
    losses = Evaluations(objective).losses(masks.values(), "measuring")
    return {
        name: Contestant(
            removed=format_mask(mask),
            parameters=subject.identity.parameters - outline.removed_parameters(mask),
            loss=losses[mask],
        )
        for name, mask in masks.items()
    }
