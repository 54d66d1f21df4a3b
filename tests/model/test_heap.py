"""Freed memory is kept for the next pass, unless the user has set something else."""

import platform
import subprocess
import sys

import pytest

from fedmira.model.base.memory import keep_freed_memory, return_freed_memory

TOUCH_TWICE = """
import resource, torch
from fedmira.model.base.memory import keep_freed_memory
torch.set_num_threads(1)
assert keep_freed_memory()
def touch():
    blocks = [torch.ones(20 * 2**18) for _ in range(10)]  # of 20 MiB
touch()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

FREED = """
import torch
from fedmira.model.base import memory
assert memory.{}()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
torch.ones(8)
before = resident()
blocks = [torch.ones(20 * 2**18) for _ in range(10)]  # of 20 MiB
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc")
def test_pages_that_were_used_once_are_not_allocated_again() -> None:
    done = subprocess.run([sys.executable, "-c", TOUCH_TWICE], capture_output=True, check=True)
    assert int(done.stdout) < 20_000  # of 153,600 pages; a block may have another address the second time


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc")
@pytest.mark.parametrize("program", ["keep_freed_memory", "return_freed_memory"])
def test_what_was_freed_stays_with_the_process_or_goes(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", FREED.format(program)], capture_output=True, check=True)
    kept = int(done.stdout) / (200 * 2**20)
    assert kept < 0.2 if program == "return_freed_memory" else kept > 0.5


def test_the_users_thresholds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()
    assert not return_freed_memory()
