"""Freed memory is kept for the next pass, unless the user has set something else."""

import platform
import subprocess
import sys

import pytest

from fedmira.model.base.memory import keep_freed_memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc")
def test_pages_that_were_used_once_are_not_allocated_again() -> None:
    done = subprocess.run([sys.executable, "-c", TOUCH_TWICE], capture_output=True, check=True)
    assert int(done.stdout) < 20_000  # of 153,600 pages; a block may have another address the second time


def test_the_users_thresholds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()
