"""A Pareto table as a picture, drawn without a browser."""

import importlib
from pathlib import Path
from typing import Any

from blockpruner.artifacts import write_bytes
from blockpruner.errors import CheckFailedError, missing_extra
from blockpruner.pareto import AXES, Advice, Pareto


def picture(pareto: Pareto, path: Path) -> None:
    """Loss against each axis, the points of a plan joined, the knee and the budget marked: a PNG at `path`."""
    try:
        altair, convert = importlib.import_module("altair"), importlib.import_module("vl_convert")
    except ImportError as error:
        raise missing_extra(str(error.name), "plots", "drawing") from error
    panels = [_panel(altair, pareto, advice) for advice in pareto.advice]
    if not panels:
        raise CheckFailedError("all points are alike, so there is nothing to draw", fix="give plans with some steps")
    chart = altair.hconcat(*panels).properties(title=f"{pareto.model}: loss judged by {pareto.judged_by}")
    write_bytes(path, convert.vegalite_to_png(chart.to_dict(), scale=1.5))


def _panel(altair: Any, pareto: Pareto, advice: Advice) -> Any:
    axis = advice.axis
    dense = pareto.points[0]
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(point.plan for point in pareto.points[1:]):
        chosen = [dense, *(point for point in pareto.points if point.plan == name)]
        for point in chosen:
            if point.loss is not None and point.on(axis) is not None:
                spread = point.loss.stderr or 0.0
                low, high = point.loss.value - spread, point.loss.value + spread
                rows.append({"plan": name, "cost": point.on(axis), "loss": point.loss.value, "low": low, "high": high})
    base = altair.Chart(altair.Data(values=rows), title=AXES[axis], width=340, height=300).encode(
        x=altair.X("cost:Q", scale=altair.Scale(zero=False, reverse=True), title=AXES[axis]),
        color=altair.Color("plan:N", sort=None),
    )
    places = {"knee": advice.knee, f"cheapest within +{pareto.budget:g}": advice.within}
    named = [(text, pareto.points[place]) for text, place in places.items() if place is not None]
    marks = [{"cost": p.on(axis), "loss": p.loss.value, "text": text} for text, p in named if p.loss is not None]
    marked = altair.Chart(altair.Data(values=marks)).encode(x="cost:Q", y="loss:Q")
    return altair.layer(
        base.mark_line(point=True).encode(y=altair.Y("loss:Q", scale=altair.Scale(zero=False), title="loss")),
        base.mark_rule(opacity=0.4).encode(y="low:Q", y2="high:Q"),
        marked.mark_point(size=140, color="black", shape="diamond"),
        marked.mark_text(align="right", dx=-9, dy=-9).encode(text="text:N"),
    )
