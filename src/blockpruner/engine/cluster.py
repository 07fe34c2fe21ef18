"""Ray, where workers live: started on this machine for the while, or a cluster that is there already (no torch)."""

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from blockpruner.errors import InputError, MachineError, missing_extra

STORE_BYTES = 128 * 2**20  # what Ray needs and the examples twice over; more is asked for where these are large

# Read by Ray when it is imported. The first has it listen on this machine's loopback address alone, which it does by
# itself on macOS and Windows only; the second keeps it from reporting its use.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_SILENT = {"RAY_USAGE_STATS_ENABLED": "0"}


def check_ray() -> None:
    """MachineError, with the install command, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise missing_extra("ray", "ray", "--workers")


@contextlib.contextmanager
def joined(address: str | None, cpus: int, gpus: int, payload: int) -> Iterator[Any]:
    """The module `ray`, connected: to the cluster at `address`, or (None) to a Ray of our own that ends with the block.

    A Ray that this process is connected to already is used as it is, and stays. cpus, gpus: what our own is to hand
    out, however much the machine has; payload: bytes that go through its object store. Our own has no dashboard, writes
    no statistics, uploads nothing and listens on the loopback address alone. MachineError where Ray does not start.
    """
    check_ray()
    os.environ |= _SILENT | ({} if address else _ALONE)
    import ray

    if ray.is_initialized():
        yield ray
        return
    started: dict[str, Any] = {"address": address}
    if not address:
        store = STORE_BYTES + 2 * payload
        started = {"address": "local", "num_cpus": cpus, "num_gpus": gpus, "object_store_memory": store}
        started["include_dashboard"] = False
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        # Ray lets workers import from the current folder, where anything may lie, so it is started elsewhere.
        with contextlib.chdir("/"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **started)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        place = f"the Ray cluster at {address}" if address else "Ray"
        raise MachineError(
            f"{place} does not answer: {error}",
            fix="start one with `ray start --head`, or leave out --ray"
            if address
            else "look for why in the log that Ray keeps",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray's own would end this process without a plan
    try:
        yield ray
    finally:
        ray.shutdown()


def threads_each(workers: int, cpus: Sequence[float], most: int) -> int:
    """How many threads each of `workers` gets on machines with so many CPUs: as many as fit, from 1 to `most`.

    InputError where there are fewer CPUs than workers.
    """
    fitting = (n for n in range(most, 0, -1) if sum(int(each // n) for each in cpus) >= workers)
    found = next(fitting, 0)
    if not found:
        raise InputError(f"the cluster has {sum(cpus):g} CPUs, so not {workers} workers", fix="use fewer --workers")
    return found


def resources(ray: Any, kind: str) -> list[float]:
    """How much of `kind`, CPU or GPU, each living machine of the cluster has."""
    return [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
