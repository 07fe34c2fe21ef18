"""Freed memory that stays with the process: where the C library can be told, and what that changes."""

import platform
import subprocess
import sys

import pytest

from blockpruner import allocator

FAULTS = """
import resource, sys
import torch
from blockpruner.allocator import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(2**25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_elsewhere_than_with_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_large_blocks_come_from_memory_that_the_process_has():
    done = [
        subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        for way in ("fresh", "kept")
    ]
    fresh, kept = (int(each.stdout) for each in done)
    assert kept < 0.1 * fresh
