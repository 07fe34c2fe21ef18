"""The shelf of recoveries: one file per method, one line here."""

from blockpruner.recoveries.bias import Bias
from blockpruner.recoveries.linear import Linear
from blockpruner.recoveries.replaceme import ReplaceMe
from blockpruner.recovery import Recovery
from blockpruner.registry import parse_method

RECOVERIES: dict[str, type[Recovery]] = {
    "bias": Bias,
    "linear": Linear,
    "replaceme": ReplaceMe,
}


def parse_recovery(text: str, *, seed: int = 0) -> Recovery:
    """The recovery that `text` names, as in `linear:rank=64`; `seed` where it takes one and was given none."""
    return parse_method(text, RECOVERIES, "recovery", seed=seed)
