"""An explanation as tables and sentences on stdout."""

from collections.abc import Sequence

from blockpruner.artifacts import Estimate
from blockpruner.console import table
from blockpruner.evaluation.explanation import CheapScore, ClassEffect, Explanation, Interaction, StepExplanation
from blockpruner.evaluation.interactions import strongest

REPLACEABLE = 0.5  # of an update: a map that makes so much of it may stand in its place
ACROSS = 0.1  # a cosine below it is called neither along nor against
NOTHING = 1e-6  # length of an update beside the stream


def print_explanation(found: Explanation) -> None:
    """What each removal cost by class of token, what criteria and the stream say of it, and a paragraph for each."""
    names = [format_blocks(step) for step in found.steps]
    rows: list[tuple[object, ...]]
    for by in ("all", *found.definitions):
        rows = [(number, name, *_effects(step.classes, by)) for number, (name, step) in _numbered(names, found.steps)]
        heads = [f"{each.name} ({each.share:.0%})" for each in found.whole if each.by == by]
        if heads:
            title = "Loss of all tokens" if by == "all" else f"Loss by {by} of the token"
            rows.append(("", "all of the plan", *_effects(found.whole, by)))
            table(f"{title}: change by each removal, nats per token", (">", "removed", *(f">{h}" for h in heads)), rows)
    criteria = [score.criterion for score in found.steps[0].scores]
    columns = (">", "removed", ">search", *(f">{_short(name)}" for name in criteria), ">length", ">cosine")
    rows = [
        (number, name, _alone(step), *map(_placed, step.scores), *_stream(step))
        for number, (name, step) in _numbered(names, found.steps)
    ]
    title = "Places in the whole model (1 = goes first) by the search and by criteria, and what it did to the stream"
    table(title, (*columns, ">constant", ">linear"), rows)
    for number, (name, step) in _numbered(names, found.steps):
        print(f"{number}. {name}: {' '.join(sentences(step))}")
    _print_notes(found)


def sentences(step: StepExplanation) -> list[str]:
    """What is to be said of one removal, in short."""
    return [said for said in (_choice(step), _cheap(step), _classes(step), _writes(step), _partners(step)) if said]


def format_blocks(step: StepExplanation) -> str:
    return " + ".join(step.remove)


def _numbered(names: Sequence[str], steps: Sequence[StepExplanation]) -> list[tuple[int, tuple[str, StepExplanation]]]:
    return list(enumerate(zip(names, steps, strict=True), 1))


def _choice(step: StepExplanation) -> str:
    choice, said = step.choice, list[str]()
    if choice.rise is not None:
        said.append(f"the search saw the loss change by {choice.rise:+.4f}")
    if choice.behind is not None:
        tied = f", {len(choice.ties)} not told apart" if choice.ties else ""
        said.append(f"next best of {choice.tried} was {choice.next_best}, behind by {choice.behind:.4f}{tied}")
    return _sentence(said)


def _cheap(step: StepExplanation) -> str:
    placed = [one for one in step.scores if one.place]
    said = [f"{_short(one.criterion)} would take it {_ordinal(one.place)}" for one in placed[:1]]
    said += [f"{_short(one.criterion)} {_ordinal(one.place)}" for one in placed[1:]]
    if step.choice.alone:
        said.append(f"the search {_ordinal(step.choice.alone)}")
    return f"Of {placed[0].of} moves of the whole model, {', '.join(said)}." if placed else ""


def _classes(step: StepExplanation) -> str:
    """The classes that pay more, and less, than all tokens by more than two standard errors."""
    whole = next((each.change for each in step.classes if each.by == "all"), None)
    if whole is None:
        return ""
    ends = dict.fromkeys(step.classes, (whole.value, whole.value))
    ends |= {each: _interval(each.change) for each in step.classes if each.change}
    most, least = max(ends, key=lambda each: ends[each][0]), min(ends, key=lambda each: ends[each][1])
    said = [f"{_name(most)} more ({_signed(most.change)})"] if ends[most][0] > whole.value else []
    said += [f"{_name(least)} less ({_signed(least.change)})"] if ends[least][1] < whole.value else []
    return f"Tokens pay {_signed(whole)}, {' and '.join(said) or 'no class clearly more or less'}."


def _interval(change: Estimate) -> tuple[float, float]:
    margin = 2 * (change.stderr or 0)
    return change.value - margin, change.value + margin


def _writes(step: StepExplanation) -> str:
    stream = step.stream
    if stream.length is None or stream.cosine is None:
        return f"Its stream is not accounted for: {stream.reason}." if stream.reason else ""
    if stream.length.value < NOTHING:
        return "It wrote nothing into the stream."
    turn = stream.cosine.value
    way = "across the stream" if abs(turn) < ACROSS else "along the stream" if turn > 0 else "against the stream"
    said = f"It wrote {stream.length.value:.0%} of the stream's length, {way}"
    constant, linear = stream.constant_share, stream.linear_share
    if constant is not None and constant >= REPLACEABLE:
        return f"{said}; a constant makes {constant:.0%} of that: a bias may stand in its place."
    if linear is not None and linear >= REPLACEABLE:
        return f"{said}; a linear map makes {linear:.0%} of that, and may stand in its place."
    return f"{said}; no simple map makes half of that." if linear is not None else f"{said}."


def _partners(step: StepExplanation) -> str:
    sure = strongest(step.partners)
    more = [pair for pair in sure if pair.value.value > 0][:3]
    less = [pair for pair in sure if pair.value.value < 0][:3]
    said = []
    if more:
        said.append(f"once it is gone these are needed more, so they stand in for it: {_pairs(more)}")
    if less:
        said.append(f"once it is gone these are worth less, so they work with it: {_pairs(less)}")
    if step.partners and not said:
        most = max(pair.value.n for pair in step.partners)
        said.append(f"no partner is sure among {len(step.partners)} pairs (windows: {most})")
    return _sentence(said)


def _pairs(pairs: Sequence[Interaction]) -> str:
    return ", ".join(
        f"{pair.partner} (its removal costs {pair.rise:+.4f}, then {pair.rise + pair.value.value:+.4f})"
        for pair in pairs
    )


def _effects(classes: Sequence[ClassEffect], by: str) -> list[str]:
    return [_signed(each.change) for each in classes if each.by == by]


def _alone(step: StepExplanation) -> str:
    return f"{step.choice.alone} of {step.choice.of}" if step.choice.alone else "-"


def _placed(score: CheapScore) -> str:
    return f"{score.place} of {score.of}" if score.place else "-"


def _stream(step: StepExplanation) -> tuple[str, ...]:
    stream = step.stream
    shares = (f"{share:.0%}" if share is not None else "-" for share in (stream.constant_share, stream.linear_share))
    length = f"{stream.length.value:.3f}" if stream.length else "-"
    return length, f"{stream.cosine.value:+.3f}" if stream.cosine else "-", *shares


def _print_notes(found: Explanation) -> None:
    data = found.calibration
    print(
        f"On {data['source']}: {data['windows']} windows x {data['window']} tokens, {found.dtype}, seed {found.seed}; "
        "± standard error over windows; a removal is compared with the model as it was before it."
    )
    print("Constant, linear: share of what the block writes that such a map makes of the stream: of its size, not of")
    print("what it is worth to the loss (which `recover` measures), on held-out windows.")
    for name, text in {**found.definitions, **found.notes}.items():
        print(f"{name}: {text}.")


def _name(effect: ClassEffect) -> str:
    return f"{effect.by} {effect.name}" if effect.by == "position" else effect.name


def _short(criterion: str) -> str:
    return criterion.partition(":")[0]


def _sentence(parts: Sequence[str]) -> str:
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _ordinal(place: int | None) -> str:
    number = place or 0
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not finite"
    return f"{estimate.value:+.4f}" + ("" if estimate.stderr is None else f" ± {estimate.stderr:.4f}")
