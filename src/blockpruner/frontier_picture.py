"""A Pareto table as a picture, drawn without a browser."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockpruner.artifacts import write_bytes
from blockpruner.errors import CheckFailedError, InputError, missing_extra
from blockpruner.frontier import AXES, Advice, Pareto, pairs_on

WIDTH, HEIGHT, MARGIN = 380, 300, 12  # pixels of a panel, and beside the points
LINE, LETTER = 15, 6.5  # pixels of a line of text, and about those of a letter


def check_picture(path: Path) -> None:
    """InputError if what is drawn would not be what the name of the file says."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} would be a PNG", fix=f"name it so: {path.with_suffix('.png')}")


def picture(pareto: Pareto, path: Path) -> None:
    """Loss against each axis, the points of a plan joined, the knee and the budget marked: a PNG at `path`."""
    try:
        altair, convert = importlib.import_module("altair"), importlib.import_module("vl_convert")
    except ImportError as error:
        raise missing_extra(str(error.name), "plots", "drawing") from error
    panels = [_panel(altair, pareto, one) for one in pareto.advice if pairs_on(pareto.points, one.axis)]
    if not panels:
        raise CheckFailedError("all points are alike, so there is nothing to draw", fix="give plans with some steps")
    chart = altair.hconcat(*panels).properties(title=f"{pareto.model}: loss judged by {pareto.judged_by}")
    write_bytes(path, convert.vegalite_to_png(chart.to_dict(), scale=1.5))


def _panel(altair: Any, pareto: Pareto, advice: Advice) -> Any:
    axis, dense, texts = advice.axis, pareto.points[0], labels(pareto, advice)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(point.title for point in pareto.points[1:]):
        for point in (dense, *(point for point in pareto.points[1:] if point.title == name)):
            if point.loss is not None and point.on(axis) is not None:
                spread = point.loss.stderr or 0.0
                low, high = point.loss.value - spread, point.loss.value + spread
                rows.append({"plan": name, "cost": point.on(axis), "loss": point.loss.value, "low": low, "high": high})
    base = altair.Chart(altair.Data(values=rows), width=WIDTH, height=HEIGHT).encode(
        x=altair.X(
            "cost:Q",
            scale=altair.Scale(domain=widths(pareto, advice, texts), nice=False, reverse=True),
            axis=altair.Axis(title=AXES[axis], tickCount=5, **({} if axis == "time" else {"format": "~s"})),
        ),
        color=altair.Color("plan:N", sort=None, legend=altair.Legend(labelLimit=400)),
    )
    y = altair.Y("loss:Q", scale=altair.Scale(domain=heights(pareto, advice), nice=False), title="loss")
    return altair.layer(
        base.mark_line(point=True).encode(y=y),
        base.mark_rule(opacity=0.4).encode(y="low:Q", y2="high:Q"),
        *(mark for label in texts for mark in _marks(altair, label)),
    )


@dataclass(frozen=True)
class Label:
    """A text that begins to the right of a point; shift: pixels down to it; width: its pixels, about."""

    cost: float
    loss: float
    text: str
    shift: float
    width: float


def labels(pareto: Pareto, advice: Advice) -> list[Label]:
    """The points to begin with, each with one text, from the top down.

    These are on the front, so no point is below to the right of them: there the texts stand, a line apart at least.
    """
    pairs = pairs_on(pareto.points, advice.axis)
    low, high = heights(pareto, advice)
    named: dict[int, list[str]] = {}
    for text, place in {"knee": advice.knee, f"cheapest within +{pareto.budget:g}": advice.within}.items():
        if place is not None:
            named.setdefault(place, []).append(text)
    found: list[Label] = []
    last = 0.0  # pixels from the top to the last text
    for place in sorted(named, key=lambda place: -pairs[place][1]):
        (cost, loss), text = pairs[place], ", ".join(named[place])
        down = HEIGHT * (high - loss) / (high - low)
        last = max(down, last) + LINE
        found.append(Label(cost, loss, text, last - down, LETTER * len(text)))
    return found


def heights(pareto: Pareto, advice: Advice) -> tuple[float, float]:
    """The ends of the axis of losses: all points with their errors, and below them room for two lines of text."""
    known = [pareto.points[place].loss for place in pairs_on(pareto.points, advice.axis)]
    ends = [one.value + sign * (one.stderr or 0.0) for one in known if one is not None for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    pixel = ((high - low) or 1.0) / (HEIGHT - MARGIN - 3 * LINE)
    return low - 3 * LINE * pixel, high + MARGIN * pixel


def widths(pareto: Pareto, advice: Advice, texts: Sequence[Label]) -> tuple[float, float]:
    """The ends of the axis of costs: all points, a margin on the left, and on the right room for the texts there.

    With room r, a point at the share f of the points' span is at f (WIDTH - r - MARGIN) + MARGIN; its text must end
    before WIDTH.
    """
    costs = [cost for cost, _ in pairs_on(pareto.points, advice.axis).values()]
    low, high = min(costs), max(costs)
    span = (high - low) or 1.0
    shares = [((high - label.cost) / span, label.width) for label in texts]
    needed = [WIDTH - MARGIN - (WIDTH - 2 * MARGIN - width) / share for share, width in shares if share > 0]
    room = max([MARGIN, *needed])
    pixel = span / (WIDTH - MARGIN - room)
    return low - room * pixel, high + MARGIN * pixel


def _marks(altair: Any, label: Label) -> list[Any]:
    """The point, and its text on a white ground, since lines may pass there."""
    here = altair.Chart(altair.Data(values=[asdict(label)])).encode(x="cost:Q", y="loss:Q")
    looks = ({"stroke": "white", "strokeWidth": 4, "strokeOpacity": 0.85}, {"color": "black"})
    texts = [here.mark_text(align="left", dx=8, dy=label.shift, **look).encode(text="text:N") for look in looks]
    return [here.mark_point(size=140, color="black", shape="diamond"), *texts]
