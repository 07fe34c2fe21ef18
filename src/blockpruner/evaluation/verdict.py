"""One line on what a model writes, beside what the dense model writes: ok, worse, or collapsed.

Perplexity by the reference alone is not enough: to a reader, a text that says one thing again and again is no surprise.
So three things are looked at, each beside the reference: the loss of the reference on the text, repetition, and probes.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from blockpruner.artifacts import Artifact, Estimate, Record
from blockpruner.evaluation.paired import mcnemar
from blockpruner.evaluation.probes import FLOOR
from blockpruner.evaluation.writings import Written

Verdict = Literal["reference", "ok", "worse", "collapsed"]

# Set on prompts of their own, and judged on others: benchmarks/collapse.py.
LOSS_WORSE, LOSS_COLLAPSED = 0.5, 1.0  # nats per token of the reference on the text, above those on its own
REPEATED_WORSE, REPEATED_COLLAPSED = 0.25, 0.5  # rep-4 above the reference's
PROBE_COLLAPSED = 0.25  # share of the reference's right answers that are left
PROBE_LEVEL = 0.01  # of McNemar's test, without which fewer right answers are chance
THRESHOLDS = {
    "loss": (LOSS_WORSE, LOSS_COLLAPSED),
    "repetition": (REPEATED_WORSE, REPEATED_COLLAPSED),
    "probe": (PROBE_LEVEL, PROBE_COLLAPSED),
}


class Judgement(Record):
    """A contestant beside the reference, over prompts; every value 0 for the reference itself, higher = worse.

    loss: of the reference on the texts, above that on its own, in nats per token; repetition: rep-4 above the
    reference's; loops: the share of a text in its longest loop, above the reference's; agreement: first tokens that
    are the reference's own, of `length` (characters for models of another tokenizer); probes: share of right answers;
    silent: the probes at which the reference itself is below FLOOR, so that they say nothing; reasons: why.
    """

    name: str
    verdict: Verdict
    reasons: tuple[str, ...]
    loss: Estimate
    repetition: Estimate
    loops: Estimate
    agreement: Estimate
    length: int
    probes: dict[str, Estimate]
    silent: tuple[str, ...]


class GenerationCheck(Artifact):
    """What all contestants wrote, and what is to be said of it.

    prompts: as text; written: the reference first; judgements: of those that the reference has read.
    """

    FORMAT: ClassVar[str] = "blockpruner.generation"
    VERSION: ClassVar[int] = 1

    reference: str
    prompts: tuple[str, ...]
    written: tuple[Written, ...]
    judgements: tuple[Judgement, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], written: Sequence[Written]) -> "GenerationCheck":
        return cls(
            format=cls.FORMAT,
            version=cls.VERSION,
            reference=written[0].name,
            prompts=tuple(prompts),
            written=tuple(written),
            judgements=tuple(judged(written[0], one) for one in written if one.was_read),
        )


def judged(reference: Written, written: Written) -> Judgement:
    """`written` beside `reference`; both were read by the reference's model."""
    probes = written.probes
    silent = tuple(name for name, right in reference.probes.items() if right.value < FLOOR)
    loss = _gap(written.losses, reference.losses, "nats per token")
    repetition = _gap(written.repetition, reference.repetition, "rep-4")
    found = [*_beyond("the dense model's loss on its text is {:+.2f} nats", loss, LOSS_WORSE, LOSS_COLLAPSED)]
    found += _beyond("it repeats itself: rep-4 {:+.2f}", repetition, REPEATED_WORSE, REPEATED_COLLAPSED)
    for name, right in written.answers.items():
        if name not in silent:
            found += _lost(name, reference.answers[name], right)
    severe = [reason for worst, reason in found if worst]
    verdict: Verdict = "collapsed" if severe else "worse" if found else "ok"
    return Judgement(
        name=written.name,
        verdict="reference" if written is reference else verdict,
        reasons=tuple(severe or [reason for _, reason in found]),
        loss=loss,
        repetition=repetition,
        loops=_gap(written.loops, reference.loops, "share of a text"),
        agreement=Estimate.of([float(count) for count in written.agreement(reference)], "first tokens"),
        length=max((len(writing.tokens) for writing in written.writings), default=0),
        probes=probes,
        silent=silent,
    )


def _gap(mine: Sequence[float], its: Sequence[float], unit: str) -> Estimate:
    return Estimate.of([a - b for a, b in zip(mine, its, strict=True)], unit)


def _beyond(text: str, gap: Estimate, worse: float, collapsed: float) -> list[tuple[bool, str]]:
    """Whether the gap is beyond the thresholds; `worse` only if it is also 2 standard errors above nothing."""
    sure = gap.stderr is None or gap.value > 2 * gap.stderr
    if math.isfinite(gap.value) and gap.value > worse and sure:
        return [(gap.value > collapsed, text.format(gap.value))]
    return []


def _lost(probe: str, reference: Sequence[bool], mine: Sequence[bool]) -> list[tuple[bool, str]]:
    gained = sum(a and not b for a, b in zip(mine, reference, strict=True))
    lost = sum(b and not a for a, b in zip(mine, reference, strict=True))
    if lost <= gained or mcnemar(gained, lost) > PROBE_LEVEL:
        return []
    few = sum(mine) <= PROBE_COLLAPSED * sum(reference)
    return [(few, f"{probe}: {sum(mine)} of {len(mine)} right, {sum(reference)} before")]
