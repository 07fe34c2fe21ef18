"""The memory that a pass takes beside what was held before it."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLED_EVERY = 0.002  # seconds, of the memory of a process
_STATUS = Path("/proc/self/status")


@dataclass
class Taken:
    """What a pass took beside what was held before it, in bytes; None, with the reason, where that is not known."""

    peak: int | None = None
    reason: str | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, every: float = SAMPLED_EVERY) -> Iterator[Taken]:
    """While the block runs, watch memory: of the device on CUDA, else anonymous memory of the process (Linux).

    every: seconds between two looks at the latter.
    """
    taken = Taken()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield taken
        taken.peak = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and _STATUS.exists():
        _give_back()
        before, stop, most = _anonymous(), threading.Event(), [0]

        def watch() -> None:
            while not stop.wait(every):
                most[0] = max(most[0], _anonymous())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield taken
        finally:
            most[0] = max(most[0], _anonymous())
            stop.set()
            thread.join()
        taken.peak = max(0, most[0] - before)
    else:
        yield taken
        taken.reason = f"memory of {device.type} is not watched on this system"


def _give_back() -> None:
    """Have the C library give freed memory back, which would be taken again without being seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _anonymous() -> int:
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024
