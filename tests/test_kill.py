"""A search that is killed at any moment, and run again, ends in the same plan, byte for byte."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

from toys import Toy, plan_of, tangled, toy_problem

from blockpruner.driver import run
from blockpruner.journal import Journal
from blockpruner.searches.exhaustive import Exhaustive

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


if __name__ == "__main__":
    sys.stdout.write(str(survive_every_kill(Path(sys.argv[1]))))
