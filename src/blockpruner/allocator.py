"""What the C library does with large blocks of memory that are freed: by itself it gives them back at once.

Every temporary tensor above 32 MiB is then mapped and filled with zeros by the kernel anew; with logits over a large
vocabulary that is a third of the time of the head on a CPU (measured: `experiments/throughput.json`).
"""

import ctypes
import platform

# Parameters of mallopt in glibc's malloc.h, and the most memory that stays with the process though it is free.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**30


def keep_freed_memory() -> bool:
    """Have blocks below 1 GiB come from memory that the process keeps, at most as much of it free; whether it was done.

    It holds for the whole process and is not for libraries: the command line, whose process is its own, does it. Only
    glibc can be told, elsewhere nothing happens. No number changes; the peak of memory may, by what lies free between
    blocks in use.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, KEPT) == 1 for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
