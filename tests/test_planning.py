"""From a checkpoint to a plan: the right removals, resumed to the same bytes, for the price that was said."""

import copy
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from blockpruner import planning
from blockpruner.blocks import Block
from blockpruner.errors import InputError, RunFolderError
from blockpruner.evaluation.costing import bound
from blockpruner.evaluation.quality import load_text
from blockpruner.loading.models import load
from blockpruner.plan import Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.price import quote
from blockpruner.searches import SEARCHES
from blockpruner.searching.contract import Stop
from blockpruner.searching.costs import parse_card
from blockpruner.searching.targets import Goals, parse_target
from blockpruner.subject import open_subject, subject_of

SEARCH = {"target": "blocks=3", "tokens": 96, "window": 16}


@pytest.fixture(scope="module")
def subject(checkpoint):
    return open_subject(load(str(checkpoint), dtype="float32", device="cpu"))


@pytest.fixture
def task(subject, prose):
    """Makes searches on the tiny model, which differ from the usual one in what is given."""

    def make(**options):
        given = {"calibration": str(prose), **SEARCH, **options}
        return prepare(given.pop("subject", subject), **given)

    return make


def names(plan):
    return [name for step in plan.steps for name in step.remove]


def zeroed_loss(model, removed, windows):
    """Mean next-token loss of a copy of `model` whose removed blocks add zeros to the stream."""
    model = copy.deepcopy(model)
    for block in removed:
        layer = model.model.layers[block.layer]
        projection = layer.self_attn.o_proj if block.kind == "attention" else layer.mlp.down_proj
        torch.nn.init.zeros_(projection.weight)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_a_search_removes_what_a_plain_greedy_loop_removes_a_useless_block_first(task, subject):
    job = task()
    candidates = [Block(kind, layer) for kind in ("attention", "mlp") for layer in range(4)]
    removed, losses = [], []
    for _ in range(3):
        tried = {
            block: zeroed_loss(subject.model, [*removed, block], job.data.examples.inputs["input_ids"])
            for block in candidates
            if block not in removed
        }
        removed.append(min(tried, key=tried.__getitem__))
        losses.append(min(tried.values()))
    plan: Any = find_plan(job)
    assert names(plan) == [str(block) for block in removed]
    assert names(plan)[0] == "attention.2"
    assert [step.loss.value for step in plan.steps] == pytest.approx(losses, abs=1e-5)
    assert plan.steps[0].loss == plan.dense_loss
    assert plan.stop_reason == Stop.TARGET


def test_a_plan_says_of_what_and_how_it_was_made(task, subject, prose):
    plan: Any = find_plan(task(search="random:seed=3", moves="mlp", protect="-1", target="blocks=2", seed=5))
    assert plan.model == subject.identity
    assert plan.model.name == "planted"
    assert plan.calibration["source"] == prose.name
    assert (plan.calibration["windows"], plan.calibration["window"], plan.calibration["bos"]) == (6, 16, "window")
    assert plan.method.model_dump() == {
        "search": "random:seed=3",
        "criterion": None,
        "objective": "loss",
        "moves": "mlp",
        "target": "blocks=2",
        "protected": ("3",),
        "seed": 5,
        "dtype": "float32",
        "recovery": None,
        "windows": None,
    }
    assert not {"mlp.3", *(f"attention.{layer}" for layer in range(4))} & set(names(plan))


@pytest.mark.parametrize(
    "options", [{"target": "blocks=1"}, {"search": "random"}, {"moves": "layer", "target": "layers=1"}]
)
def test_where_the_masks_are_known_in_advance_the_price_is_what_is_paid(task, options):
    job = task(**options)
    price, plan = quote(job), find_plan(job)
    assert (price.evaluations, price.work) == (plan.evaluations, plan.work)
    assert price.seconds > 0


def test_elsewhere_the_price_is_near_what_is_paid(task):
    job = task()
    price = quote(job)
    plan: Any = find_plan(job)
    assert price.evaluations == plan.evaluations
    for kind, paid in plan.work.model_dump().items():
        assert getattr(price.work, kind) == pytest.approx(paid, rel=0.15)


@pytest.mark.parametrize(
    ("search", "window"),
    [("greedy", 32), ("beam:width=2,race=true", 32), ("beam:width=2", 64), ("exhaustive", 64), ("one-shot", 64)],
)
def test_races_take_shorter_windows_than_other_searches_unless_they_are_told(task, monkeypatch, caplog, search, window):
    monkeypatch.setattr(planning, "WINDOW", 32)
    assert task(search=search, window=None, tokens=256).data.record.window == window
    assert not caplog.records
    assert task(search=search, window=48).data.record.window == 48
    warned = ["with windows of 48 they err more" in record.getMessage() for record in caplog.records]
    assert warned == [True] * (window == 32)


@pytest.mark.parametrize(
    ("options", "said", "instead"),
    [
        (
            {"criterion": "fisher"},
            "--search greedy makes no use of --criterion",
            "one-shot, iterative, span or knapsack",
        ),
        (
            {"search": "beam:width=2", "criterion": "cosine"},
            "--search beam:width=2 makes no use of --criterion",
            "span",
        ),
        ({"device_spec": "a100"}, "blocks=3 makes no use of --device-spec", "speed=1.3x:decode"),
        ({"target": "blocks=1,loss=+0.1", "device_spec": "a100"}, "makes no use of --device-spec", "speed="),
    ],
)
def test_an_option_that_would_make_no_difference_is_refused_with_what_would_use_it(task, options, said, instead):
    with pytest.raises(InputError) as error:
        task(**options)
    assert said in error.value.what
    assert instead in error.value.fix


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_starts_from_an_earlier_plan_or_refuses_one(task, name):
    start = find_plan(task(target="blocks=2", search="random"))
    few = ":initial=2,offspring=2,generations=1" if name == "evolution" else ""
    options = {"search": name + few, "start": start, "target": "blocks=2", "moves": "block"}
    if not SEARCHES[name].starts:
        with pytest.raises(InputError, match="makes no use of --from") as error:
            task(**options)
        assert "one-shot, iterative or swap" in error.value.fix
        return
    if name == "swap":  # which goes on from it
        options["search"] = "swap:gain=99"
    assert set(names(find_plan(task(**options)))) == set(names(start))


@pytest.mark.parametrize("target", ["memory=120KiB,context=32", "blocks=3,memory=150KiB,context=32", "speed=1.2x"])
def test_memory_is_that_of_the_dtype_in_the_files_whatever_the_model_is_loaded_in(
    target, subject, checkpoint, prose, tmp_path
):
    copy.deepcopy(subject.model).bfloat16().save_pretrained(tmp_path / "half")
    subject.tokenizer.save_pretrained(tmp_path / "half")
    found = []
    for dtype in ("float32", "stored"):
        loaded = open_subject(load(str(tmp_path / "half"), dtype=dtype, device="cpu"))
        assert loaded.stored == torch.bfloat16
        goal = bound(parse_target(target), loaded, card=parse_card("a100"))
        assert isinstance(goal, Goals)
        found.append(goal.costs)
    assert found[0] == found[1]
    assert all("bfloat16, as in the files" in one.source for one in found[0].values() if one.unit == "bytes")


def test_without_a_run_folder_nothing_is_written_and_with_one_a_journal_and_the_plan(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan: Any = find_plan(task())
    assert not list(tmp_path.iterdir())
    assert find_plan(task(), tmp_path / "run") == plan
    assert Plan.load(tmp_path / "run" / "plan.json") == plan
    journal = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + plan.evaluations


def test_a_deeper_search_goes_on_from_the_same_journal(task, tmp_path):
    find_plan(task(), tmp_path / "run")
    told = []
    deeper = find_plan(task(target="blocks=4"), tmp_path / "run", lambda *call: told.append(call))
    assert deeper == find_plan(task(target="blocks=4"))
    assert len(told) == 1 + 5  # the first call, and the five masks of the fourth step


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"tokens": 112}, r"calibration: prose.txt, 6 x 16 tokens, BOS window, \w+ -> prose.txt, 7 x 16 tokens"),
        ({"bos": "none"}, r"calibration: .* BOS window, .* -> .* BOS none, "),
        ({"moves": "mlp"}, "moves: block -> mlp"),
        ({"protect": "0,-1"}, "protected:  -> 0,3"),
        ({"search": "random"}, "search: greedy:epsilon=0.003,delta=0.05,seed=0,growth=1.25 -> random:seed=0"),
    ],
)
def test_a_run_folder_is_not_taken_for_another_search_and_says_what_differs(task, tmp_path, options, field):
    find_plan(task(target="blocks=1"), tmp_path)
    with pytest.raises(RunFolderError, match=field):
        find_plan(task(target="blocks=1", **options), tmp_path)


def test_other_text_and_another_dtype_or_model_are_not_resumed_either(task, subject, checkpoint, tmp_path):
    find_plan(task(target="blocks=1"), tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("A block is one residual branch of a layer. " * 50)
    with pytest.raises(RunFolderError, match=r"calibration: prose.txt.* -> other.txt"):
        find_plan(task(target="blocks=1", calibration=str(other)), tmp_path / "run")
    half = open_subject(load(str(checkpoint), dtype="bfloat16", device="cpu"))
    with pytest.raises(RunFolderError, match="dtype: float32 -> bfloat16"):
        find_plan(task(target="blocks=1", subject=half), tmp_path / "run")
    half.model.float().model.layers[0].mlp.down_proj.weight.zero_()
    changed = subject_of(half.model, half.tokenizer, "planted")
    with pytest.raises(RunFolderError, match=r"model: \w+ -> \w+"):
        find_plan(task(target="blocks=1", subject=changed), tmp_path / "run")
    half.model.config.rms_norm_eps = 0.1
    find_plan(task(target="blocks=1", subject=changed), tmp_path / "other")
    half.model.config.rms_norm_eps = 0.2
    with pytest.raises(RunFolderError, match=r"computation: \w+ -> \w+"):
        find_plan(task(target="blocks=1", subject=changed), tmp_path / "other")


def test_a_run_folder_in_the_source_is_refused(task, subject):
    with pytest.raises(InputError, match="lies in the source model"):
        find_plan(task(target="blocks=1"), subject.folder / "run")
    assert not (subject.folder / "run").exists()


def test_a_budget_ends_the_search_with_the_steps_it_could_pay_for(task):
    plan = find_plan(task(target="blocks=3"), budget=1 + 8 + 7)
    assert (len(plan.steps), plan.evaluations) == (2, 16)


def test_only_text_needs_a_tokenizer(subject, prose):
    bare = subject_of(subject.model, None, "bare")
    assert bare.anatomy.outline == subject.anatomy.outline
    with pytest.raises(InputError, match="bare has no tokenizer"):
        prepare(bare, calibration=str(prose), **SEARCH)
    with pytest.raises(InputError, match="bare has no tokenizer"):
        load_text(str(prose), bare.tokenizer, bare.model)


DYING = """
import os, sys
from blockpruner import cli, journal
real, moments = journal.Journal.append, iter(range(10**6))
signals = dict(zip(sys.argv[1].split(","), sys.argv[2].split(",")))
def append(self, records):
    real(self, records)
    number = signals.get(str(next(moments)))
    if number:
        os.kill(os.getpid(), int(number))
journal.Journal.append = append
sys.argv[1:] = sys.argv[3:]
cli.main()
"""


@pytest.fixture
def command(checkpoint, prose):
    """The same search as a command in a process of its own, which sends itself signals after so many evaluations."""

    def run(folder, signals, before=None, **more):
        options = {"--calibration": prose, "--run": folder, "--dtype": "float32", "--device": "cpu"}
        options |= {f"--{name}": value for name, value in {**SEARCH, **more}.items()}
        words = ["search", checkpoint, *(word for option in options.items() for word in option)]
        moments = (",".join(map(str, part)) for part in (signals, map(int, signals.values())))
        return subprocess.run(
            [sys.executable, "-c", DYING, *moments, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            preexec_fn=before,
        )

    return run


def test_killed_at_any_evaluation_a_search_resumes_to_the_same_bytes(task, command, tmp_path):
    find_plan(task(), tmp_path / "whole")
    assert command(tmp_path / "killed", {5: signal.SIGKILL}).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "plan.json").exists()
    assert len((tmp_path / "killed" / "journal.jsonl").read_text().splitlines()) == 1 + 6
    told = []
    find_plan(task(), tmp_path / "killed", lambda done, *_: told.append(done))
    assert told == [6, *range(7, 1 + 8 + 7 + 6 + 1)]  # so that the speed is that of this session alone
    for name in ("plan.json", "journal.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_search_leaves_a_usable_plan_and_says_how_to_go_on(task, command, subject, tmp_path):
    done = command(tmp_path / "run", {12: signal.SIGINT})
    assert done.returncode == 130
    last = done.stderr.splitlines()[-1]
    assert last.startswith("resume with: blockpruner search ")
    assert str(tmp_path / "run") in last
    assert "Traceback" not in done.stderr
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.stop_reason == Stop.INTERRUPTED
    assert names(plan) == ["attention.2"]
    plan.check(subject.anatomy.outline, subject.identity, "plan.json")
    assert find_plan(task(), tmp_path / "run") == find_plan(task())


def test_a_search_that_decides_only_at_its_end_leaves_the_best_that_it_has_found_too(task, command, subject, tmp_path):
    assert command(tmp_path / "run", {18: signal.SIGINT}, search="swap").returncode == 130
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.stop_reason == Stop.INTERRUPTED
    plan.check(subject.anatomy.outline, subject.identity, "plan.json")
    whole = find_plan(task(search="swap"))
    assert (len(plan.steps), plan.nested) == (len(whole.steps), False)
    assert find_plan(task(search="swap"), tmp_path / "run") == whole


def test_other_signals_stop_a_search_too_unless_they_are_ignored(command, tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = command(tmp_path / "run", {2: signal.SIGHUP, 10: signal.SIGTERM}, before=nohup)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1].startswith("resume with: ")
    assert len((tmp_path / "run" / "journal.jsonl").read_text().splitlines()) == 1 + 11
