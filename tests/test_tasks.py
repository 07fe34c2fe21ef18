"""Tasks of lm-evaluation-harness through our path: its own numbers, item by item, on files made here."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from blockpruner.artifacts import Estimate
from blockpruner.errors import CheckFailedError, InputError, MachineError
from blockpruner.evaluation.suites import SUITES, Task, chosen_tasks
from blockpruner.evaluation.task_files import digest_of
from blockpruner.evaluation.task_table import Items, TaskResult, TaskTable
from blockpruner.evaluation.tasks import OWN, Harness
from blockpruner.evaluation_tables import print_tasks
from blockpruner.loading.models import load

pytest.importorskip("lm_eval")

YAML = """
task: {name}
dataset_path: json
custom_dataset: !function rows.load
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GROUP = """
group: local_pair
task: [local_little, other]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
LAST_WORD = """
task: last_word
dataset_path: json
custom_dataset: !function rows.load
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
TEXTS = """
task: texts
dataset_path: json
custom_dataset: !function rows.load
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{goal}} {{sol2}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
ROWS = [
    {"goal": "The quick brown", "sol1": "fox jumps over", "sol2": "naïve lazy said stack", "label": 0},
    {"goal": "A block is", "sol1": "said cat 2", "sol2": "one residual branch", "label": 1},
    {"goal": "and the dog", "sol1": "sleeps on.", "sol2": "sleeps on", "label": 1},
    {"goal": "1 + 2", "sol1": "= 3,", "sol2": "quick quick quick", "label": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An include path with two tasks, a group of both, and the code that makes their data."""
    path = tmp_path_factory.mktemp("tasks")
    for name in ("local_little", "other"):
        (path / f"{name}.yaml").write_text(YAML.format(name=name))
    (path / "pair.yaml").write_text(GROUP)
    (path / "last_word.yaml").write_text(LAST_WORD)
    (path / "texts.yaml").write_text(TEXTS)
    code = "from datasets import Dataset, DatasetDict\n\n\ndef load(**_):\n"
    code += f"    return DatasetDict(validation=Dataset.from_list({ROWS!r}))\n"
    (path / "rows.py").write_text(code)
    return path


@pytest.fixture(scope="module")
def harness(folder):
    return Harness(folder)


@pytest.fixture(scope="module")
def opened(checkpoint) -> tuple[Any, Any]:
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def run(harness, opened):
    def call(name="little", limit=None, batch=1, metric="acc"):
        task = Task(name, 0, metric)
        return harness.run(*opened, task, contestant="planted", computation="x", limit=limit, batch=batch)

    return call


@pytest.fixture(scope="module")
def by_the_harness(folder, checkpoint):
    """The harness by itself, on the folder of the model, as its own command runs it."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluate: Any = evaluator.simple_evaluate
    return evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float32",
        device="cpu",
        batch_size=1,
        tasks=["local_little"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )


def test_our_numbers_are_those_of_the_harness(run, by_the_harness):
    ours, theirs = run(), by_the_harness["results"]["local_little"]
    assert set(ours.metrics) == {"acc", "acc_norm"}
    for name, estimate in ours.metrics.items():
        assert estimate.value == theirs[f"{name},none"]
        assert estimate.stderr == theirs[f"{name}_stderr,none"]
    samples = sorted(by_the_harness["samples"]["local_little"], key=lambda sample: sample["doc_id"])
    items = ours.items["local_little"]
    assert items.values["acc"] == tuple(sample["acc"] for sample in samples)
    assert items.docs == tuple(sample["doc_hash"][:16] for sample in samples)


def test_a_batch_and_a_limit_change_no_item(run):
    whole, batched, first = run(), run(batch=3), run(limit=2)
    assert batched.items == whole.items
    assert first.items["local_little"].docs == whole.items["local_little"].docs[:2]
    assert first.figure.n == 2


def test_a_group_is_the_items_of_its_tasks(run):
    found = run("pair")
    assert found.ran == "local_pair"
    assert found.figure.n == 2 * len(ROWS)
    assert len(found.column()) == 2 * len(ROWS)
    assert found.figure.value == pytest.approx(sum(found.column().values()) / len(found.column()))


def test_items_of_perplexities_go_the_way_of_their_metric_which_is_down(run):
    """Mean of the items = logarithm of the perplexity, or the bits per byte themselves; all of one sign."""
    last, texts = run("last_word", metric="perplexity"), run("texts")
    for found, metric in ((last, "perplexity"), (texts, "word_perplexity"), (texts, "byte_perplexity")):
        column = found.by(metric).column()
        assert sum(column.values()) / len(column) == pytest.approx(math.log(found.metrics[metric].value))
        assert min(column.values()) > 0
    column = texts.by("bits_per_byte").column()
    assert sum(column.values()) / len(column) == pytest.approx(texts.metrics["bits_per_byte"].value)
    assert last.higher_is_better == {"perplexity": False, "acc": True}
    assert texts.higher_is_better == dict.fromkeys(texts.metrics, False)
    assert run("pair").higher_is_better == {"acc": True}


def test_nothing_of_the_harness_reaches_stdout(run, capfd):
    run(limit=1)
    assert capfd.readouterr().out == ""


def test_a_task_is_looked_up_in_the_include_path_first_there_also_as_local(harness):
    assert harness.find("little")[0] == "local_little"
    assert harness.find("local_little")[0] == "local_little"
    assert harness.find("other")[0] == "other"


def test_unknown_tasks_and_folders_are_said(harness, folder, monkeypatch):
    monkeypatch.setitem(harness.__dict__, "_own", harness._added)  # all tasks of the harness take seconds to find
    with pytest.raises(InputError, match="has no task 'othr'") as said:
        harness.find("othr")
    assert "did you mean 'other'?" in said.value.fix
    with pytest.raises(InputError, match="is no folder"):
        Harness(folder / "nowhere")


def test_without_the_package_the_install_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MachineError) as said:
        Harness()
    assert said.value.fix == "pip install 'blockpruner[tasks]'"


def test_a_task_that_fails_is_named_with_the_reason(harness, opened, folder):
    broken = YAML.format(name="broken").replace("rows.load", "rows.missing")
    (folder / "broken.yaml").write_text(broken)
    task = Task("broken")
    with pytest.raises(MachineError, match="could not run the task broken"):
        Harness(folder).run(opened[0], opened[1], task, contestant="", computation="", limit=None, batch=1)


# Whether a task is still the same


def test_the_digest_of_task_files_changes_with_each_file_that_may_matter(tmp_path, monkeypatch):
    mine, common = tmp_path / "mine", tmp_path / "common_yaml"
    (mine / "__pycache__").mkdir(parents=True)
    files = {
        mine / "a.yaml": "include: ../common_yaml\nprocess: !function code.f\ndoc_to_text: ''",
        mine / "code.py": "f = len",
        common: "include: [deeper.yml]\ndataset_kwargs: {data_files: {test: rows.jsonl}}",
        tmp_path / "deeper.yml": "a: 1",
        tmp_path / "rows.jsonl": "{}",
    }
    unrelated = tmp_path / "unrelated.yaml", mine / "__pycache__" / "code.pyc", mine / ".hidden"
    for file in (*files, *unrelated):
        file.write_text(files.get(file, "x: 1"))
    seen = [digest_of(mine)]
    for file in files:
        file.write_text(file.read_text() + "\n# changed")
        seen.append(digest_of(mine))
    assert len(set(seen)) == len(seen)
    for file in unrelated:
        file.write_text("x: 2")
    monkeypatch.chdir(mine)
    assert digest_of(Path()) == seen[-1]
    (mine / "broken.yaml").write_text("a: [")
    assert digest_of(mine) != seen[-1]


def test_tasks_of_the_harness_are_defined_by_it_and_others_by_their_files(folder, monkeypatch):
    harness = Harness(folder)
    assert harness.definition("little") == digest_of(folder)
    assert Harness().definition("piqa") == OWN
    monkeypatch.setitem(harness.__dict__, "_own", type("Own", (), {"all_tasks": ["piqa"]}))
    assert harness.definition("piqa") == OWN


# Tables of results, made up


def result(contestant, column, task="t", metric="acc", higher_is_better: bool | None = True):
    values = tuple(map(float, column))
    items = Items(docs=tuple(f"doc {i}" for i in range(len(values))), values={metric: values})
    return TaskResult(
        contestant=contestant,
        task=task,
        ran=task,
        metric=metric,
        metrics={metric: Estimate.of(values, metric)},
        items={task: items},
        shots=0,
        limit=None,
        batch=1,
        harness="0",
        dtype="float32",
        computation="",
        higher_is_better={} if higher_is_better is None else {metric: higher_is_better},
    )


def test_each_contestant_stands_beside_the_reference_on_the_same_items(tmp_path):
    dense, pruned = [1] * 15 + [0] * 5, [1] * 3 + [0] * 17
    table = TaskTable.of(
        "dense",
        (result("dense", dense), result("dense", dense, "u"), result("pruned", pruned), result("pruned", dense, "u")),
    )
    found = table.comparisons["pruned"]
    assert found["t"].difference == pytest.approx(-0.6)
    assert (found["t"].gained, found["t"].lost, found["t"].p) == (0, 12, pytest.approx(2**-11))
    assert found["t"].adjusted == pytest.approx(2**-10)
    assert found["u"].p == 1
    table.save(tmp_path / "tasks.json")
    assert TaskTable.load(tmp_path / "tasks.json") == table


@pytest.mark.parametrize(("higher_is_better", "word"), [(True, "better"), (False, "worse"), (None, "different")])
def test_what_is_better_is_as_the_harness_says_of_the_metric(capsys, higher_is_better, word):
    low = [0.1 * (i % 3) for i in range(30)]
    high = [value + 1 + 0.1 * (i % 2) for i, value in enumerate(low)]
    asked = ("t", "word_perplexity", higher_is_better)
    table = TaskTable.of("dense", (result("dense", low, *asked), result("pruned", high, *asked)))
    found = table.comparisons["pruned"]["t"]
    assert found.difference > 0
    assert found.low > 0
    assert (found.gained, found.lost) == ((0, 30) if word == "worse" else (30, 0))
    assert TaskTable.from_value(table.model_dump(mode="json"), "here") == table
    print_tasks(table)
    assert f"pruned: {word} at t." in capsys.readouterr().out


def test_metrics_of_both_directions_have_no_mean(capsys):
    column = [1.0, 0.0]
    for direction, shown in ((True, True), (False, False)):
        print_tasks(TaskTable.of("a", (result("a", column), result("a", column, "u", "bits_per_byte", direction))))
        assert ("mean" in capsys.readouterr().out) == shown


def test_other_items_are_not_compared_and_metrics_without_items_are_passed_over():
    with pytest.raises(CheckFailedError, match="did not have the same items of t"):
        TaskTable.of("dense", (result("dense", [1, 0]), result("pruned", [1, 0, 1])))
    bare = result("pruned", [1, 0]).model_copy(update={"items": {}})
    assert TaskTable.of("dense", (result("dense", [1, 0]), bare)).comparisons == {"pruned": {}}


# Suites


def test_the_suites_of_the_papers_have_their_tasks_shots_and_metrics():
    shape = {name: {(t.name, t.shots, t.metric) for t in SUITES[name].tasks} for name in SUITES}
    assert shape["blockpruner"] == {
        *((name, 0, "acc_norm") for name in ("piqa", "hellaswag", "arc_easy", "arc_challenge")),
        ("winogrande", 0, "acc"),
    }
    assert {name for name, _, _ in shape["shortened-llama"]} == {
        *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    }
    assert shape["mmlu"] == {("mmlu", 5, "acc")}
    plain = dict.fromkeys(("boolq", "rte", "openbookqa", "piqa"), 0)
    shots = {name: shots for name, shots, _ in shape["llm-drop"]}
    assert shots == {**plain, "mmlu": 5, "winogrande": 5, "hellaswag": 10, "arc_challenge": 25}


def test_words_become_tasks_once_each_and_numbers_override_the_suite():
    tasks, limit = chosen_tasks("quick", "boolq, piqa", None, None)
    assert [task.name for task in tasks] == ["boolq", "piqa", "arc_easy"]
    assert limit == 100
    tasks, limit = chosen_tasks("quick", None, 3, 7)
    assert {task.shots for task in tasks} == {3}
    assert limit == 7
    assert chosen_tasks(None, None, None, None) == ((), None)
    for words in (("quik", None, None, None), ("quick", None, -1, None), ("quick", None, None, 0)):
        with pytest.raises(InputError):
            chosen_tasks(*words)


def test_names_in_the_installed_harness_are_those_of_the_suites():
    """By file, since its index takes seconds to build."""
    import lm_eval.tasks

    (place,) = lm_eval.tasks.__path__
    names = {task.name for suite in SUITES.values() for task in suite.tasks}
    files = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "mmlu": "mmlu/default/_mmlu"}
    files |= {"winogrande": "winogrande/default", "boolq": "super_glue/boolq/default", "rte": "glue/rte/default"}
    for name in names:
        text = Path(place, files.get(name, f"{name}/{name}") + ".yaml").read_text(encoding="utf-8")
        assert f"{name}\n" in text, name
