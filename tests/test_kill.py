"""A search that is killed at any moment, and run again, ends in the same plan, byte for byte."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from toys import Toy, plan_of, tangled, toy_problem

from blockpruner.journal import Journal
from blockpruner.loading.models import load
from blockpruner.planning import Task, find_plan, prepare
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searching.driver import run
from blockpruner.subject import open_subject

IDENTITY = {"model": "toy"}


def search_and_save(folder: Path) -> Toy:
    """What a command does: search with a journal, save the plan."""
    toy, problem = Toy(tangled), toy_problem(4, "stock", "layers=2")
    with Journal.open(folder / "journal.jsonl", IDENTITY) as journal:
        result = run(Exhaustive(), problem, toy, journal=journal)
    plan_of(result, Exhaustive(), problem).save(folder / "plan.json")
    return toy


def kill_at(number: int) -> None:
    """Let this process die of SIGKILL in its durable system call `number`; a write dies half done."""
    calls = itertools.count()

    def deadly(name, real):
        def call(*args, **kwargs):
            if next(calls) == number:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace", "ftruncate"):
        setattr(os, name, deadly(name, getattr(os, name)))


def killed_at(folder: Path, number: int) -> bool:
    """Whether a child that works in `folder` was killed at its call `number`, and did not get to the end before."""
    child = os.fork()
    if not child:
        kill_at(number)
        search_and_save(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def survive_every_kill(folder: Path) -> int:
    """Kill a search in each of its durable calls in turn, and the run that resumes it in its third; return how many."""
    whole = search_and_save(folder)
    reference = (folder / "plan.json").read_bytes()
    for number in itertools.count():
        place = folder / str(number)
        place.mkdir()
        if not killed_at(place, number):
            return number
        assert not (place / "plan.json").exists() or (place / "plan.json").read_bytes() == reference
        killed_at(place, 2)
        with Journal.open(place / "journal.jsonl", IDENTITY) as journal:
            known = len(journal.records)
        resumed = search_and_save(place)
        assert (place / "plan.json").read_bytes() == reference
        assert known + len(resumed.asked) == len(whole.asked)
    raise AssertionError


def test_killed_in_any_system_call_that_keeps_results_it_resumes_to_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 15


def race(task: Task, folder: Path) -> bytes:
    """What `search` does with a real model; greedy, so that moves race."""
    find_plan(task, folder)
    return (folder / "plan.json").read_bytes()


def killed_when(size: float, task: Task, folder: Path) -> bool:
    """Whether a child that races in `folder` died as its journal had so many bytes, and had not ended by then."""
    child, journal = os.fork(), folder / "journal.jsonl"
    if not child:
        race(task, folder)
        os._exit(0)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if size <= (journal.stat().st_size if journal.exists() else 0):
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1] == signal.SIGKILL
        time.sleep(1e-4)
    assert ended[1] == 0
    return False


def survive_random_kills(folder: Path, checkpoint: str, prose: str, kills: int) -> int:
    """Kill races of a tiny model at random moments and resume each; return how many died with work in the journal."""
    torch.set_num_threads(1)  # threads do not live on in the child of a fork
    subject = open_subject(load(checkpoint, dtype="float32", device="cpu"))
    task = prepare(subject, target="blocks=4", calibration=prose, tokens=2048, window=64)
    reference = race(task, folder / "whole")
    whole = (folder / "whole" / "journal.jsonl").stat().st_size
    moments, with_work = random.Random(0), 0
    for number in range(kills):
        place = folder / str(number)
        while not killed_when(moments.uniform(0, whole), task, place):
            shutil.rmtree(place, ignore_errors=True)
        journal = place / "journal.jsonl"
        with_work += journal.exists() and journal.stat().st_size > 1000
        assert race(task, place) == reference
    return with_work


def test_races_killed_at_twenty_random_moments_are_resumed_to_the_same_plan(tmp_path, checkpoint, prose):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), str(checkpoint), str(prose), "20"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 15  # else they died before there was anything to lose


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.stdout.write(str(survive_every_kill(Path(sys.argv[1]))))
    else:
        place, model, text, kills = sys.argv[1:]
        sys.stdout.write(str(survive_random_kills(Path(place), model, text, int(kills))))
