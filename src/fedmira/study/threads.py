"""How many threads a study computes on, which with its cohort decides the last digits of its results."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmira.disk.run_facts import RunFacts
from fedmira.engine.spread.cluster import count_cores
from fedmira.model.base.load import Base

# Parameters below which a base runs on one thread: its products are so small that waiting for a second thread costs
# more than it brings (the demo, 0.26 M: 44 s on one thread, 59 s on two).
SMALL_BASE = 1_000_000


def count_threads(base: Base, saved: RunFacts | None, *, spread_over: int | None = None) -> int:
    """Return how many threads a study computes on: those it began with, one for a small base, else torch's.

    spread_over: processes that compute at the same time, among which the cores are divided.
    """
    if saved is not None:
        return saved.threads
    small = sum(parameter.numel() for parameter in base.model.parameters()) < SMALL_BASE
    threads = 1 if small else torch.get_num_threads()
    return threads if spread_over is None else min(threads, max(1, count_cores() // spread_over))


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads; restore the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
