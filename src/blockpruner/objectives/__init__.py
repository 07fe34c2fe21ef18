"""The shelf of objectives: one file per measure, one line here."""

from blockpruner.measuring import Measure
from blockpruner.objectives.accuracy import Accuracy
from blockpruner.objectives.embedding import Embedding
from blockpruner.objectives.jensen_shannon import JensenShannon
from blockpruner.objectives.kl import KL
from blockpruner.objectives.logit_distance import LogitDistance
from blockpruner.objectives.loss import Loss
from blockpruner.objectives.sampled_loss import SampledLoss
from blockpruner.registry import parse_method

OBJECTIVES: dict[str, type[Measure]] = {
    "loss": Loss,
    "sampled-loss": SampledLoss,
    "kl": KL,
    "js": JensenShannon,
    "logits": LogitDistance,
    "embedding": Embedding,
    "accuracy": Accuracy,
}


def parse_objective(text: str, *, seed: int = 0) -> Measure:
    """The measure that `text` names, as in `accuracy:per=token`; `seed` where it takes one and was given none."""
    return parse_method(text, OBJECTIVES, "objective", seed=seed)


def in_full(measure: Measure) -> Measure:
    """What a result is reported by: the loss over the whole vocabulary, where a search saw a part of it."""
    return Loss() if isinstance(measure, SampledLoss) else measure
