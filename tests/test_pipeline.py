"""`blockpruner run`: stopped and begun again, for other targets too, all that it leaves is of one plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockpruner.blocks import Mask, parse_mask
from blockpruner.contestants import at_random
from blockpruner.evaluation import costing
from blockpruner.journal import Journal
from blockpruner.loading.models import load
from blockpruner.outcome import Outcome
from blockpruner.plan import Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.price import Price
from blockpruner.searching.contract import DENSE, Stop
from blockpruner.searching.costs import Costs
from blockpruner.searching.rehearsal import Rehearsal
from blockpruner.subject import open_subject
from blockpruner.surgery import checkpoint as checkpoints

DYING = """
import itertools, os, signal, sys
from blockpruner import cli, journal
real, moments, deadly = journal.Journal.append, itertools.count(), int(sys.argv.pop(1))
def append(self, records):
    real(self, records)
    if next(moments) == deadly:
        os.kill(os.getpid(), signal.SIGINT)
journal.Journal.append = append
cli.main()
"""


@pytest.fixture
def words(checkpoint, prose, tmp_path):
    """Makes the command that runs a small recipe in a folder."""
    text = f'source = "{prose}"\ntokens = 96\nwindow = 16\n'
    recipe = tmp_path / "own.toml"
    recipe.write_text(f'title = "Own"\npaper = "none"\ntarget = "blocks=2"\n[calibration]\n{text}[evaluation]\n{text}')

    def make(folder, *more):
        given = [recipe, "--model", checkpoint, "--run", folder, "--dtype", "float32", "--device", "cpu", *more]
        return ["run", *map(str, given)]

    return make


@pytest.fixture
def ran(run, words, monkeypatch):
    """Runs that command in this process; what it saves is not reloaded in a fresh one."""
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.0)
    return lambda *given: run(*words(*given))


@pytest.fixture
def task(checkpoint, prose):
    """Makes searches on the tiny model."""
    subject = open_subject(load(str(checkpoint), dtype="float32", device="cpu"))
    return lambda **how: prepare(subject, calibration=str(prose), tokens=96, window=16, **how)


def removed(folder: str) -> Mask:
    """What the plan, the outcome and the saved model of a run folder alike remove."""
    mask = Plan.load(Path(folder, "plan.json")).mask()
    contestant = Outcome.load(Path(folder, "outcome.json")).contestants["pruned"]
    saved = load_file(next(Path(folder, "model").glob("*.safetensors"))).values()
    assert parse_mask(contestant.removed) == Plan.load(Path(folder, "model", "plan.json")).mask() == mask
    assert contestant.parameters == sum(tensor.numel() for tensor in saved)
    return mask


def test_run_again_for_another_target_the_model_is_of_the_new_plan(ran):
    for number in (2, 4, 3):
        done = ran("own", "--target", f"blocks={number}")
        assert done.code == 0, done.err
        assert len(removed("own")) == number
    weights = next(Path("own", "model").glob("*.safetensors")).stat()
    assert ran("own", "--target", "blocks=3").code == 0
    assert next(Path("own", "model").glob("*.safetensors")).stat() == weights  # which is not made twice


def test_what_a_run_did_not_make_stays_where_the_model_should_be_and_the_run_says_so(ran):
    assert ran("own").code == 0
    model = Path("own", "model")
    notes = model / "notes.txt"
    for strange in (lambda: notes.write_text("mine"), lambda: (notes.unlink(), (model / "recipe.json").unlink())):
        strange()
        held = {path: path.read_bytes() for path in model.iterdir()}
        assert ran("own").code == 0  # it is of this plan still
        done = ran("own", "--target", "blocks=3")
        assert (done.code, done.out) == (5, "")
        assert "own/model is not the model of this plan" in done.err
        assert {path: path.read_bytes() for path in model.iterdir()} == held
    model.rename("elsewhere")
    model.symlink_to(Path("elsewhere").resolve())
    assert ran("own", "--target", "blocks=3").code == 5
    model.unlink()
    assert ran("own", "--target", "blocks=3").code == 0
    assert len(removed("own")) == 3


def test_ctrl_c_in_the_search_ends_a_run_before_it_measures_or_saves_and_the_same_command_goes_on(ran, words, tmp_path):
    assert ran("whole").code == 0
    command = words(tmp_path / "cut")
    done = subprocess.run(
        [sys.executable, "-c", DYING, "12", *command],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-2:] == ["interrupted", f"resume with: blockpruner {' '.join(command)}"]
    plan = Plan.load(tmp_path / "cut" / "plan.json")
    assert (plan.stop_reason, len(plan.steps)) == (Stop.INTERRUPTED, 1)
    assert not {"model", "outcome.json"} & {path.name for path in (tmp_path / "cut").iterdir()}
    assert ran(tmp_path / "cut").code == 0
    for name in ("journal.jsonl", "plan.json", "outcome.json", "model/plan.json"):
        assert (tmp_path / "cut" / name).read_bytes() == Path("whole", name).read_bytes()


def test_ctrl_c_while_a_search_is_only_rehearsed_is_passed_on(task, monkeypatch):
    job = task(target="blocks=2")
    plan = find_plan(job)
    real = Rehearsal.work

    def interrupted(self, masks, batch):
        if list(masks) == [DENSE]:
            return real(self, masks, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(Rehearsal, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ = job.rehearsed
    with pytest.raises(KeyboardInterrupt):
        at_random(job, plan)


@pytest.mark.parametrize(("moves", "each"), [("block", 1), ("layer", 2), ("stock", 2)])
@pytest.mark.parametrize("target", ["loss=+0.4", "blocks=4", "params=-25%"])
def test_at_random_as_much_is_removed_as_by_the_plan(task, moves, each, target):
    job = task(target=target, moves=moves)
    plan = find_plan(job)
    assert 0 < len(plan.mask()) < 8
    masks = at_random(job, plan).values()
    assert len(set(masks)) > 1
    for mask in masks:
        if target.startswith("params"):
            assert job.problem.reached(mask, 0)
        else:
            assert len(mask) == len(plan.mask()) == each * len(plan.steps)


def test_a_target_of_speed_goes_by_times_that_are_measured_once_in_a_run_folder(ran, monkeypatch):
    times = iter(range(1, 9))

    def measured(subject, *_):
        """Blocks that save the less, the later they are measured."""
        each = dict.fromkeys(subject.anatomy.outline.blocks, 1 / next(times))
        return Costs(8.0, each, {}, "seconds", f"{costing.MEASURED} cpu")

    monkeypatch.setattr(costing, "measured", measured)
    speed = ("--target", "speed=1.3x:decode")  # of 8 seconds 1.85 have to go
    real, left = Journal.append, iter(range(12))

    def append(self, records):
        real(self, records)
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", append)
        assert ran("own", *speed).code == 130
    costs = Path("own", "costs.json").read_bytes()
    assert ran("own", *speed).code == 0
    assert len(removed("own")) == 2
    assert Path("own", "costs.json").read_bytes() == costs
    assert next(times) == 2


def test_what_the_result_is_measured_on_is_read_before_the_search_and_can_be_named(ran, prose, caplog):
    found = ran("own", "--data-tokens", "10000000")
    assert found.code == 2
    assert "are less than" in found.err or "too short" in found.err, found.err
    assert not Path("own", "journal.jsonl").exists()
    assert ran("own", "--data", prose, "--data-tokens", "64", "--data-window", "8").code == 0
    assert (Outcome.load(Path("own/outcome.json")).data.tokens, Outcome.load(Path("own/outcome.json")).data.window) == (
        64,
        8,
    )


def test_windows_beyond_the_models_context_are_cut_to_it(ran, caplog):
    found = ran("own", "--data-tokens", "256", "--data-window", "2048")
    assert found.code == 0, found.err
    assert Outcome.load(Path("own/outcome.json")).data.window == 64
    assert "64 tokens, the model's context, instead of 2048" in found.err + caplog.text


def test_run_says_its_price_as_json_too_and_leaves_it_beside_what_was_spent(ran):
    done = ran("own", "--dry-run", "--json")
    assert done.code == 0, done.err
    price = Price.model_validate_json(done.out)
    assert price.evaluations == 1 + 8 + 7
    assert not Path("own").exists()
    done = ran("own", "--json")
    assert "spent: " in done.err
    assert json.loads(Path("own", "price.json").read_text())["said"]["evaluations"] == price.evaluations
    assert Outcome.model_validate_json(done.out) == Outcome.load(Path("own", "outcome.json"))
