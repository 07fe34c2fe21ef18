"""The shelf of criteria: one file per method, one line here."""

from blockpruner.criteria.angular import Angular
from blockpruner.criteria.coalitions import Coalitions
from blockpruner.criteria.cosine import Cosine
from blockpruner.criteria.deepest import Deepest
from blockpruner.criteria.fisher import Fisher
from blockpruner.criteria.gates import Gates
from blockpruner.criteria.leave_one_out import LeaveOneOut
from blockpruner.criteria.magnitude import Magnitude
from blockpruner.criteria.random import Random
from blockpruner.criteria.relative_magnitude import RelativeMagnitude
from blockpruner.criteria.shapley import Shapley
from blockpruner.criteria.taylor import Taylor
from blockpruner.criteria.update_norm import UpdateNorm
from blockpruner.importance.criterion import Criterion
from blockpruner.registry import parse_method

CRITERIA: dict[str, type[Criterion]] = {
    "cosine": Cosine,
    "angular": Angular,
    "update-norm": UpdateNorm,
    "relative-magnitude": RelativeMagnitude,
    "leave-one-out": LeaveOneOut,
    "shapley": Shapley,
    "coalitions": Coalitions,
    "taylor": Taylor,
    "fisher": Fisher,
    "gates": Gates,
    "magnitude": Magnitude,
    "deepest": Deepest,
    "random": Random,
}


def parse_criterion(text: str, *, seed: int = 0) -> Criterion:
    """The criterion that `text` names, as in `update-norm:p=1`; `seed` where it takes one and was given none."""
    return parse_method(text, CRITERIA, "criterion", seed=seed)
