"""Many workers find what one process finds, bit for bit, whoever of them dies."""

import contextlib
import logging
import math
import os
import re
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blockpruner import cli, planning
from blockpruner.blocks import Block, Mask
from blockpruner.engine import cluster
from blockpruner.engine.hands import Crew, Hand
from blockpruner.engine.masktree import sweep_work
from blockpruner.engine.units import Unit, cut
from blockpruner.engine.workers import REPEATS, Workers, spread
from blockpruner.errors import CheckFailedError, InputError, MachineError
from blockpruner.loading.models import load
from blockpruner.planning import find_plan, prepare
from blockpruner.searching.contract import DENSE
from blockpruner.subject import open_subject

SEARCH = {"target": "blocks=3", "tokens": 2048, "window": 64, "search": "exhaustive"}


@pytest.fixture(scope="module")
def task(checkpoint, prose):
    """An exhaustive search on a tiny model, of two micro-batches."""
    subject = open_subject(load(str(checkpoint), dtype="float32", device="cpu"))
    return prepare(subject, calibration=str(prose), **SEARCH)


@pytest.fixture(scope="module")
def masks(task):
    return [DENSE, *(frozenset([block]) for block in task.subject.anatomy.outline.blocks)]


def found(objective, asked):
    return {(batch, mask): values for batch, mask, values in objective.losses(asked)}


# With real Ray: it is started once, and each of its workers loads a model, which takes seconds.


@pytest.fixture(scope="module")
def workers(task, checkpoint):
    """Two processes of a Ray of our own."""
    with spread(task.objective, Crew(2, str(checkpoint), dtype="float32")) as hired:
        yield hired


def test_two_workers_find_the_losses_of_one_process_bit_for_bit(workers, task, masks):
    for asked in ({0: [DENSE]}, {1: masks}, {0: masks, 1: masks[::-1]}, {1: masks[:2], 0: masks[3:]}):
        assert found(workers, asked) == found(task.objective, asked)


def test_our_own_ray_listens_on_this_machine_alone(workers):
    ray = sys.modules["ray"]
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}


def test_a_search_whose_worker_is_killed_ends_in_the_plan_of_one_process(workers, task, monkeypatch, caplog):
    monkeypatch.setattr(planning, "spread", lambda *_: contextlib.nullcontext(workers))
    seen, killed = [], []

    def kill_once(*report):
        seen.append(report)
        if len(seen) == 20:  # losses came in, so one of them at least has loaded; the other may be loading still
            worker = next(each for each in workers._all if "process" in each.where)
            killed.append(str(worker))
            os.kill(int(re.findall(r"process (\d+)", worker.where)[0]), signal.SIGKILL)

    with caplog.at_level(logging.WARNING, "blockpruner"):
        plan = find_plan(task, progress=kill_once)
    assert len(killed) == 1
    assert killed[0] in caplog.text
    assert "is replaced" in caplog.text
    monkeypatch.undo()
    assert plan == find_plan(task)


def test_an_error_in_a_worker_names_it_and_says_what_it_was(workers):
    list(workers.losses({0: [DENSE]}))  # now they are there
    worker = next(iter(workers._idle))
    workers._idle.remove(worker)
    workers._give(worker, Unit(99, (DENSE,)))
    with pytest.raises(RuntimeError, match=r"worker \d \(process \d+ on .*\): Traceback(.|\n)*IndexError"):
        workers._next(None)


# What workers do wrong, played by objects in this process.


class Died(Exception):
    """What Ray raises for a worker that is no more."""


class FakeRay:
    """Calls run when they are asked for; `fate(method, argument)` may raise Died first."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=())

    def __init__(self, fate=lambda *_: None):
        self.fate, self.killed = fate, 0

    def put(self, value):
        return value

    def remote(self, kind):
        def start():
            hand = kind()
            return SimpleNamespace(**{name: self._method(hand, name) for name in ("ready", "losses")})

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def _method(self, hand, name):
        def call(argument):
            return lambda: self.fate(name, argument) or getattr(hand, name)(argument)

        return SimpleNamespace(remote=call)

    def wait(self, calls, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        return call()

    def kill(self, _actor):
        self.killed += 1


@pytest.fixture
def played(task, checkpoint):
    """Makes workers in this process."""

    def make(ray, model=checkpoint, dtype="float32", threads=1):
        return Workers(task.objective, Crew(2, str(model), dtype=dtype), ray, threads)

    return make


def test_work_that_kills_its_workers_is_named_and_not_done_for_ever(played, masks):
    deaths = []

    def fate(method, argument):
        if method == "losses" and masks[3] in argument.masks:
            deaths.append(argument)
            raise Died("killed by signal 9")

    with pytest.raises(MachineError, match=r"micro-batch 1, \d+ masks .* killed by signal 9") as error:
        found(played(FakeRay(fate)), {1: masks})
    assert len(deaths) == 1 + REPEATS
    assert len(set(deaths)) == 1
    assert "--workers" in error.value.fix


def test_deaths_at_different_work_end_nothing(played, task, masks):
    alive = set()

    def fate(_method, argument):
        if repr(argument) not in alive:
            alive.add(repr(argument))
            raise Died("node lost")

    ray = FakeRay(fate)
    assert found(played(ray), {0: masks, 1: masks}) == found(task.objective, {0: masks, 1: masks})
    assert ray.killed > 2


def test_workers_that_die_while_they_load_end_in_an_error(played):
    def fate(method, _argument):
        raise Died("out of memory")

    with pytest.raises(MachineError, match=r"3 workers died in a row over loading the model.*out of memory"):
        found(played(FakeRay(fate)), {0: [DENSE]})


def test_an_error_of_ours_keeps_its_class_and_is_not_tried_again(played, tmp_path):
    ray = FakeRay()
    with pytest.raises(InputError, match=r"worker 1 \(still loading\): .*nowhere"):
        found(played(ray, model=tmp_path / "nowhere"), {0: [DENSE]})
    assert not ray.killed


def test_too_little_memory_in_a_worker_is_the_machines_fault(played, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Hand, "_ready", full)
    with pytest.raises(MachineError, match="not enough memory"):
        found(played(FakeRay()), {0: [DENSE]})


def test_a_worker_with_another_model_or_other_bits_is_refused(played):
    with pytest.raises(CheckFailedError, match=r"\n  model: \w+ -> \w+\n  losses of the first windows: ") as error:
        found(played(FakeRay(), dtype="bfloat16"), {0: [DENSE]})
    assert "examples" not in str(error.value)


def test_a_worker_with_another_number_of_threads_is_refused(played):
    try:
        with pytest.raises(CheckFailedError, match="threads: 1 -> 2"):
            found(played(FakeRay(), threads=2), {0: [DENSE]})
    finally:
        torch.set_num_threads(1)


def test_answers_to_a_request_that_was_given_up_are_not_taken_for_others(played, task, masks):
    workers = played(FakeRay())
    given_up = workers.losses({0: masks, 1: masks})
    next(given_up)
    given_up.close()
    assert found(workers, {1: masks[:3]}) == found(task.objective, {1: masks[:3]})


def test_work_is_counted_as_in_one_process(played, task, masks):
    assert played(FakeRay()).work(masks, 0) == task.objective.work(masks, 0)


# How a request is cut.


def layers(depth) -> list[Any]:
    blocks = [[Block("attention", layer), Block("mlp", layer)] for layer in range(depth)]
    return [SimpleNamespace(parts=[SimpleNamespace(block=block) for block in layer]) for layer in blocks]


def greedy(depth, gone: Mask = DENSE) -> tuple[list[Block], list[Mask]]:
    """All blocks of a model in the order they run, and the masks of a greedy step without `gone`."""
    blocks = [part.block for layer in layers(depth) for part in layer.parts]
    return blocks, [gone | {block} for block in blocks if block not in gone]


def counted(depth):
    def cost(masks, _batch=0):
        work = sweep_work(layers(depth), masks, 1)
        return work.attention_tokens + 2 * work.mlp_tokens + len(masks)

    return cost


def makespan(units, workers, cost):
    """When the last worker is done, if each takes the next unit as soon as it is free."""
    busy = [0.0] * workers
    for unit in units:
        busy[busy.index(min(busy))] += cost(unit.masks)
    return max(busy)


@pytest.mark.parametrize("batches", [1, 3, 4, 9])
@pytest.mark.parametrize("workers", [1, 2, 4, 64])
def test_every_mask_of_every_micro_batch_is_in_one_unit(batches, workers):
    blocks, masks = greedy(6, frozenset([Block("mlp", 2)]))
    units = cut(dict.fromkeys(range(batches), masks[::-1]), workers, blocks, counted(6))
    pairs = [(unit.batch, mask) for unit in units for mask in unit.masks]
    assert len(pairs) == len(set(pairs)) == batches * len(masks)
    assert set(pairs) == {(batch, mask) for batch in range(batches) for mask in masks}


def test_where_there_are_enough_micro_batches_nothing_is_cut_and_nothing_computed_twice():
    blocks, masks = greedy(6)
    units = cut(dict.fromkeys(range(8), masks), 4, blocks, counted(6))
    assert [unit.batch for unit in units] == list(range(8))
    assert all(set(unit.masks) == set(masks) for unit in units)


@pytest.mark.parametrize(
    ("depth", "batches", "workers", "least"),
    [(32, 1, 2, 0.97), (32, 1, 8, 0.82), (32, 3, 4, 0.9), (18, 9, 8, 0.95), (80, 1, 16, 0.83), (6, 4, 8, 0.9)],
)
def test_workers_are_busy_with_about_equal_parts_and_repeat_little(depth, batches, workers, least):
    blocks, masks = greedy(depth)
    cost = counted(depth)
    units = cut(dict.fromkeys(range(batches), masks), workers, blocks, cost)
    assert cost(masks) * batches / workers / makespan(units, workers, cost) >= least


def test_a_unit_says_what_it_is():
    assert str(Unit(3, (DENSE,))) == "micro-batch 3, 1 masks (dense)"
    assert str(Unit(0, tuple(greedy(2)[1]))) == "micro-batch 0, 4 masks (attention.0 to mlp.1)"


# Threads, and what is said where there is no Ray.


@pytest.mark.parametrize(
    ("workers", "cpus", "most"), [(2, [2], 8), (3, [8], 8), (4, [6, 3], 8), (2, [16], 4), (5, [2, 2, 1], 8)]
)
def test_each_worker_has_as_many_threads_as_fit_on_the_machines(workers, cpus, most):
    threads = cluster.threads_each(workers, cpus, most)
    assert 1 <= threads <= most
    assert sum(math.floor(each / threads) for each in cpus) >= workers
    assert threads == most or sum(math.floor(each / (threads + 1)) for each in cpus) < workers


def test_more_workers_than_a_cluster_has_cpus_are_refused():
    with pytest.raises(InputError, match="has 3 CPUs, so not 4 workers"):
        cluster.threads_each(4, [2.0, 1.0], 8)


def test_without_ray_the_command_says_what_to_install(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["search", str(checkpoint), "--target", "blocks=1", "--calibration", "builtin", "--workers", "2"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 4
    assert "pip install 'blockpruner[ray]'" in done.output


def test_a_cluster_without_workers_is_refused(checkpoint):
    words = ["score", str(checkpoint), "--criterion", "leave-one-out", "--calibration", "builtin", "--ray", "auto"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    assert "--workers" in done.output


def test_a_streamed_model_has_no_workers(task, checkpoint, monkeypatch):
    monkeypatch.setattr(task.objective, "memory", 1)
    with (
        pytest.raises(InputError, match="do not stream"),
        spread(task.objective, Crew(2, str(checkpoint))),
    ):
        raise AssertionError
