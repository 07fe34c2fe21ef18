"""Artifacts as tables on stdout, and the anatomy as JSON."""

from collections.abc import Mapping
from typing import Any

from blockpruner.artifacts import Estimate
from blockpruner.console import table
from blockpruner.evaluation.quality import Evaluation
from blockpruner.importance.ranking import ranks
from blockpruner.outcome import Outcome
from blockpruner.plan import Plan
from blockpruner.recoveries import RECOVERIES
from blockpruner.registry import format_method
from blockpruner.repairs.folding import foldable
from blockpruner.repairs.recovery import GapRecord, RecoveryRecord
from blockpruner.scores import ScoreTable
from blockpruner.subject import Subject
from blockpruner.surgery.checkpoint import Saved
from blockpruner.texts.overlap import SEEN, told_share


def anatomy_json(subject: Subject) -> dict[str, Any]:
    """What `inspect --json` prints. fold_obstacle: why no map can be folded into the block; null where one can."""
    obstacles = foldable(subject.model, subject.anatomy)
    return {
        "model": subject.identity.model_dump(),
        "dtype": subject.dtype,
        "stacks": [
            {"name": stack.name, "path": stack.path, "layers": len(stack.layers), "serial": stack.serial}
            for stack in subject.anatomy.stacks
        ],
        "blocks": [
            {
                "block": str(part.block),
                "path": part.path,
                "leaves_with_it": list(part.idle),
                "parameters": part.parameters,
                "compute_share": part.compute,
                "cache_bytes_per_token": part.cache_bytes,
                "kind_known_by": part.evidence,
                "fold_obstacle": obstacles[str(part.block)] or None,
            }
            for part in subject.anatomy.parts.values()
        ],
    }


def print_anatomy(subject: Subject) -> None:
    """Every block of the model, one row each, and what all of them have in common."""
    identity, parts = subject.identity, list(subject.anatomy.parts.values())
    rows = [
        (
            part.block.layer,
            part.block,
            part.path,
            f"{part.parameters:,}",
            "?" if part.compute is None else f"{part.compute:.2%}",
            part.cache_bytes or "-",
            part.evidence,
        )
        for part in parts
    ]
    columns = (">layer", "block", "module", ">parameters", ">compute", ">KV bytes/token", "kind known by")
    table(f"{identity.name}: {identity.model_type}, {identity.parameters:,} parameters", columns, rows)
    print(f"{len(parts)} blocks, all proved: removing one equals setting its last projection to zero, bit for bit.")
    if not all(layer.identity for stack in subject.anatomy.stacks for layer in stack.layers):
        print("Norms or scales stand on the residual stream: they stay with a layer, and leave with its last block.")
    if filled := [layer.path for stack in subject.anatomy.stacks for layer in stack.layers if layer.filled]:
        print(f"A recovery put something in the place of blocks that are gone, which stays: {', '.join(filled)}.")
    if kept := sorted(subject.anatomy.outline.kept, key=lambda block: block.order):
        print(f"Others need what these make, so removing them saves nothing: {', '.join(map(str, kept))}.")
    print(foldings(foldable(subject.model, subject.anatomy)))
    for path, reason in subject.anatomy.left.items():
        print(f"Left alone: {path}: {reason}")
    cache = subject.anatomy.cache_bytes()
    print(f"Key/value cache: {cache:,} bytes per token in {subject.dtype}. Compute: share of a 16-token forward pass.")
    for stack in subject.anatomy.stacks:
        if stack.serial:
            print(
                f"{stack.path}: an mlp and the next attention, removed together, leave a stock model (--moves stock)."
            )


def foldings(obstacles: Mapping[str, str]) -> str:
    """Into which blocks `recover --method replaceme` can fold a map, and the first reason why not, in one line."""
    blocked = [block for block, reason in obstacles.items() if reason]
    said = f"A recovery can fold a map into {len(obstacles) - len(blocked)} of {len(obstacles)} blocks (replaceme)"
    if not blocked:
        return f"{said}."
    others = len(blocked) - 1
    more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
    return f"{said}; not into {blocked[0]}{more}: {obstacles[blocked[0]]}."


def print_plan(plan: Plan) -> None:
    """The steps of a plan: what went, the loss then, and how close the second best was."""
    rows: list[tuple[object, ...]] = [(0, "(dense)", estimated(plan.dense_loss), "", "")]
    for number, step in enumerate(plan.steps, start=1):
        known = sorted(score.value for score in step.scores.values() if score is not None)
        margin = f"{known[1] - known[0]:.4f}" if len(known) > 1 else "-"
        rows.append((number, " + ".join(step.remove), estimated(step.loss), margin, len(step.scores)))
    unit = plan.dense_loss.unit if plan.dense_loss else "not evaluated"
    table("Removals, in order", (">step", "removed", f">loss ({unit})", ">next best behind by", ">tried"), rows)


def print_evaluation(evaluation: Evaluation) -> None:
    """The contestants of an evaluation side by side, and what each wrote."""
    data, contestants = evaluation.data, evaluation.contestants
    rows = [
        (
            quality.name,
            f"{quality.parameters:,}",
            quality.cache_bytes,
            estimated(quality.loss),
            estimated(quality.perplexity, 2),
            estimated(quality.bits_per_byte),
        )
        for quality in contestants
    ]
    dtypes = ", ".join(dict.fromkeys(quality.dtype for quality in contestants))
    columns = ("model", ">parameters", ">KV B/token", ">loss in nats", ">perplexity", ">bits/byte")
    named = f"protocol {evaluation.protocol}, " if evaluation.protocol else ""
    protocol = f"{named}{data.windows} windows x {data.window} tokens, BOS: {data.bos}, {dtypes}"
    table(f"{data.source}: {protocol}; ± standard error over windows", columns, rows)
    if len({quality.fingerprint for quality in contestants}) > 1:
        print("These models split the text into different tokens: compare bits per byte, not loss or perplexity.")
    for quality in contestants:
        if quality.seen and quality.seen.value >= SEEN:
            share = f"{quality.name} was recovered with {told_share(quality.seen)} of this text"
            print(f"{share}, so its figures here are better than elsewhere: take other text.")
    for quality in contestants:
        if quality.sample is not None:
            print(f"{quality.name} writes: {quality.sample!r}")


def print_saved(saved: Saved, before: int) -> None:
    """What was saved, how it compares, and how to load it; `before`: parameters of the model that was pruned."""
    share = saved.parameters / before - 1
    print(f"{saved.folder}: {saved.form} checkpoint, {saved.parameters:,} of {before:,} parameters ({share:+.1%})")
    print(f"reloaded in a fresh process: logits differ by at most {saved.difference:.2g}")
    if saved.form == "stand-ins":
        print("load it after `import blockpruner`, or with trust_remote_code=True")
    else:
        print("load it as any model")


def print_recovery(record: RecoveryRecord) -> None:
    """What each step did at each gap, and what all of it is worth on held-out text."""
    columns = ("removed", "place", ">parameters", ">still missing", "how")
    for step in record.steps:
        title = f"{_brief(step.method)}, fitted on {record.tokens[0]:,} tokens, judged by {record.tokens[1]:,} others"
        table(title, columns, [_filled(gap) for gap in step.gaps])
        curve = next((gap.curve for gap in step.gaps if gap.curve), ())
        if curve:
            looks = ", ".join(f"{look.step}: {'-' if look.loss is None else f'{look.loss:.4f}'}" for look in curve)
            print(f"Held-out loss by step: {looks}")
        if not step.applied:
            print(f"Left out: {step.reason}")
        elif len(record.steps) > 1:
            print(f"Held-out loss with it: {estimated(step.recovered)}")
    losses = {"dense": record.dense, "pruned": record.pruned, "recovered": record.recovered}
    print("Held-out loss: " + ", ".join(f"{name} {estimated(loss)}" for name, loss in losses.items()))
    if record.recovered_share is not None:
        share = f"{record.recovered_share:.0%} of the increase won back"
        print(
            f"{share} with {record.added_parameters:,} parameters; the same text made choices, so judge by other text."
        )


def _brief(method: str) -> str:
    """A recovery with those of its options that are not as they come."""
    name, _, options = method.partition(":")
    usual = format_method(RECOVERIES[name](), RECOVERIES).partition(":")[2].split(",") if name in RECOVERIES else []
    told = [option for option in options.split(",") if option not in usual]
    return f"{name}:{','.join(told)}" if told else name


def _filled(gap: GapRecord) -> tuple[str, ...]:
    how = ", ".join(f"{name}={value}" for name, value in gap.settings.items())
    return (
        gap.removed or "-",
        gap.place or "-",
        f"{gap.added_parameters:,}" if gap.applied else "-",
        "-" if gap.error is None else f"{gap.error:.1%}",
        (f"{how}; {gap.reason}" if gap.reason else how) if gap.applied else gap.reason,
    )


def estimated(estimate: Estimate | None, digits: int = 4) -> str:
    """A value with its standard error behind it, if it has one."""
    if estimate is None:
        return "-"
    spread = "" if estimate.stderr is None else f" ± {estimate.stderr:.{digits}f}"
    return f"{estimate.value:.{digits}f}{spread}"


def print_outcome(outcome: Outcome) -> None:
    """What a recipe made of a model, beside the dense one and random removals."""
    rows = [
        (name, f"{one.parameters:,}", estimated(one.loss), one.removed.replace("+", ", "))
        for name, one in outcome.contestants.items()
    ]
    dense = outcome.contestants["dense"].loss
    unit = dense.unit if dense else "loss"
    table(f"{outcome.recipe.title}, on {outcome.data.source}", ("model", ">parameters", f">{unit}", "removed"), rows)


def print_scores(scores: ScoreTable) -> None:
    """The score and the rank of every move, a column per criterion, and how far the rankings agree."""
    names = _short([one.criterion for one in scores.criteria])
    columns = [list(one.scores.values()) for one in scores.criteria]
    places = [_places(column) for column in columns]
    rows = [
        (move, *(_scored(column[row], place[row]) for column, place in zip(columns, places, strict=True)))
        for row, move in enumerate(scores.criteria[0].scores)
    ]
    table("Scores: higher = keep; in brackets the rank, 1 goes first", ("move", *(f">{n}" for n in names)), rows)
    for name, one in zip(names, scores.criteria, strict=True):
        print(f"{name}: {', '.join(one.least_first[:8])}{', ...' if len(one.least_first) > 8 else ''} first")
    if len(names) > 1:
        found = [[*row.values()] for row in scores.agreement().values()]
        shown = [(n, *("-" if v is None else f"{v:.2f}" for v in row)) for n, row in zip(names, found, strict=True)]
        table("Agreement: Spearman's rank correlation", ("", *(f">{name}" for name in names)), shown)


def _short(names: list[str]) -> list[str]:
    """Names without their options, where that tells them apart."""
    bare = [name.partition(":")[0] for name in names]
    return [short if bare.count(short) == 1 else name for name, short in zip(names, bare, strict=True)]


def _places(column: list[Estimate | None]) -> list[float | None]:
    found = iter(ranks([score.value for score in column if score is not None]))
    return [None if score is None else next(found) for score in column]


def _scored(score: Estimate | None, place: float | None) -> str:
    if score is None:
        return "not finite"
    spread = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    return f"{score.value:.4g}{spread} ({place:g})"
