"""The task lists of the papers by name, with their shots and metrics, for lm-evaluation-harness."""

from dataclasses import dataclass

from blockpruner.errors import InputError
from blockpruner.registry import lookup


@dataclass(frozen=True)
class Task:
    """name: of the harness; shots: examples before each question, None as the task says; metric: the one to look at.

    metric: of the harness, with its filter where that is not `none`, as in `exact_match,strict-match`; None: acc_norm
    if the task has it, else acc, else its first.
    """

    name: str
    shots: int | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Suite:
    """tasks: of which the plain mean is reported; source: whose they are; limit: items per task, None all."""

    tasks: tuple[Task, ...]
    source: str
    limit: int | None = None


def _plain(*names: str, metric: str = "acc", shots: int = 0) -> tuple[Task, ...]:
    return tuple(Task(name, shots, metric) for name in names)


_BLOCKPRUNER = (*_plain("piqa", "hellaswag", "arc_easy", "arc_challenge", metric="acc_norm"), *_plain("winogrande"))
_SHORTENED = (
    *_plain("boolq", "piqa", "winogrande", "arc_easy"),
    *_plain("hellaswag", "arc_challenge", "openbookqa", metric="acc_norm"),
)
_MMLU = _plain("mmlu", shots=5)

SUITES: dict[str, Suite] = {
    "quick": Suite(_plain("piqa", "arc_easy", metric="acc_norm"), "two tasks that small models can do", limit=100),
    "paper": Suite(_SHORTENED, "the tasks of Shortened LLaMA, among them the five of BlockPruner"),
    "full": Suite(
        (*_SHORTENED, *_MMLU, Task("gsm8k", 5, "exact_match,strict-match")), "paper, MMLU with 5 examples, and GSM8K"
    ),
    "blockpruner": Suite(
        _BLOCKPRUNER, "BlockPruner (arXiv 2406.10594), there by harness 0.4.0, which put no BOS before a question"
    ),
    "shortened-llama": Suite(
        _SHORTENED, "Shortened LLaMA (arXiv 2402.02834), there by harness commit 3326c54, before 0.4"
    ),
    "mmlu": Suite(_MMLU, "MMLU with 5 examples, as A deeper look at depth pruning and LLM-Drop report it"),
    "llm-drop": Suite(
        (
            *_plain("boolq", "rte"),
            *_plain("openbookqa", "piqa", metric="acc_norm"),
            *_MMLU,
            *_plain("winogrande", shots=5),
            Task("hellaswag", 10, "acc_norm"),
            Task("arc_challenge", 25, "acc_norm"),
        ),
        "LLM-Drop (arXiv 2406.15786), the eight tasks of its averages; it has GSM8K beside them",
    ),
}


def chosen_tasks(
    suite: str | None, names: str | None, shots: int | None, limit: int | None
) -> tuple[tuple[Task, ...], int | None]:
    """The tasks of a suite and those named besides (`piqa,boolq`), once each, and how many items of each to take.

    shots, limit: in place of what the suite says. InputError for an unknown suite, or a number that makes no sense.
    """
    if (shots is not None and shots < 0) or (limit is not None and limit < 1):
        raise InputError(
            "a negative number of shots, or no items at all", fix="give --shots 0 or more, --limit 1 or more"
        )
    known = lookup(suite, SUITES, "suite") if suite else Suite((), "")
    named = tuple(Task(name.strip()) for name in (names or "").split(",") if name.strip())
    tasks = {task.name: task for task in (*named, *known.tasks)}
    if shots is not None:
        tasks = {name: Task(name, shots, task.metric) for name, task in tasks.items()}
    return tuple(tasks.values()), known.limit if limit is None else limit
