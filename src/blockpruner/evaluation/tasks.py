"""Tasks of lm-evaluation-harness on a model in memory, with what came out for each item.

The harness does the work, as its own command would: the numbers are the same. What is added is that any model which
this package can prune goes through it, and that the results of single items are kept, so that models can be compared
item by item.
"""

import contextlib
import difflib
import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from blockpruner.artifacts import Estimate
from blockpruner.errors import CheckFailedError, InputError, MachineError, missing_extra
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.task_files import digest_of
from blockpruner.evaluation.task_table import Items, TaskResult, usual_metric

LOCAL = "local_"  # an include path that holds local_piqa stands in for piqa
OWN = "lm-eval"  # what defines the tasks that the harness brings
_BY_LENGTH = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2)}  # nats in their unit


class Harness:
    """The installed harness with the tasks it knows; MachineError if it is not installed.

    include_path: a folder with task files (YAML). Naming one is consent to run the Python code that they refer to.
    """

    def __init__(self, include_path: Path | None = None) -> None:
        try:
            import lm_eval.tasks
        except ImportError as error:
            raise missing_extra("lm-eval", "tasks", "running tasks") from error
        if include_path is not None and not include_path.is_dir():
            raise InputError(f"{include_path} is no folder with task files", fix="give a folder that holds .yaml files")
        self._manager = lm_eval.tasks.TaskManager
        self.include_path = include_path
        self.version = version("lm-eval")

    @cached_property
    def _added(self) -> Any:
        """The tasks of the include path alone: found in a moment, where all of the harness's take many seconds."""
        with _quiet():
            return self._manager(include_path=str(self.include_path), include_defaults=False)

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.include_path) if self.include_path is not None else ""

    @cached_property
    def _own(self) -> Any:
        with _quiet():
            return self._manager()

    def find(self, name: str) -> tuple[str, Any]:
        """What the harness calls the task `name`, and the index that has it; the include path goes first.

        InputError for a name that neither has.
        """
        if self.include_path is not None:
            for known in (name, LOCAL + name):
                if known in self._added.all_tasks:
                    return known, self._added
        if name not in self._own.all_tasks:
            known = [*(self._added.all_tasks if self.include_path else ()), *self._own.all_tasks]
            close = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(
                f"lm-eval {self.version} has no task {name!r}",
                fix=f"{guess}`lm-eval ls tasks` lists them; for files of your own give --include-path FOLDER",
            )
        return name, self._own

    def definition(self, name: str) -> str:
        """What says what the task `name` is, beside the harness and its version: OWN, or a digest of the include path.

        Results of tasks of one name compare, and stand in for each other, only where this is the same.
        """
        return self._digest if self.include_path is not None and self.find(name)[1] is self._added else OWN

    def run(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        *,
        contestant: str,
        computation: str,
        limit: int | None,
        batch: int,
    ) -> TaskResult:
        """The first `limit` items (of each task of a group) answered by `model`, `batch` at a time."""
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        name, index = self.find(task.name)
        evaluate, wrap = cast(Any, evaluator.simple_evaluate), cast(Any, HFLM)
        with _quiet(), _hurried(evaluator), _said(task.name, self.version):
            found = evaluate(
                model=wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=[name],
                task_manager=index,
                num_fewshot=task.shots,
                batch_size=batch,
                limit=limit,
                log_samples=True,
            )
        items = {leaf: _items(samples, found["results"].get(leaf, {})) for leaf, samples in found["samples"].items()}
        if name not in found["results"]:
            raise InputError(f"{name} is a name for several tasks", fix=f"name them: {', '.join(sorted(items))}")
        metrics = _metrics(found["results"][name], sum(len(leaf.docs) for leaf in items.values()), contestant, name)
        directions = found["higher_is_better"].get(name, {})
        return TaskResult(
            contestant=contestant,
            task=task.name,
            ran=name,
            metric=usual_metric(task.metric, metrics),
            metrics=metrics,
            items=items,
            shots=task.shots,
            limit=limit,
            batch=batch,
            harness=self.version,
            dtype=str(model.dtype).removeprefix("torch."),
            computation=computation,
            definition=self.definition(task.name),
            higher_is_better={metric: directions.get(metric.partition(",")[0]) for metric in metrics},
        )


def _metrics(row: Mapping[str, Any], n: int, contestant: str, task: str) -> dict[str, Estimate]:
    """The harness's metrics, `metric` or `metric,filter`, each with its standard error."""
    found: dict[str, Estimate] = {}
    for key, value in row.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise CheckFailedError(
                f"{contestant} has no finite {name} on {task}: {value}",
                fix="evaluate with --dtype float32; if that changes nothing, the model is broken",
            )
        error = row.get(f"{name}_stderr,{kind}")
        known = isinstance(error, int | float) and math.isfinite(error)
        found[_key(name, kind)] = Estimate(
            value=float(value),
            stderr=float(error) if known and error is not None else None,
            n=n,
            unit=name,
            reason=None if known else "the harness has none",
        )
    return found


def _items(samples: list[dict[str, Any]], whole: Mapping[str, Any]) -> Items:
    """One row per item, whatever the number of filters; metrics that are no single number per item are left out.

    whole: the metrics of the task, by the harness's keys.
    """
    docs: dict[int, str] = {}
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        docs[sample["doc_id"]] = str(sample["doc_hash"])[:16]
        for name in sample["metrics"]:
            values.setdefault((name, sample["filter"]), {})[sample["doc_id"]] = sample[name]
    order = sorted(docs)
    columns = {
        _key(*key): _numbers(key[0], [column[number] for number in order], whole.get(",".join(key)))
        for key, column in values.items()
        if len(column) == len(order)
    }
    return Items(
        docs=tuple(docs[number] for number in order),
        values={name: tuple(column) for name, column in columns.items() if column and all(map(math.isfinite, column))},
    )


def _numbers(metric: str, values: Sequence[Any], whole: Any) -> list[float] | None:
    """A number for each item that goes the way of the metric: up where that goes up; None where there is no such.

    The harness has log-likelihoods for items of perplexities, which go the other way: these are negated, in nats. A
    (log-likelihood, length) of a document becomes its part of the mean over all words or bytes,
    -log-likelihood * documents / length of all, in bits for bits_per_byte: the logarithm of a perplexity is their mean.
    """
    nats = _BY_LENGTH.get(metric)
    if nats and all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        length = math.fsum(value[1] for value in values) / len(values)
        return [-value[0] / (length * nats) for value in values] if length > 0 else None
    if not all(isinstance(value, bool | int | float) or getattr(value, "shape", None) == () for value in values):
        return None
    numbers = [float(value) for value in values]
    of_logs = metric == "perplexity" and isinstance(whole, int | float) and whole > 0
    if of_logs and math.isclose(math.log(whole), -math.fsum(numbers) / len(numbers), rel_tol=1e-6, abs_tol=1e-9):
        return [-number for number in numbers]
    return numbers


def _key(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the harness are heard, its progress bars by a person at a terminal alone; stdout stays clean."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    heard = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _hurried(evaluator: Any) -> Iterator[None]:
    """Without the description of the machine that the harness adds to results: ten seconds, and nobody reads it."""
    whole = evaluator.add_env_info
    evaluator.add_env_info = lambda _: None
    try:
        yield
    finally:
        evaluator.add_env_info = whole


@contextlib.contextmanager
def _said(task: str, harness: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:  # it has no errors of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MachineError(
            f"lm-eval {harness} could not run the task {task}: {type(error).__name__}: {reason}",
            fix="its data may need the network: try `lm_eval --tasks` with it; tasks with data at hand: --include-path",
        ) from error
