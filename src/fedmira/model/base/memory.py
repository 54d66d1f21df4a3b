"""Let the C library keep memory that was freed.

By default glibc returns it to the system at once, and the next allocation gets new pages: each of 4 kB is zeroed at its
first use, up to 100,000 of them in one pass over a cohort. Memory that stays resident between passes grows by
TRIM_BYTES at most.
"""

import ctypes
import os
import sys

TRIM_BYTES = 512 * 2**20  # bytes at the top of the heap
MMAP_BYTES = 32 * 2**20  # blocks from this size on are returned nevertheless; also glibc's own upper limit
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Set glibc's thresholds for this process; return False where the user has set them, or there are none to set."""
    users = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    if sys.platform != "linux" or users & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None
        and mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES) == 1
        and mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES) == 1
    )
