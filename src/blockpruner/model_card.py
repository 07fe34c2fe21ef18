"""The model card of a smaller model: what was removed, how that was found, what it costs, and how to load it.

Its README.md, in the form of the Hugging Face hub: a head that machines read, and a short text. It says what the plan
and the recovery say, and measures nothing. Words that a user chose are cut to one line of harmless letters.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from blockpruner.artifacts import Estimate
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.repairs.recovery import RecoveryRecord

LONGEST = 120  # letters of a user's word
HEAD = 65536  # bytes of another card in which its license is looked for
HARMLESS, BRACKETS = r"\w .,:;=/+()-", r"\[\]"  # letters, as in a regular expression
ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,63})[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Written:
    """What was written.

    form: stock, stand-ins or zeroed; auto_class: of transformers, that loads it; earlier: blocks that what is called
    the whole model had lost already; files: of what was done then, beside the card.
    """

    form: str
    parameters: int
    auto_class: str
    earlier: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def model_card(
    identity: ModelIdentity,
    plan: Plan,
    made: Written,
    record: RecoveryRecord | None = None,
    license_name: str | None = None,
    layers: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
) -> str:
    """The text of README.md.

    identity: of the whole model; plan: what was removed; record: of a recovery; layers: see `spans.layer_map`, if
    whole ones are gone.
    """
    count = sum(len(step.remove) for step in plan.steps)
    share = 1 - made.parameters / identity.parameters
    size = f"{made.parameters:,} of {identity.parameters:,} parameters ({share:.1%} less)"
    sections = [
        _head(identity, license_name),
        f"# {_plain(identity.name)} without {count} blocks",
        f"{_code(identity.name)} ({_code(identity.model_type)}) without {count} of its attention, MLP or other blocks: "
        + (f"they are in the files as zeros; {size}." if made.form == "zeroed" else f"{size}."),
        "## What was removed",
        *_removed(plan),
        *_earlier(made),
        *_layers(layers or {}),
        *_losses(plan),
        *_recovery(record),
        "## How to load it",
        *_loading(made),
        f"Made with blockpruner {version('blockpruner')}. `plan.json` has the removals with the evidence for each"
        + (", `recovery.json` what was done then." if record else "."),
    ]
    return "\n\n".join(sections) + "\n"


def license_of(folder: Path | None) -> str | None:
    """The license that the card of the whole model names, if it has one that does."""
    try:
        with (folder / "README.md" if folder else Path()).open("rb") as file:
            text = file.read(HEAD).decode("utf-8", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = LICENSE.search(head[1]) if head else None
    return found[1] if found else None


def _head(identity: ModelIdentity, license_name: str | None) -> str:
    lines = ["---", "library_name: transformers"]
    if ON_THE_HUB.fullmatch(identity.name):
        lines.append(f"base_model: {json.dumps(identity.name)}")
    if license_name:
        lines.append(f"license: {json.dumps(license_name)}")
    return "\n".join([*lines, "tags:", "- blockpruner", "- depth-pruning", "- pruned", "---"])


def _removed(plan: Plan) -> list[str]:
    order = "In this order:" if plan.nested else "Together:"
    steps = "\n".join(f"{number}. {' + '.join(step.remove)}" for number, step in enumerate(plan.steps, start=1))
    how, text = plan.method, plan.calibration
    if how is None:
        return [order, steps, "The plan does not say how they were found."]
    ranked = f", moves ranked by {_code(how.criterion)}" if how.criterion else ""
    inside = f", each removal scored with {_code(how.recovery)} in its place" if how.recovery else ""
    found = f"Found by the search {_code(how.search)} for the objective {_code(how.objective)}{ranked}{inside}"
    said = {name: _plain(str((text or {}).get(name))) for name in ("windows", "window", "fingerprint")}
    read = (
        f", on {said['windows']} windows of {said['window']} tokens of {_code(str(text.get('source')))}" if text else ""
    )
    mark = f" (fingerprint `{said['fingerprint'][:16]}`)" if text else ""
    return [order, steps, f"{found}{read}{mark}."]


def _earlier(made: Written) -> list[str]:
    """What was gone before these removals."""
    if not made.earlier and not made.files:
        return []
    gone = f"lost {', '.join(map(_plain, made.earlier))}" if made.earlier else "been pruned"
    beside = f": see {' and '.join(map(_code, made.files))}" if made.files else ""
    return [
        f"What is called the whole model here had {gone} before, and what had been put in their places stays{beside}."
    ]


def _layers(layers: Mapping[str, Sequence[tuple[int, ...]]]) -> list[str]:
    """Which layers of the whole model are left."""
    said = []
    for stack, left in layers.items():
        names = [str(at[0]) if len(at) == 1 else f"{at[0]} (which stands for {_counted(at[1:])} too)" for at in left]
        said.append(f"Layers {f'of the {_plain(stack)} ' if stack else ''}with anything left: {', '.join(names)}.")
    return ["Numbers are those of the whole model, from 0. " + " ".join(said)] if said else []


def _counted(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _losses(plan: Plan) -> list[str]:
    last = plan.steps[-1].loss if plan.steps else None
    if plan.dense_loss is None or last is None:
        return []
    inside = " (with replacements)" if plan.method and plan.method.recovery else ""
    table = _table(plan.dense_loss.unit, {"whole model": plan.dense_loss, f"without them{inside}": last})
    return [
        "## What the search measured",
        table,
        "± standard error over windows. The search chose by this text, so other text tells more.",
    ]


def _recovery(record: RecoveryRecord | None) -> list[str]:
    if record is None:
        return []
    losses = {"whole model": record.dense, "without them": record.pruned, "recovered": record.recovered}
    unit = next((loss.unit for loss in losses.values() if loss), "no loss")
    share = "" if record.recovered_share is None else f" It won back {record.recovered_share:.0%} of the increase."
    done = ", then ".join(_code(step.method) for step in record.steps if step.applied) or "Nothing"
    said = f"{done}, fitted on {record.tokens[0]:,} tokens, with {record.added_parameters:,} parameters added.{share}"
    note = f"On {record.tokens[1]:,} held-out tokens, by which choices were made. ± standard error over windows."
    stand = [
        f"{_code(gap.place)} stands for {_plain(str(gap.settings.get('stands for', gap.removed)))}"
        for step in record.steps
        for gap in step.gaps
        if step.applied and gap.applied and ("stands for" in gap.settings or "+" in gap.removed)
    ]
    beyond = [f"By the numbers of the whole model, {', '.join(stand)}."] if stand else []
    return ["## What was done to win quality back", said, *beyond, _table(unit, losses), note]


def _loading(made: Written) -> list[str]:
    first = ["import blockpruner  # or: trust_remote_code=True below"] if made.form == "stand-ins" else []
    lines = [
        *first,
        f"from transformers import {made.auto_class}, AutoTokenizer",
        "",
        f'model = {made.auto_class}.from_pretrained("this folder or repository")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder or repository")',
    ]
    return ["```python\n" + "\n".join(lines) + "\n```"]


def _table(unit: str, losses: dict[str, Estimate | None]) -> str:
    rows = [f"| {name} | {_value(loss)} |" for name, loss in losses.items()]
    return "\n".join([f"| | loss, {_plain(unit)} |", "| --- | --- |", *rows])


def _value(loss: Estimate | None) -> str:
    if loss is None:
        return "not known"
    return f"{loss.value:.4f}" + ("" if loss.stderr is None else f" ± {loss.stderr:.4f}")


def _plain(text: str, harmless: str = HARMLESS) -> str:
    """One line of letters that mean nothing to Markdown or HTML."""
    kept = re.sub(f"[^{harmless}]", "?", " ".join(text.split()))
    return kept if len(kept) <= LONGEST else kept[: LONGEST - 3] + "..."


def _code(text: str) -> str:
    """The same as code, where brackets are harmless too."""
    return f"`{_plain(text, BRACKETS + HARMLESS)}`"
