"""Let the C library keep memory that was freed, or let the system have it.

By default glibc returns it to the system at once, and the next allocation gets new pages: each of 4 kB is zeroed at its
first use, up to 100,000 of them in one pass over a cohort. Memory that stays resident between passes grows by
TRIM_BYTES at most.
"""

import ctypes
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TRIM_BYTES = 512 * 2**20  # bytes at the top of the heap
MMAP_BYTES = 32 * 2**20  # blocks from this size on are returned nevertheless; also glibc's own upper limit
RETURNED_BYTES = 2**20  # blocks from this size on are returned by return_freed_memory; glibc raises its own limit
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Set glibc's thresholds for this process; return False where the user has set them, or there are none to set."""
    return _set({_M_MMAP_THRESHOLD: MMAP_BYTES, _M_TRIM_THRESHOLD: TRIM_BYTES})


def return_freed_memory() -> bool:
    """Let the system have every large block as soon as it is freed; return False as keep_freed_memory does.

    For a process that has a few large blocks one after another and waits long between them, as a federation's server.
    """
    return _set({_M_MMAP_THRESHOLD: RETURNED_BYTES})


@dataclass
class Garbage:
    """Freed memory that the C library holds, between blocks in use too.

    Where a block has been, one of the same size often finds no room: glibc before 2.38 looks for more than it takes of
    aligned memory. So a pass of large tensors, each freed soon, would come to hold many times what it uses. lowest:
    the fewest bytes of this process that were resident since freed memory was returned.
    """

    lowest: float = -math.inf

    def limit(self) -> bool:
        """Return what is free to the system where more than TRIM_BYTES may be; say whether it was returned."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is None:
            return False
        if returned := _resident() - self.lowest > TRIM_BYTES:
            trim(0)
            self.lowest = _resident()
        else:
            self.lowest = min(self.lowest, _resident())
        return returned


def _resident() -> int:
    """Return the bytes of this process in memory, those of mapped files left out."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _set(thresholds: Mapping[int, int]) -> bool:
    users = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    if sys.platform != "linux" or users & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in thresholds.items())
