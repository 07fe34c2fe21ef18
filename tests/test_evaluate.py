"""Several models side by side: protocols, run folders that resume, the command line and Python."""

import contextlib
import functools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import test_tasks
import torch

import blockpruner as bp
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.evaluation import assess as assess_module
from blockpruner.evaluation import generation
from blockpruner.evaluation.assess import assess
from blockpruner.evaluation.assessment import Contestant, Wanted
from blockpruner.evaluation.protocols import PROTOCOLS, perplexity, protocol_of
from blockpruner.evaluation.quality import Evaluation, evaluate_masks
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.task_table import TaskTable
from blockpruner.evaluation.verdict import GenerationCheck
from blockpruner.loading.models import load
from blockpruner.texts.calibration import load_calibration

TEXT: Any = {"tokens": 192, "window": 16}
MASKS = {"dense": "dense", "useless": "attention.2", "gutted": "attention.0+attention.1+attention.3+mlp.1+mlp.2"}
FLOAT32 = ("--dtype", "float32", "--device", "cpu")
folder = test_tasks.folder  # task files, as a fixture


@pytest.fixture(scope="module")
def opened(checkpoint):
    loaded: Any = load(str(checkpoint), dtype="float32", device="cpu")
    return Contestant(loaded.model, loaded.tokenizer, read_anatomy(loaded.model))


@pytest.fixture
def opener(opened, monkeypatch):
    """Opens contestants by the names in MASKS, and counts how often; everything computed is counted too.

    They write and answer little, to save time.
    """
    few, questions = functools.partial(generation.written_by, tokens=6), generation.questions
    monkeypatch.setattr(assess_module, "written_by", few)
    monkeypatch.setattr(generation, "questions", lambda probe, seed: questions(probe, seed, count=2))
    counts = {"opened": [], "text": [], "tasks": [], "written": [], "read": []}

    def counted(kind, function, name_of):
        def call(*arguments, **options):
            counts[kind].append(name_of(*arguments, **options))
            return function(*arguments, **options)

        return call

    for kind, function, name_of in (
        ("text", "evaluate_masks", lambda m, a, d, masks, **_: next(iter(masks))),
        ("written", "written_by", lambda *_, name, **__: name),
        ("read", "read_by", lambda m, t, p, written: written.name),
    ):
        monkeypatch.setattr(assess_module, function, counted(kind, getattr(assess_module, function), name_of))
    run = assess_module.Harness.run
    monkeypatch.setattr(assess_module.Harness, "run", counted("tasks", run, lambda *_, contestant, **__: contestant))

    @contextlib.contextmanager
    def open_(name):
        counts["opened"].append(name)
        yield Contestant(opened.model, opened.tokenizer, opened.anatomy, parse_mask(MASKS[name]))

    return open_, counts


@pytest.fixture
def wanted(prose, folder):
    return Wanted(
        data=str(prose), text=TEXT, tasks=(Task("little", 0, "acc"),), include_path=folder, generate=True, limit=3
    )


# Protocols


def test_the_protocols_of_the_papers_are_theirs():
    assert {name: (p.window, p.bos, p.mean) for name, p in PROTOCOLS.items()} == {
        "blockpruner": (2048, "stream", "losses"),
        "shortened-llama": (128, "stream", "losses"),
        "shortened-llama-bos": (129, "window", "losses"),
        "deeper-look": (2048, "stream", "perplexities"),
        "evopress": (8192, "none", "losses"),
    }
    assert all(protocol.source and protocol.text for protocol in PROTOCOLS.values())


def test_a_mean_of_perplexities_is_not_the_perplexity_of_the_mean():
    losses = [1.0, 2.0, 4.0]
    each = [math.exp(loss) for loss in losses]
    found = perplexity(losses, "perplexities")
    assert found.value == pytest.approx(statistics.mean(each))
    assert found.stderr == pytest.approx(statistics.stdev(each) / math.sqrt(3))
    usual = perplexity(losses, "losses")
    assert usual.value == pytest.approx(math.exp(7 / 3))
    assert usual.value < found.value
    assert usual.stderr == pytest.approx(usual.value * statistics.stdev(losses) / math.sqrt(3))


def test_a_protocol_sets_window_and_bos_and_lets_the_bos_be_named_on_purpose():
    protocol = protocol_of("shortened-llama")
    assert protocol.applied("shortened-llama", {"tokens": 9}) == {"tokens": 9, "window": 128, "bos": "stream"}
    assert protocol.applied("shortened-llama", {"bos": "window", "window": 128}) == {"bos": "window", "window": 128}
    with pytest.raises(InputError, match="has windows of 128 tokens, and 64 were asked for"):
        protocol.applied("shortened-llama", {"window": 64})
    with pytest.raises(InputError, match="not a known protocol"):
        protocol_of("blockprunner")


def test_an_evaluation_under_a_protocol_is_what_its_windows_say(opened, prose):
    """Shortened LLaMA's definition written out: one BOS, windows of 128, the mean over all predicted tokens."""
    options = Wanted(data=str(prose), text={"tokens": 1024, "bos": "auto"}, protocol="shortened-llama", seed=0)
    model = type(opened.model)(
        opened.model.config.__class__.from_dict({**opened.model.config.to_dict(), "max_position_embeddings": 256})
    )
    model.load_state_dict(opened.model.state_dict())
    one = Contestant(model.eval(), opened.tokenizer, read_anatomy(model))
    windows = options.windows(one)
    assert windows is not None
    text = prose.read_text(encoding="utf-8")
    ids = [0, *opened.tokenizer(text, add_special_tokens=False)["input_ids"]][: 8 * 128]
    assert windows.windows.flatten().tolist() == ids
    (found,) = evaluate_masks(model, one.anatomy, windows, {"x": frozenset()}, mean=options.mean)
    with torch.no_grad():
        scores = model(windows.windows).logits.double().log_softmax(-1)[:, :-1]
    losses = -scores.gather(2, windows.windows[:, 1:, None])
    assert found.perplexity.value == pytest.approx(float(losses.mean().exp()), rel=1e-5)


# Assessing


def test_contestants_are_opened_one_by_one_and_the_reference_once_more_to_read(opener, wanted, tmp_path):
    open_, counts = opener
    found: Any = assess(list(MASKS), open_, wanted, run=tmp_path)
    assert counts["opened"] == [*MASKS, "dense"]
    assert counts["text"] == counts["tasks"] == counts["written"] == list(MASKS)
    assert counts["read"] == list(MASKS)
    assert found.evaluation == Evaluation.load(tmp_path / "evaluation.json")
    assert found.tasks == TaskTable.load(tmp_path / "tasks.json")
    assert found.generation == GenerationCheck.load(tmp_path / "generation.json")
    assert [quality.removed for quality in found.contestants] == list(MASKS.values())
    dense, useless, gutted = found.generation.judgements
    assert (dense.verdict, useless.verdict) == ("reference", "ok")
    assert gutted.verdict != "ok"
    assert set(found.tasks.comparisons) == {"useless", "gutted"}
    assert found.tasks.comparisons["useless"]["little"].difference == 0


def test_what_is_in_the_run_folder_is_not_computed_again(opener, wanted, tmp_path):
    open_, counts = opener
    whole = assess(list(MASKS), open_, wanted, run=tmp_path)
    for names in counts.values():
        names.clear()
    assert assess(list(MASKS), open_, wanted, run=tmp_path) == whole
    assert counts == {"opened": list(MASKS), "text": [], "tasks": [], "written": [], "read": []}


@pytest.mark.parametrize("stage", ["text", "tasks", "written", "read"])
def test_a_killed_assessment_goes_on_where_it_was(opener, wanted, tmp_path, stage, monkeypatch):
    open_, counts = opener
    whole = assess(list(MASKS), open_, wanted)
    for names in counts.values():
        names.clear()

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        place = (
            (assess_module.Harness, "run")
            if stage == "tasks"
            else (
                assess_module,
                {"text": "evaluate_masks", "written": "written_by", "read": "read_by"}[stage],
            )
        )
        good, calls = getattr(*place), []

        def second_time(*arguments, **options):
            calls.append(1)
            return (good if len(calls) == 1 else killed)(*arguments, **options)

        broken.setattr(*place, second_time)
        with pytest.raises(KeyboardInterrupt):
            assess(list(MASKS), open_, wanted, run=tmp_path)
    before = {kind: list(names) for kind, names in counts.items()}
    assert assess(list(MASKS), open_, wanted, run=tmp_path) == whole
    after = {kind: names[len(before[kind]) :] for kind, names in counts.items()}
    assert "dense" not in after["text"] + after["tasks"] + after["written"] + after["read"]
    assert [*before[stage], *after[stage]] == list(MASKS)


def test_other_settings_are_other_questions(opener, wanted, tmp_path):
    open_, counts = opener
    assess(["dense"], open_, wanted, run=tmp_path)
    other = Wanted(**{**vars(wanted), "limit": 2, "text": {**TEXT, "tokens": 96}})
    found: Any = assess(["dense"], open_, other, run=tmp_path)
    assert counts["text"] == counts["tasks"] == ["dense", "dense"]
    assert found.evaluation.data.tokens == 96
    assert found.tasks.results[0].figure.n == 2


def test_a_task_whose_files_changed_is_another_question(opener, wanted, tmp_path):
    open_, counts = opener
    files, run = tmp_path / "files", tmp_path / "run"
    shutil.copytree(wanted.include_path, files)
    task = files / "local_little.yaml"
    asked = Wanted(tasks=wanted.tasks, include_path=files, limit=3)
    first: Any = assess(["dense"], open_, asked, run=run)
    again: Any = assess(["dense"], open_, asked, run=run)
    assert (counts["tasks"], again) == (["dense"], first)
    task.write_text(task.read_text().replace("doc_to_target: label", "doc_to_target: '{{1 - label}}'"))
    other: Any = assess(["dense"], open_, asked, run=run)
    assert counts["tasks"] == ["dense", "dense"]
    assert other.tasks.results[0].figure.value == pytest.approx(1 - first.tasks.results[0].figure.value)


def test_what_cannot_be_found_out_is_said_before_a_model_is_opened(prose, folder):
    def never(name):
        raise AssertionError(name)

    cases = {
        "nothing to evaluate on": Wanted(),
        "--generate needs a text": Wanted(tasks=(Task("little"),), generate=True),
        "--protocol needs a text": Wanted(tasks=(Task("little"),), protocol="blockpruner"),
        "not a known protocol": Wanted(data="x", protocol="none"),
        "is no folder with task files": Wanted(tasks=(Task("little"),), include_path=folder / "none"),
    }
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            assess(["a"], never, wrong)
    with pytest.raises(InputError, match="named twice"):
        assess(["a", "a"], never, Wanted(data=str(prose)))


# Python and the command line


def test_python_writes_nothing_into_the_folder_of_the_model(opened, prose):
    folder = Path(opened.model.config.name_or_path)
    with pytest.raises(InputError, match="lies in the source model"):
        bp.evaluate(opened.model, opened.tokenizer, data=str(prose), run=folder / "out", **TEXT)
    assert not (folder / "out").exists()


def test_python_finds_the_same_for_masks_in_memory(opened, prose, folder, tmp_path):
    masks = {name: parse_mask(text) for name, text in MASKS.items() if name != "dense"}
    found = bp.evaluate(
        opened.model,
        opened.tokenizer,
        data=str(prose),
        masks=masks,
        tasks="little",
        include_path=folder,
        limit=3,
        generate=True,
        run=tmp_path,
        **TEXT,
    )
    assert [quality.name for quality in found.contestants] == ["model", *masks]
    assert found.tasks is not None
    assert found.generation is not None
    assert found.tasks.reference == found.generation.reference == "model"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "evaluation.json", "tasks.json", "generation.json"}
    windows = load_calibration(str(prose), opened.tokenizer, window=16, tokens=192)
    plain = evaluate_masks(opened.model, opened.anatomy, windows, {"gutted": masks["gutted"]})[0]
    assert found.contestants[2].loss == plain.loss


def test_the_command_prints_tables_verdicts_and_resumes(run, checkpoint, prose, folder):
    cut = Path("cut")
    loaded: Any = bp.load(str(checkpoint), dtype="float32", device="cpu")
    pruned = bp.prune_(loaded.model, parse_mask(MASKS["gutted"]))
    pruned.save_pretrained(cut)
    loaded.tokenizer.save_pretrained(cut)
    words = ("evaluate", cut, checkpoint, "--reference", checkpoint, "--data", prose, "--tokens", 192, "--window", 16)
    words += (*FLOAT32, "--tasks", "little,other", "--include-path", folder, "--generate", "--prompt", "", "--run", "r")
    done = run(*words)
    assert done.code == 0, done.err
    assert "cut beside" in done.out
    assert "local_little" in done.out
    assert "Greedy continuations of 8 prompts" in done.out
    assert "cut: worse: " in done.out or "cut: collapsed: " in done.out
    again = run(*words, "--json")
    assert again.code == 0, again.err
    value = json.loads(again.out)
    assert value["contestants"][0]["name"] == str(checkpoint), "the reference stands first"
    assert value["tasks"] == json.loads(Path("r/tasks.json").read_text())
    assert value["generation"] == json.loads(Path("r/generation.json").read_text())


def test_tasks_alone_need_no_text_and_a_protocol_is_named_in_the_table(run, checkpoint, folder, prose):
    done = run("evaluate", checkpoint, "--tasks", "little", "--include-path", folder, *FLOAT32, "--json")
    assert json.loads(done.out).keys() == {"tasks"}
    done = run("evaluate", checkpoint, "--data", prose, "--protocol", "shortened-llama", *FLOAT32)
    assert done.code == 2
    assert "128" in done.err, "the tiny model cannot read so far"
    assert run("evaluate", checkpoint).code == 2
