"""The shelf of objectives: one file per measure, one line here."""

from blockpruner.measuring import Measure
from blockpruner.objectives.accuracy import Accuracy
from blockpruner.objectives.embedding import Embedding
from blockpruner.objectives.jensen_shannon import JensenShannon
from blockpruner.objectives.kl import KL
from blockpruner.objectives.logit_distance import LogitDistance
from blockpruner.objectives.loss import Loss
from blockpruner.registry import parse_method

OBJECTIVES: dict[str, type[Measure]] = {
    "loss": Loss,
    "kl": KL,
    "js": JensenShannon,
    "logits": LogitDistance,
    "embedding": Embedding,
    "accuracy": Accuracy,
}


def parse_objective(text: str) -> Measure:
    """The measure that `text` names, as in `accuracy:per=token`."""
    return parse_method(text, OBJECTIVES, "objective")
