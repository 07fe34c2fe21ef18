"""Artifacts as tables on stdout, and the anatomy as JSON."""

from typing import Any

from blockpruner.artifacts import Estimate
from blockpruner.checkpoint import Saved
from blockpruner.console import table
from blockpruner.evaluation.quality import Evaluation
from blockpruner.pipeline import Subject
from blockpruner.plan import Plan


def anatomy_json(subject: Subject) -> dict[str, Any]:
    """What `inspect --json` prints."""
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
    if kept := sorted(subject.anatomy.outline.kept, key=lambda block: block.order):
        print(f"Others need what these make, so removing them saves nothing: {', '.join(map(str, kept))}.")
    for path, reason in subject.anatomy.left.items():
        print(f"Left alone: {path}: {reason}")
    cache = subject.anatomy.cache_bytes()
    print(f"Key/value cache: {cache:,} bytes per token in {subject.dtype}. Compute: share of a 16-token forward pass.")
    for stack in subject.anatomy.stacks:
        if stack.serial:
            print(
                f"{stack.path}: an mlp and the next attention, removed together, leave a stock model (--moves stock)."
            )


def print_plan(plan: Plan) -> None:
    """The steps of a plan: what went, the loss then, and how close the second best was."""
    rows: list[tuple[object, ...]] = [(0, "(dense)", _value(plan.dense_loss), "", "")]
    for number, step in enumerate(plan.steps, start=1):
        known = sorted(score.value for score in step.scores.values() if score is not None)
        margin = f"{known[1] - known[0]:.4f}" if len(known) > 1 else "-"
        rows.append((number, " + ".join(step.remove), _value(step.loss), margin, len(step.scores)))
    table("Removals, in order", (">step", "removed", ">loss in nats", ">next best behind by", ">tried"), rows)


def print_evaluation(evaluation: Evaluation) -> None:
    """The contestants of an evaluation side by side, and what each wrote."""
    data, contestants = evaluation.data, evaluation.contestants
    rows = [
        (
            quality.name,
            f"{quality.parameters:,}",
            quality.cache_bytes,
            _value(quality.loss),
            _value(quality.perplexity, 2),
            _value(quality.bits_per_byte),
        )
        for quality in contestants
    ]
    dtypes = ", ".join(dict.fromkeys(quality.dtype for quality in contestants))
    columns = ("model", ">parameters", ">KV B/token", ">loss in nats", ">perplexity", ">bits/byte")
    protocol = f"{data.windows} windows x {data.window} tokens, BOS: {data.bos}, {dtypes}"
    table(f"{data.source}: {protocol}; ± standard error over windows", columns, rows)
    if len({quality.fingerprint for quality in contestants}) > 1:
        print("These models split the text into different tokens: compare bits per byte, not loss or perplexity.")
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


def _value(estimate: Estimate | None, digits: int = 4) -> str:
    if estimate is None:
        return "-"
    spread = "" if estimate.stderr is None else f" ± {estimate.stderr:.{digits}f}"
    return f"{estimate.value:.{digits}f}{spread}"
