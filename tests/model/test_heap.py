"""Freed memory is kept for the next pass, unless the user has set something else."""

import json
import platform
import subprocess
import sys

import pytest

from fedmira.model.base.memory import keep_freed_memory, return_freed_memory

# Each measurement has a process of its own, forked from one that has imported torch, which takes seconds.
PROGRAM = """
import json, os, resource, torch
from fedmira.model.base.memory import Garbage, keep_freed_memory, return_freed_memory

def touch():
    blocks = [torch.ones(20 * 2**18) for _ in range(10)]  # of 20 MiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def touch_twice():
    assert keep_freed_memory()
    touch()
    touch()
    before = faults()
    for _ in range(3):
        touch()
    return faults() - before

def freed(choose):
    assert choose()
    torch.ones(8)
    before = resident()
    touch()
    return resident() - before

def left_between():
    assert keep_freed_memory()
    garbage = Garbage()
    garbage.limit()  # from here on
    found, before = [], resident()
    for size in (400, 800):  # MiB, freed between blocks that are used
        used, freed = [], []
        for _ in range(size):
            freed.append(torch.ones(2**18))
            used.append(torch.ones(2**10))
        freed.clear()
        assert resident() - before > 0.9 * size * 2**20
        found.append(garbage.limit())
    assert found == [False, True], found
    return (resident() - before) // 2**20

def measure(work, *arguments):
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, str(work(*arguments)).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return int(os.read(reading, 100))

torch.set_num_threads(1)
found = {"faults": measure(touch_twice), "left": measure(left_between)}
for choose in (keep_freed_memory, return_freed_memory):
    found[choose.__name__] = measure(freed, choose)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    """Page faults of three more passes, and bytes that stay resident after each choice."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("thresholds of glibc")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def test_pages_that_were_used_once_are_not_allocated_again(found: dict[str, int]) -> None:
    assert found["faults"] < 20_000  # of 153,600 pages; a block may have another address the second time


@pytest.mark.parametrize("program", ["keep_freed_memory", "return_freed_memory"])
def test_what_was_freed_stays_with_the_process_or_goes(program: str, found: dict[str, int]) -> None:
    kept = found[program] / (200 * 2**20)
    assert kept < 0.2 if program == "return_freed_memory" else kept > 0.5


def test_garbage_between_blocks_in_use_is_returned_where_there_is_much(found: dict[str, int]) -> None:
    assert found["left"] < 100  # of 800 MiB


def test_the_users_thresholds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()
    assert not return_freed_memory()
