"""Toy models and objectives: small enough that every answer is known."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockpruner.artifacts import Work
from blockpruner.blocks import Block, Mask, Outline
from blockpruner.plan import Plan
from blockpruner.searching.contract import BatchByBatch, Problem, Search, SearchResult
from blockpruner.searching.moves import Target

NOISE = ((0.0, 0.25), (-0.5, 0.125, 1.0))  # per micro-batch, per window; binary fractions, so that sums are exact


def toy_outline(depth: int, *, stack: str = "", serial: bool = True, attention: int = 100, mlp: int = 300) -> Outline:
    """One stack of attention + mlp layers, and as many parameters outside of it as in it."""
    blocks = tuple(Block(kind, layer, stack) for layer in range(depth) for kind in ("attention", "mlp"))
    sizes = {block: mlp if block.kind == "mlp" else attention for block in blocks}
    return Outline(blocks, sizes, 2 * sum(sizes.values()), frozenset([stack] if serial else []))


def toy_problem(depth: int, moves: str, target: str, protected: Sequence[int] = ()) -> Problem:
    return Problem(toy_outline(depth), moves, Target.parse(target), frozenset(("", layer) for layer in protected))


@dataclass
class Toy(BatchByBatch):
    """loss(mask, window) = rule(mask) + the window's own noise; `asked` lists all (mask, batch) in order."""

    rule: Callable[[Mask], float]
    asked: list[tuple[Mask, int]] = field(default_factory=list)

    batches = len(NOISE)
    unit = "nats per token"

    def batch_losses(self, masks: Sequence[Mask], batch: int) -> list[tuple[float, ...]]:
        self.asked += [(mask, batch) for mask in masks]
        return [tuple(self.rule(mask) + noise for noise in NOISE[batch]) for mask in masks]

    def work(self, masks: Sequence[Mask], batch: int) -> Work:
        units = len(NOISE[batch])
        return Work(attention_tokens=7 * units * len(masks), mlp_tokens=5 * units * len(masks), head_tokens=len(masks))


def additive(weights: dict[str, float]) -> Callable[[Mask], float]:
    """The sum of the weights of what is gone; weightless blocks count 9."""
    return lambda mask: sum(weights.get(str(block), 9.0) for block in mask)


def tangled(mask: Mask) -> float:
    """A loss in which blocks interact: neighbours hurt more together, and two blocks make up for each other."""
    layers = [block.layer for block in mask]
    near = sum(abs(a - b) <= 1 for a, b in itertools.combinations(layers, 2))
    pair = {Block("attention", 1), Block("mlp", 3)} <= mask
    return sum(2.0 + (3 * block.layer + len(block.kind)) % 5 for block in mask) + 1.5 * near - 4.0 * pair


def plan_of(result: SearchResult, search: Search, problem: Problem) -> Plan:
    return Plan.from_search(result, search=search, problem=problem, objective="toy", seed=0, dtype="float64")
