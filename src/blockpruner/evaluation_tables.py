"""An assessment of several models as tables on stdout, with a line on what each comparison comes to."""

import statistics
from collections.abc import Mapping, Sequence

from blockpruner.artifacts import Estimate
from blockpruner.console import table
from blockpruner.evaluation.assessment import Assessment
from blockpruner.evaluation.paired import Comparison
from blockpruner.evaluation.task_table import TaskTable
from blockpruner.evaluation.verdict import GenerationCheck, Judgement
from blockpruner.tables import print_evaluation

LEVEL = 0.05  # of the p-values, adjusted, that a line is drawn at


def print_assessment(found: Assessment) -> None:
    """All that was found, text first."""
    if found.evaluation:
        print_evaluation(found.evaluation)
    if found.tasks:
        print_tasks(found.tasks)
    if found.generation:
        print_generation(found.generation)
    elif found.evaluation and len(found.contestants) > 1:
        print("Whether one of these collapses when it writes was not looked at: add --generate.")


def print_tasks(tasks: TaskTable) -> None:
    """Every task, a column per contestant, their plain means, and each contestant beside the reference."""
    names = list(dict.fromkeys(result.contestant for result in tasks.results))
    rows: list[tuple[object, ...]] = []
    figures: dict[str, list[float]] = {name: [] for name in names}
    for task in dict.fromkeys(result.task for result in tasks.results):
        each = {result.contestant: result for result in tasks.results if result.task == task}
        first = next(iter(each.values()))
        for name, result in each.items():
            figures[name].append(result.figure.value)
        shots = "" if first.shots is None else f"{first.shots}"
        cells = (_value(each[name].figure) if name in each else "-" for name in names)
        rows.append((first.ran, first.metric, shots, first.figure.n, *cells))
    directions = {result.higher_is_better.get(result.metric) for result in tasks.results}
    even = len({len(column) for column in figures.values()}) == len(directions) == 1  # else a mean says nothing
    if even and len(rows) > 1:
        rows.append(("mean", "", "", "", *(f"{statistics.fmean(column):.4f}" for column in figures.values())))
    columns = ("task", "metric", ">shots", ">items", *(f">{name}" for name in names))
    table(f"Tasks, by lm-eval {tasks.results[0].harness}; ± standard error over items", columns, rows)
    for name, compared in tasks.comparisons.items():
        _print_comparison(name, tasks.reference, compared)
    compared = {task for found in tasks.comparisons.values() for task in found}
    if any("perplexity" in result.metric for result in tasks.results if result.task in compared):
        print("Perplexities are compared by their logarithms, in nats; lower is better.")


def _print_comparison(name: str, reference: str, compared: Mapping[str, Comparison]) -> None:
    rows = [
        (
            task,
            f"{one.difference:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            f"{one.gained} / {one.lost}",
            f"{one.p:.2g}",
            "-" if one.adjusted is None else f"{one.adjusted:.2g}",
        )
        for task, one in compared.items()
    ]
    if not rows:
        return
    columns = ("task", ">difference", ">95 % interval", ">items gained / lost", ">p", ">p, adjusted")
    table(f"{name} beside {reference}, on the same items (exact McNemar, or sign flips; Holm)", columns, rows)
    sure = {task: one.word for task, one in compared.items() if (one.adjusted or 0) <= LEVEL}
    found = {word: [task for task in sure if sure[task] == word] for word in ("worse", "better", "different")}
    said = [f"{word} at {', '.join(found)}" for word, found in found.items() if found]
    print(f"{name}: {'; '.join(said) or 'no task tells it from the reference'}.")


def print_generation(check: GenerationCheck) -> None:
    """What each contestant's writing is like, and one line of verdict on each."""
    probes = list(check.written[0].answers)
    rows = [
        (
            written.name,
            _mean(written.losses) if written.was_read else "-",
            _mean(written.repetition),
            _mean(written.loops),
            f"{statistics.fmean(written.agreement(check.written[0])):.1f} of {len(written.writings[0].tokens)}",
            *(f"{sum(written.answers[probe])}/{len(written.answers[probe])}" for probe in probes),
        )
        for written in check.written
    ]
    columns = ("model", f">{check.reference}'s loss", ">rep-4", ">in loops", ">same first tokens")
    title = f"Greedy continuations of {len(check.prompts)} prompts, and small questions answered from the context"
    table(title, (*columns, *(f">{probe}" for probe in probes)), rows)
    for probe in check.judgements[0].silent:
        print(f"{probe} says nothing here: {check.reference} itself cannot do it.")
    for judgement in check.judgements:
        if judgement.verdict != "reference":
            print(verdict_line(judgement))


def verdict_line(judgement: Judgement) -> str:
    """`NAME: collapsed: ...`, with the reasons."""
    return ": ".join(filter(None, (judgement.name, judgement.verdict, "; ".join(judgement.reasons))))


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}"


def _value(estimate: Estimate) -> str:
    return f"{estimate.value:.4f}" + ("" if estimate.stderr is None else f" ± {estimate.stderr:.4f}")
