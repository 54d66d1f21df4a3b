"""What a process holds, in MiB: memory that the system cannot take back, and pages of files, which it can."""

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATUS = Path("/proc/self/status")
EVERY = 0.002  # seconds between two looks


def held(kind: str = "RssAnon") -> float:
    """Return MiB of this process that are resident. kind: RssAnon, its own; RssFile, of mapped files."""
    found = re.search(rf"{kind}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) / 1024


class _Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]  # malloc.h


def used(device: str) -> float:
    """Return MiB of the blocks in use, without freed ones that the C library keeps."""
    if device != "cpu":
        return torch.cuda.memory_allocated() / 2**20
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return float(found.hblkhd + found.uordblks) / 2**20


class Peak:
    """The most that was held while it was watched, and in use if counted; on a GPU what torch had allocated there."""

    def __init__(self, device: str, *, counted: bool) -> None:
        self.device, self.before, self.most = device, now(device), 0.0
        self.counted, self.used_before, self.most_used = counted, used(device), 0.0

    @property
    def above(self) -> float:
        """MiB above what was held before."""
        return self.most - self.before

    @property
    def used(self) -> float:
        """MiB in use above those before."""
        return self.most_used - self.used_before

    def look(self) -> None:
        self.most = max(self.most, now(self.device))
        if self.counted:
            self.most_used = max(self.most_used, used(self.device))


def now(device: str) -> float:
    """Return MiB that are held now."""
    return held() if device == "cpu" else torch.cuda.memory_allocated() / 2**20


@contextmanager
def watched(device: str, *, counted: bool = False) -> Iterator[Peak]:
    """Watch what is held until the end of the block; counted: what is in use too, which slows it down."""
    peak, ended = Peak(device, counted=counted), threading.Event()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.most = peak.most_used = torch.cuda.max_memory_allocated() / 2**20
        return

    def watch() -> None:
        while not ended.is_set():
            peak.look()
            time.sleep(EVERY)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak.look()


@contextmanager
def saved_for_backward(device: str) -> Iterator[list[float]]:
    """Note for each backward pass the MiB that are there when it begins, above those when its forward pass began.

    That is what a pass keeps: not the base, rows and moments, which were there before, nor what comes and goes in
    either pass. A forward pass begins at the embeddings. Freed memory goes back to the system before each look.
    """
    notes: list[float] = []
    began: list[float] = []
    backward = torch.autograd.backward

    def look() -> float:
        if device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
        return now(device)

    def forward_begins(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Embedding) and not began:
            began.append(look())

    def backward_begins(*arguments: Any, **options: Any) -> None:
        notes.append(look() - began.pop())
        backward(*arguments, **options)

    hook = nn.modules.module.register_module_forward_pre_hook(forward_begins)
    torch.autograd.backward = backward_begins
    try:
        yield notes
    finally:
        hook.remove()
        torch.autograd.backward = backward
