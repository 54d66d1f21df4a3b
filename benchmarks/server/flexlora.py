"""FlexLoRA's server step: the sum of low-rank products through QR, against the SVD of the dense d x d sum.

    python benchmarks/server/flexlora.py [--json FILE] [--pairs 3] [--width 2048] [--clients 10] [--rank 8]

One module, one round: ours in float64, then factors of the clients' rank; the yardstick forms the d x d sum in float32
and calls torch.linalg.svd once. One repeat of ours is a burst of 20. The products of both must agree to 1e-5 of the
largest number. Peak memory is the rise of the largest resident size over one call of ours at 4 times the width, in a
process of its own, beside the size of one square matrix of that width in float32.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmira.lowrank import decompose_sum, factors

BURST = 20


def uploads(width: int, clients: int, rank: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    stream = torch.Generator().manual_seed(0)
    lefts = [torch.randn(width, rank, generator=stream) for _ in range(clients)]
    rights = [torch.randn(rank, width, generator=stream) for _ in range(clients)]
    return lefts, rights, torch.rand(clients, generator=stream)


def ours(width: int, clients: int, rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    lefts, rights, weights = uploads(width, clients, rank)
    return lambda: factors(decompose_sum(lefts, rights, weights), rank, 2.0)


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


def timed(work: Callable[[], tuple[Tensor, Tensor]], times: int) -> tuple[float, Tensor]:
    began = time.perf_counter()
    for _ in range(times):
        left, right = work()
    return (time.perf_counter() - began) / times, 2.0 * left @ right


def measure(width: int, clients: int, rank: int, pairs: int) -> dict[str, Any]:
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
    assert worst < 1e-5, f"products differ by {worst:.2g}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    row = measure(options.width, options.clients, options.rank, options.pairs)
    print(
        f"d = {row['width']}, {row['clients']} clients of rank {row['rank']}: ours {1000 * row['ours_s']:.1f} ms, "
        f"dense {row['dense_s']:.2f} s = {statistics.median(row['ratio']):.0f} x ({min(row['ratio']):.0f} to "
        f"{max(row['ratio']):.0f}); products differ by {row['difference']:.1g}; at d = {4 * row['width']} peak "
        f"memory rises by {row['peak_rise_mb']:.0f} MB, one d x d is {row['dense_matrix_mb']:.0f} MB"
    )
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
