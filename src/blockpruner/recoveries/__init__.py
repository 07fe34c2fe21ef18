"""The shelf of recoveries: one file per method, one line here."""

from collections.abc import Sequence
from importlib.util import find_spec

from blockpruner.errors import InputError, missing_extra
from blockpruner.recoveries.adapter import Adapter
from blockpruner.recoveries.bias import Bias
from blockpruner.recoveries.continued import Continued
from blockpruner.recoveries.distill import Distill
from blockpruner.recoveries.linear import Linear
from blockpruner.recoveries.lora import Lora
from blockpruner.recoveries.mlp import Mlp
from blockpruner.recoveries.refit import Refit
from blockpruner.recoveries.replaceme import ReplaceMe
from blockpruner.recoveries.span import Span
from blockpruner.recoveries.streamline import Streamline
from blockpruner.registry import format_method, parse_method, split_methods
from blockpruner.repairs.recovery import Recovery, Trained

RECOVERIES: dict[str, type[Recovery]] = {
    "bias": Bias,
    "linear": Linear,
    "replaceme": ReplaceMe,
    "span": Span,
    "mlp": Mlp,
    "refit": Refit,
    "adapter": Adapter,
    "streamline": Streamline,
    "lora": Lora,
    "distill": Distill,
    "continued": Continued,
}


def parse_recovery(text: str, *, seed: int = 0) -> Recovery:
    """The recovery that `text` names, as in `linear:rank=64`; `seed` where it takes one and was given none."""
    return parse_method(text, RECOVERIES, "recovery", seed=seed)


def parse_chain(text: str, *, seed: int = 0) -> tuple[Recovery, ...]:
    """The recoveries that `text` names, in order, as in `linear:rank=64,lora:rank=8`; see `registry.split_methods`."""
    methods = split_methods(text)
    if not methods:
        raise InputError("no recovery is named", fix=f"choose one of {', '.join(RECOVERIES)}")
    chain = tuple(parse_recovery(method, seed=seed) for method in methods)
    check_heads(chain)
    return chain


def check_heads(chain: Sequence[Recovery]) -> None:
    """InputError if a method of the chain needs the dense model's head, and one before it trains the head."""
    trained = ""
    for method in chain:
        keeps = isinstance(method, Trained) and method.keeps_head
        if trained and keeps:
            raise InputError(
                f"{method.title} as it is asked for needs the head that the dense model has, and {trained} trains it",
                fix="use loss=kl, without vocabulary, or another order",
            )
        if isinstance(method, Trained) and method.whole and not keeps:
            trained = method.title


def format_chain(chain: Sequence[Recovery]) -> str:
    """The text that `parse_chain` reads back."""
    return ",".join(format_method(method, RECOVERIES) for method in chain)


def check_installed(chain: Sequence[Recovery]) -> None:
    """MachineError, with the install command, if a method needs a package that is not there."""
    for method in chain:
        if isinstance(method, Trained) and method.package and find_spec(method.package) is None:
            raise missing_extra(method.package, "train", method.title)
