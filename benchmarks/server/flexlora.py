"""FlexLoRA's server step: the sum of low-rank products through QR, against the SVD of the dense d x d sum.

    python benchmarks/server/flexlora.py [--json FILE] [--pairs 5] [--width 2048] [--clients 10] [--rank 8]
                                          [--modules 4]

merge   `build("flexlora", ...).merge` on rows of several modules d x d: what a round pays. The yardstick is the paper's
        formula done plainly on the same rows: for each module the mean of s_k B_k A_k in float32, torch.linalg.svd, cut
kernel  one module without the method: ours in float64, then factors of the clients' rank; the yardstick forms the d x d
        sum in float32 and calls torch.linalg.svd once

Pairs are interleaved in one run; one repeat of ours is a burst of 20. The products of both sides must agree to 1e-4 of
the largest number: between two singular values that nearly agree, the cut in float32 is not quite that in float64.
Peak memory is the rise of the largest resident size over one call of the kernel at 4 times the width, in
a separate process, beside the size of one square matrix of that width in float32.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout, Stored, lora_layout
from fedmira.adapters.lowrank import decompose_sum, factors
from fedmira.disk.table import Table
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, State
from fedmira.model.base.memory import keep_freed_memory

BURST = 20
CLOSE = 1e-4  # of the largest number
ALPHA = 16.0
Result = TypeVar("Result")


def uploads(width: int, clients: int, rank: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    stream = torch.Generator().manual_seed(0)
    lefts = [torch.randn(width, rank, generator=stream) for _ in range(clients)]
    rights = [torch.randn(rank, width, generator=stream) for _ in range(clients)]
    return lefts, rights, torch.rand(clients, generator=stream)


def ours(width: int, clients: int, rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    lefts, rights, weights = uploads(width, clients, rank)
    return lambda: factors(decompose_sum(lefts, rights, weights), rank, 2.0, dtype=torch.float32)


def dense(width: int, clients: int, rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """B and A of the same rank from torch.linalg.svd of the sum."""
    lefts, rights, weights = uploads(width, clients, rank)

    def work() -> tuple[Tensor, Tensor]:
        total = torch.zeros(width, width)
        for weight, left, right in zip(weights, lefts, rights, strict=True):
            total += weight * (left @ right)
        u, values, v = torch.linalg.svd(total, full_matrices=False)
        return u[:, :rank] * values[:rank] / 2.0, v[:rank]

    return work


def rise(width: int, clients: int, rank: int) -> float:
    """MB by which one call lifts the largest resident size; a small call first loads the libraries."""
    ours(64, 2, 2)()
    work = ours(width, clients, rank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def clocked(work: Callable[[], Result], times: int) -> tuple[float, Result]:
    """Seconds of one call, over several, and what the last one gave."""
    began = time.perf_counter()
    for _ in range(times):
        found = work()
    return (time.perf_counter() - began) / times, found


def timed(work: Callable[[], tuple[Tensor, Tensor]], times: int) -> tuple[float, Tensor]:
    seconds, (left, right) = clocked(work, times)
    return seconds, 2.0 * left @ right


# ---------------------------------------------------------------- the method


def trained(width: int, clients: int, rank: int, modules: int) -> tuple[Adapters, Tensor]:
    """What clients return, A and B of every module random, and their numbers of examples."""
    layout = lora_layout([(f"m{number}", width, width) for number in range(modules)], rank)
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(clients, layout.size, generator=stream)
    ranks = torch.full((clients,), rank)
    examples = torch.randint(10, 100, (clients,), generator=stream).double()
    return Adapters(layout, rows, ranks, ALPHA / ranks.float()), examples


def ours_merged(uploads: Adapters, examples: Tensor) -> Callable[[], Tensor]:
    """The method's merge; its work gives the shared row [1, P]."""
    count = len(uploads)
    ids = tuple(f"c{k}" for k in range(count))
    counts = tuple(int(one) for one in examples)
    cohort = Cohort(ids, counts, ({},) * count, (), 0, ranks=uploads.ranks, scale=uploads.scale)
    method = build("flexlora", {}, cohort)
    one = torch.zeros(1, dtype=torch.int64)
    nothing = Table(torch.zeros(1, uploads.layout.size), one)
    state = State(Stored(uploads.layout, nothing, uploads.ranks[:1], uploads.scale[:1]))
    everyone, returned, clock = torch.arange(count), Message(uploads.rows), Clock(1)
    return lambda: method.merge(state, everyone, returned, examples, clock).rows


def dense_merged(uploads: Adapters, examples: Tensor) -> Callable[[], Tensor]:
    """The formula done plainly, module by module; its work gives the same row."""
    shares, scale = (examples / examples.sum()).float(), float(uploads.scale[0])

    def work() -> Tensor:
        row = torch.zeros(1, uploads.layout.size)
        for a, b in uploads.layout.parts[0].pairs():
            rank, (first, second) = a.shape[0], (uploads.leaf(a), uploads.leaf(b))
            mean = torch.zeros(b.shape[0], a.shape[1])
            for share, own_a, own_b in zip(shares, first, second, strict=True):
                mean += share * scale * (own_b @ own_a)
            u, values, v = torch.linalg.svd(mean, full_matrices=False)
            row[0, a.start : a.stop] = v[:rank].flatten()
            row[0, b.start : b.stop] = (u[:, :rank] * values[:rank] / scale).flatten()
        return row

    return work


def apart(one: Tensor, other: Tensor, layout: Layout) -> float:
    """The largest difference of the products B A of two rows, module by module, to the largest number of the second."""
    worst = 0.0
    for a, b in layout.parts[0].pairs():
        found, expected = (
            row[0, b.start : b.stop].view(b.shape) @ row[0, a.start : a.stop].view(a.shape)
            for row in (one.double(), other.double())
        )
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def measure_merge(width: int, clients: int, rank: int, modules: int, pairs: int) -> dict[str, Any]:
    """One row: the method's merge against the dense formula, interleaved; seconds are those of a whole merge."""
    uploads, examples = trained(width, clients, rank, modules)
    quick, slow = ours_merged(uploads, examples), dense_merged(uploads, examples)
    quick()
    taken, worst = [], 0.0
    for _ in range(pairs):
        here, found = clocked(quick, BURST)
        there, expected = clocked(slow, 1)
        taken.append((here, there))
        worst = max(worst, apart(found, expected, uploads.layout))
    assert worst < CLOSE, f"products differ by {worst:.2g}"
    return {
        "width": width,
        "clients": clients,
        "rank": rank,
        "modules": modules,
        "ours_s": statistics.median(one for one, _ in taken),
        "dense_s": statistics.median(other for _, other in taken),
        "ratio": [there / here for here, there in taken],
        "difference": worst,
    }


# ---------------------------------------------------------------- the kernel


def measure(width: int, clients: int, rank: int, pairs: int) -> dict[str, Any]:
    """The row of the kernel."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(rise, (4 * width, clients, rank))
    quick, slow = ours(width, clients, rank), dense(width, clients, rank)
    quick()
    taken, ratios, worst = [], [], 0.0
    for _ in range(pairs):
        here, found = timed(quick, BURST)
        there, expected = timed(slow, 1)
        taken.append((here, there))
        ratios.append(there / here)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    assert worst < CLOSE, f"products differ by {worst:.2g}"
    return {
        "name": "flexlora",
        "width": width,
        "clients": clients,
        "rank": rank,
        "ours_s": statistics.median(one for one, _ in taken),
        "dense_s": statistics.median(other for _, other in taken),
        "ratio": ratios,
        "difference": worst,
        "peak_rise_mb": peak,
        "dense_matrix_mb": (4 * width) ** 2 * 4 / 2**20,
    }


def shown(what: str, row: dict[str, Any]) -> str:
    """One line for a reader."""
    ratio = row["ratio"]
    return (
        f"{what}, d = {row['width']}, {row['clients']} clients of rank {row['rank']}: ours {1000 * row['ours_s']:.1f} "
        f"ms, dense {row['dense_s']:.2f} s = {statistics.median(ratio):.0f} x ({min(ratio):.0f} to {max(ratio):.0f}); "
        f"products differ by {row['difference']:.1g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", type=int, default=4)
    options = parser.parse_args()
    keep_freed_memory()  # as every process does that loads a base
    sizes = (options.width, options.clients, options.rank)
    row = measure(*sizes, options.pairs)
    row["merge"] = measure_merge(*sizes, options.modules, options.pairs)
    print(shown(f"merge of {options.modules} modules", row["merge"]))
    print(shown("kernel", row))
    print(
        f"at d = {4 * row['width']} peak memory rises by {row['peak_rise_mb']:.0f} MB, one d x d is "
        f"{row['dense_matrix_mb']:.0f} MB"
    )
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
