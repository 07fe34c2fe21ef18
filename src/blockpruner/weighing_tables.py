"""Speed, memory and Pareto tables on stdout."""

from blockpruner.console import table
from blockpruner.evaluation.speed import Benchmark, Cell, Figures
from blockpruner.evaluation.timing import SpeedUp, Timing
from blockpruner.frontier import AXES, Pareto, Point
from blockpruner.searching.costs import readable_bytes
from blockpruner.tables import estimated


def print_benchmark(found: Benchmark) -> None:
    """A table per batch size and length, and how to read it."""
    for cell in found.cells:
        _print_cell(found, cell)
    print(f"{found.device}, {found.dtype}, {found.threads} threads, {found.clock}; protocol: {found.source}.")
    print("Seconds: median (quartiles). Speed-up: median of ratios in one round each (95 % interval of that median).")
    print("Ideal: as if prefill took the time of its counted operations alone.")


def _print_cell(found: Benchmark, cell: Cell) -> None:
    title = f"{cell.batch} x {cell.context} tokens in, {cell.new} out; {cell.rounds} rounds in turns"
    speeds = [
        (
            one.name,
            _seconds(one.prefill),
            _ratio(one.prefill_speedup),
            "-" if one.ideal_speedup is None else f"{one.ideal_speedup:.3f}x",
            "-" if one.decode is None else _seconds(one.decode),
            "-" if one.decode_speedup is None else _ratio(one.decode_speedup),
            "-" if one.decode is None else f"{cell.batch / one.decode.median:.4g}",
        )
        for one in cell.contestants
    ]
    columns = (">prefill s", ">speed-up", ">ideal", ">decode s/token", ">speed-up", ">tokens/s")
    table(title, ("model", *columns), speeds)
    limit = () if found.limit is None else (">largest batch", ">largest context")
    rows = [(*_memory(one), *(_most(one) if limit else ())) for one in cell.contestants]
    table("Memory", ("model", ">weights", ">cache at the end", ">cache after prefill", ">peak beside it", *limit), rows)
    if limit and any(one.largest_context == one.longest_context is not None for one in cell.contestants):
        print("Largest context, its own: more would fit, but the model reads no further.")


def _memory(one: Figures) -> tuple[str, ...]:
    measured = one.cache_bytes_measured
    same = "as counted" if measured == one.cache_bytes_counted else f"counted {readable_bytes(one.cache_bytes_counted)}"
    return (
        one.name,
        readable_bytes(one.weights_bytes),
        readable_bytes(one.cache_bytes),
        "-" if measured is None else f"{readable_bytes(measured)}, {same}",
        "-" if one.peak_bytes is None else readable_bytes(one.peak_bytes),
    )


def _most(one: Figures) -> tuple[str, str]:
    batch, context = one.largest_batch, one.largest_context
    own = ", its own" if context == one.longest_context is not None else ""
    return "any" if batch is None else f"{batch:,}", "any" if context is None else f"{context:,}{own}"


def print_pareto(pareto: Pareto) -> None:
    """Every point, and where to begin."""
    searched = any(point.recovery for point in pareto.points)
    rows = [
        (
            number,
            point.plan,
            *((_recovery(point),) if searched else ()),
            point.depth,
            point.removed,
            f"{point.parameters:,}",
            f"{point.cache_bytes:,}",
            "-" if point.time is None else f"{point.time:.3f}",
            estimated(point.loss),
            "-" if point.rise is None else f"{point.rise:+.4f}",
            ", ".join(AXES[axis].partition(",")[0].partition(" ")[0] for axis in point.best_in),
        )
        for number, point in enumerate(pareto.points)
    ]
    columns = (
        *(("recovery",) if searched else ()),
        ">steps",
        ">blocks gone",
        ">parameters",
        ">KV B/token",
        ">time",
        ">loss",
        ">rise",
        "not beaten in",
    )
    table(f"{pareto.model}: losses by {pareto.judged_by}; ± standard error", (">#", "plan", *columns), rows)
    print(f"Time: {pareto.time}; dense = 1.")
    if any(point.recovered for point in pareto.points):
        print("Losses are with the recovery; what it puts in the place of blocks is in none of the other columns.")
    for one in pareto.advice:
        for name, place in {"knee": one.knee, f"cheapest within +{pareto.budget:g}": one.within}.items():
            if place is not None:
                print(f"{AXES[one.axis]}, {name}: {_named(pareto.points[place])}")


def _named(point: Point) -> str:
    return point.title if point.depth == 0 else f"{point.title}, first {point.depth} steps"


def _recovery(point: Point) -> str:
    if point.recovery is None or point.recovered:
        return point.recovery or "-"
    return f"none here; found with {point.recovery}"


def _seconds(timing: Timing) -> str:
    return f"{timing.median:.4g} ({timing.low:.4g} to {timing.high:.4g})"


def _ratio(ratio: SpeedUp) -> str:
    spread = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{ratio.median:.3f}x{spread}"
