"""What a move does to the residual stream: how much it writes, which way, and whether a simple map could do it."""

import json
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blockpruner.blocks import Move
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.evaluation.explanation import StreamAccount
from blockpruner.importance.criterion import Lab
from blockpruner.importance.streams import directions, lengths, scores_by_state
from blockpruner.repairs.closed_form import ClosedForm, Given, chosen
from blockpruner.repairs.normal_equations import NormalEquations
from blockpruner.searching.evaluations import Notes, estimate

HELD_OUT = 4  # one window in so many, the last ones


def stream_account(lab: Lab, move: Move) -> StreamAccount:
    """The account of `move` in the model without `lab.mask`, on the windows of `lab.examples`; noted in `lab.notes`.

    The first position of a window, whose states are unlike all others, is left out. The maps are fitted on the first
    windows, at least half, and judged on the last ones, by which their ridge is chosen as well (`closed_form`).
    Cost: one forward pass to the end of the move. Memory: four float64 matrices of the stream's width squared.
    """
    try:
        name = f"stream account of {move} without {'+'.join(sorted(map(str, lab.mask))) or 'nothing'}"
        noted = lab.notes.get(name, lambda: _read(lab, move).model_dump(mode="json"))
        return StreamAccount.model_validate_json(json.dumps(noted))
    except (InputError, UnsupportedModelError) as error:
        return StreamAccount(reason=error.what)


def _read(lab: Lab, move: Move) -> StreamAccount:
    windows = len(lab.examples.targets)
    account = _Account(first_held_out=windows - max(1, windows // HELD_OUT))
    scores_by_state(replace(lab, notes=Notes()), [move], account.add, name=f"reading {move}", unit="")
    found = StreamAccount(
        length=estimate(account.norms, "of the stream's length"),
        cosine=estimate(account.cosines, "cosine"),
        tokens=(account.tokens(False), account.tokens(True)),
    )
    return account.judged(found, str(move))


@dataclass
class _Account:
    """Sums over the rows of a walk, in their order."""

    first_held_out: int
    norms: list[float] = field(default_factory=list[float])
    cosines: list[float] = field(default_factory=list[float])
    sums: dict[tuple[Given, bool], NormalEquations] = field(default_factory=dict[tuple[Given, bool], NormalEquations])

    def add(self, before: Tensor, after: Tensor) -> Tensor:
        """Take in one row, float32 [1, tokens, ..., hidden]."""
        x, update = (states.flatten(2, -2) if states.ndim > 3 else states[:, :, None] for states in (before, after))
        x, update = x[0, 1:].flatten(0, 1), (update - x)[0, 1:].flatten(0, 1)
        held_out = len(self.norms) >= self.first_held_out
        self.norms.append(float((lengths(update) / lengths(x)).mean()))
        self.cosines.append(float((directions(update) * directions(x)).sum(-1).mean()))
        for given in (Given("nothing"), Given("rms")):
            inputs = given.of(x)
            sums = self.sums.setdefault((given, held_out), NormalEquations(inputs.shape[-1], x.shape[-1], x.device))
            sums.add(inputs, update)
        return torch.zeros(1, before.shape[1])

    def tokens(self, held_out: bool) -> int:
        return next((sums.tokens for (_, part), sums in self.sums.items() if part == held_out), 0)

    def judged(self, found: StreamAccount, what: str) -> StreamAccount:
        """`found` with what a constant and a linear map make of the update, or why there is too little text for it."""
        if not self.tokens(False):
            return found.model_copy(update={"reason": "one window is too little to fit a map and to judge it"})
        for name, given in (("constant_share", Given("nothing")), ("linear_share", Given("rms"))):
            sums = (self.sums[given, False], self.sums[given, True])
            try:
                share = 1 - chosen(sums, given, ClosedForm("stream"), what).error
            except InputError as error:
                return found.model_copy(update={"reason": error.what})
            found = found.model_copy(update={name: share})
        return found
