"""How the papers of the field measure perplexity, as data. Numbers of different protocols do not compare."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockpruner.artifacts import Estimate
from blockpruner.errors import InputError
from blockpruner.registry import lookup
from blockpruner.texts.calibration import BosPolicy, TextOptions

Mean = Literal["losses", "perplexities"]


@dataclass(frozen=True)
class Protocol:
    """window: tokens; bos: see `calibration`; mean: exp of the mean loss, or the mean of the windows' perplexities.

    text: what the paper reports on; source: where this is from; differs: what is not as there.
    """

    window: int
    bos: BosPolicy
    mean: Mean
    text: str
    source: str
    differs: str = ""

    def applied(self, name: str, text: TextOptions) -> TextOptions:
        """`text` with this window and policy; InputError for another window, while `bos` may be named on purpose."""
        if text.get("window") not in (None, self.window):
            raise InputError(
                f"the protocol {name} has windows of {self.window} tokens, and {text.get('window')} were asked for",
                fix="leave out the window, or the protocol",
            )
        bos = text.get("bos", "auto")
        return {**text, "window": self.window, "bos": self.bos if bos == "auto" else bos}


PROTOCOLS: dict[str, Protocol] = {
    "blockpruner": Protocol(
        window=2048,
        bos="stream",
        mean="losses",
        text="WikiText-2 test",
        source="BlockPruner (arXiv 2406.10594), official code",
    ),
    "shortened-llama": Protocol(
        window=128,
        bos="stream",
        mean="losses",
        text="WikiText-2 test, PTB validation",
        source="Shortened LLaMA (arXiv 2402.02834), official code, ppl.csv",
    ),
    "shortened-llama-bos": Protocol(
        window=129,
        bos="window",
        mean="losses",
        text="WikiText-2 test, PTB validation",
        source="Shortened LLaMA, official code, ppl_bos.csv: a BOS before each 128 tokens, as Gemma needs it",
    ),
    "deeper-look": Protocol(
        window=2048,
        bos="stream",
        mean="perplexities",
        text="OpenWebText, a tenth held out",
        source="A deeper look at depth pruning of LLMs (arXiv 2407.16286), official code",
        differs="there a BOS stood before each document, and documents had nothing between them",
    ),
    "evopress": Protocol(
        window=8192,
        bos="none",
        mean="losses",
        text="WikiText-2 test",
        source="EvoPress (arXiv 2410.14649); its windows for Llama-2 had 4096 tokens",
    ),
}


def protocol_of(name: str) -> Protocol:
    """The protocol called `name`; InputError lists the right names."""
    return lookup(name, PROTOCOLS, "protocol")


def perplexity(losses: Sequence[float], mean: Mean) -> Estimate:
    """Perplexity of windows with these mean losses in nats, with its standard error; lower = better.

    losses: exp(mean loss), its error exp(mean loss) times that of the mean. perplexities: the mean of exp(loss), which
    is never smaller, and is ruled by the worst windows.
    """
    if mean == "perplexities":
        return Estimate.of([math.exp(loss) for loss in losses], "mean perplexity of windows")
    loss = Estimate.of(losses, "nats per token")
    value = math.exp(loss.value)
    stderr = None if loss.stderr is None else value * loss.stderr
    return Estimate(value=value, stderr=stderr, n=loss.n, unit="perplexity", reason=loss.reason)
