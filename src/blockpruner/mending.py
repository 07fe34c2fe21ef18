"""From words to a recovered model: text is read, a recovery runs and is judged, and what it made is saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from blockpruner.calibration import TextOptions
from blockpruner.checkpoint import Saved
from blockpruner.data import read_data
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.examples import Examples
from blockpruner.gaps import Repair
from blockpruner.objectives.loss import Loss
from blockpruner.plan import Plan
from blockpruner.recoveries import parse_recovery
from blockpruner.recovering import HELD_OUT, recover
from blockpruner.recovery import RecoveryRecord
from blockpruner.searching import Progress
from blockpruner.standin import MODEL_TYPE
from blockpruner.subject import Subject, save_subject


@dataclass(frozen=True)
class Mended:
    """What a recovery makes of a model without the blocks of a plan, not saved yet. subject: the dense model."""

    subject: Subject
    plan: Plan
    repair: Repair
    record: RecoveryRecord

    def check(self) -> None:
        """CheckFailedError if held-out text is worse off with the repair, or there is none."""
        if not self.record.applied:
            raise CheckFailedError(
                f"nothing was written: {self.record.reason}",
                fix="fit on more text, take another method, or write it all the same with --force",
            )
        if not self.repair.replacements and not self.repair.weights:
            gap = self.record.gaps[0]
            raise CheckFailedError(
                f"nothing was written, since nothing was recovered: {gap.removed}: {gap.reason}",
                fix="fit on more text, or take another method",
            )

    def save(self, out: Path) -> Saved:
        """Write it to the new folder `out`, reloaded and compared, with plan.json and recovery.json beside the weights.

        See `checkpoint.save_pruned`; CheckFailedError, and no folder, where `check` fails too.
        """
        self.check()
        files = {"recovery.json": self.record.model_dump_json(indent=2).encode() + b"\n"}
        return save_subject(self.subject, self.plan, out, repair=self.repair, extra_files=files)


def mend(
    subject: Subject,
    plan: Plan,
    *,
    method: str,
    calibration: str,
    held_out: str | None = None,
    first: int | None = None,
    force: bool = False,
    seed: int = 0,
    source: str = "the plan",
    progress: Progress | None = None,
    **text: Unpack[TextOptions],
) -> Mended:
    """Fit the recovery `method` for the dense model of `subject` without the blocks of `plan`, or its `first` steps.

    held_out: other text to judge by, a quarter as many tokens; without it the last fifth of the calibration text is
    held out. force: keep also what held-out text is worse off with. Cost, memory and errors: see `recovering.recover`.
    InputError, naming `source`, if the plan is not for this model or removes nothing.
    """
    recovery = parse_recovery(method, seed=seed)
    taken = plan if first is None else plan.cut(first)
    taken.check(subject.anatomy.outline, subject.identity, source)
    if not taken.steps:
        raise InputError(f"{source} removes nothing, so nothing is missing", fix="give the plan of a search")
    _check_whole(subject)

    def read(name: str, tokens: int | None) -> Examples:
        return read_data(subject, name, Loss(), seed=seed, **{**text, "tokens": tokens}).examples

    tokens = text.get("tokens", 16384)
    judged = None
    if held_out is not None:
        judged = read(held_out, None if tokens is None else -(-tokens // (HELD_OUT - 1)))
    repair, record = recover(
        *(subject.model, subject.anatomy, taken.mask(), recovery, read(calibration, tokens), judged),
        force=force,
        progress=progress,
    )
    return Mended(subject, taken, repair, record)


def _check_whole(subject: Subject) -> None:
    """InputError if a recovery changed the model before: what that put in is no block, and would be fitted twice."""
    earlier = getattr(subject.model.config, MODEL_TYPE, None) or {"modules": {}}
    if any("replacement" in spec for spec in earlier["modules"].values()):
        raise InputError(
            f"{subject.identity.name} was recovered before, so it is not the dense model",
            fix="give the model that its blocks were removed from",
        )
