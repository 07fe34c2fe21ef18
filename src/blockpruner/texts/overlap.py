"""Text that two sets of windows have in common, however each was cut: runs of RUN tokens.

The text itself is not kept of what a model was fitted on, but the smallest hashes of its runs: a bottom-k sketch
(Broder 1997), of which the share of another text that is in there can be told.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blockpruner.artifacts import Estimate
from blockpruner.texts.examples import IGNORED, Examples

RUN = 32  # tokens in a row that two texts have in common
KEPT = 4096  # hashes of a sketch: 32 KiB
FEWEST = 30  # runs of a text that is larger than its sketch, to tell a share from
SEEN = 0.01  # a share that is worth a word: less is what many texts have in common
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Rows = Any  # numpy: integers [windows, tokens]


def windows_in_common(fit: Rows, judged: Rows) -> set[int]:
    """The windows to judge by that share text with those to fit on: all of it, or twice RUN tokens, wherever it stands.

    Every RUN-th run of the one is looked for at every place of the other, so that what is cut up otherwise is seen.
    """
    whole = {row.tobytes() for row in fit}
    runs = {bytes(run) for row in fit for run in _runs(row)[::RUN]}
    return {
        number
        for number, row in enumerate(judged)
        if row.tobytes() in whole or len({bytes(run) for run in _runs(row)} & runs) > 1
    }


def sketch(texts: Sequence[Rows]) -> str:
    """The KEPT smallest hashes of all runs in these windows, in base64; empty where no window has RUN tokens."""
    found = np.unique(np.concatenate([np.empty(0, np.uint64), *(np.unique(_hashes(rows))[:KEPT] for rows in texts)]))
    return base64.b64encode(found[:KEPT].astype("<u8").tobytes()).decode()


def share_known(known: str, rows: Rows) -> Estimate | None:
    """The share of the runs in these windows that a text of this sketch has too, from 0 to 1; n: runs looked at.

    All of them where the sketch holds all of its text, of about RUN + KEPT tokens; else those whose hash is below the
    largest of the sketch, one of N where its text has N times KEPT runs: a random choice, whose standard error is that
    of a share. None where fewer than FEWEST of them could be looked at, or this is no sketch.
    """
    try:
        held = np.frombuffer(base64.b64decode(known, validate=True), "<u8").astype(np.uint64)
    except ValueError:  # of base64 too
        return None
    every = asked = _hashes(rows)
    if len(held) >= KEPT:
        asked = every[every <= held.max()]
    if not len(held) or len(asked) < min(FEWEST, max(1, len(every))):
        return None
    share = float(np.isin(asked, held).mean())
    error = (share * (1 - share) / len(asked) * (1 - len(asked) / len(every))) ** 0.5
    return Estimate(value=share, stderr=error, n=len(asked), unit=f"share of runs of {RUN} tokens")


def told_share(share: Estimate) -> str:
    """In words."""
    return f"{share.value:.0%}" + (f" ± {share.stderr:.0%}" if share.stderr else "")


def tokens_of(examples: Examples) -> Rows:
    """The text of each row [rows, tokens], with what is hidden from the model in its place."""
    ids, targets = examples.inputs["input_ids"], examples.targets
    if examples.question == "masked tokens":
        ids = torch.where(targets == IGNORED, ids, targets)
    elif examples.question == "denoising":
        ids = targets
    return (ids if examples.windows is None else examples.windows).cpu().numpy()


def _runs(row: Rows) -> Rows:
    """All runs of RUN tokens in a row, as bytes [places, bytes of a run]; none where two do not fit."""
    if len(row) < 2 * RUN:
        return np.empty((0, 0), dtype=np.uint8)
    found = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(row, RUN))
    return found.view(np.uint8).reshape(len(found), -1)


def _hashes(rows: Rows) -> Rows:
    """A hash [runs], uint64, of the RUN tokens at every place of each row."""
    places = rows.shape[1] - RUN + 1
    if places < 1:
        return np.empty(0, np.uint64)
    found = np.zeros((len(rows), places), np.uint64)
    for shift in range(RUN):
        found = found * _FACTOR + rows[:, shift : shift + places].astype(np.uint64) + np.uint64(1)
    # Sums of products leave their low bits to the last tokens: mixed, as splitmix64 does, all bits depend on all.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    return (found ^ (found >> np.uint64(31))).ravel()
