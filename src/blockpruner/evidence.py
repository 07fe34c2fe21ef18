"""What a run folder says of a plan already: why each move was chosen, scores, losses of pairs."""

from collections.abc import Collection
from pathlib import Path

from blockpruner.blocks import Move
from blockpruner.evaluation.explanation import CheapScore, Choice
from blockpruner.evaluation.interactions import Seen
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.scores import CriterionScores, ScoreTable

Notes = dict[str, str]  # what is not there and why, or where it is from


def choice(plan: Plan, number: int) -> Choice:
    """What the plan records of step `number`, counted from 0."""
    step = plan.steps[number]
    before = plan.dense_loss if number == 0 else plan.steps[number - 1].loss
    mine = str(Move.of(*step.blocks))
    known = {move: score.value for move, score in step.scores.items() if score is not None}
    next_best = min((move for move in known if move != mine), key=known.__getitem__, default=None)
    first = {move: score.value for move, score in plan.steps[0].scores.items() if score is not None}
    alone = sorted(first, key=first.__getitem__)
    return Choice(
        rise=step.loss.value - before.value if plan.nested and step.loss and before else None,
        tried=len(step.scores),
        next_best=next_best,
        behind=known[next_best] - known[mine] if next_best and mine in known else None,
        ties=step.ties,
        alone=alone.index(mine) + 1 if plan.nested and mine in alone else None,
        of=len(alone),
    )


def place(table: CriterionScores, move: Move) -> CheapScore:
    """The score of a move and its place among all that were scored."""
    text, order = str(move), table.least_first
    found = order.index(text) + 1 if text in order else None
    return CheapScore(criterion=table.criterion, score=table.scores.get(text), place=found, of=len(order))


def known_scores(
    folder: Path | None, model: ModelIdentity, moves: Collection[Move], notes: Notes
) -> tuple[CriterionScores, ...]:
    """Scores in a run folder that are of the whole `model` and of just these moves; `notes` says so."""
    path = folder / "scores.json" if folder else None
    if path is None or not path.is_file():
        return ()
    table = ScoreTable.load(path)
    same = table.model is None or table.model.fingerprint == model.fingerprint
    fit = tuple(one for one in table.criteria if same and not table.removed and set(one.scores) == set(map(str, moves)))
    if fit:
        source = f" on {table.calibration['source']}" if table.calibration else ""
        notes["scores.json"] = f"from there{source}: {', '.join(one.criterion for one in fit)}"
    return fit


def seen_losses(folder: Path | None, model: ModelIdentity, notes: Notes) -> Seen | None:
    """The losses in the journal of a search; why there are none to use goes into `notes`."""
    path = folder / "journal.jsonl" if folder else None
    if path is None or not path.is_file():
        notes["partners"] = "there is no journal of a search here, and pairs are not evaluated again"
        return None
    seen = Seen.read(path)
    if seen.model != model.fingerprint:
        notes["partners"] = "the journal here is of another model"
        return None
    return seen
