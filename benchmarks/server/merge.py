"""MIRA's merge against a copy of the same rows, and against the pairwise loop that reloads files.

    python benchmarks/server/merge.py [--json FILE] [--pairs 5] [--skip-loop]

Rows are GPT2-large adapters (36 layers, c_attn and both c_proj, rank 8: 4,055,040 numbers), 8 and 32 sampled clients.
Interleaved in one run:
  copy     torch's copy of the S rows into memory touched before, all threads: 2 x S x P x 4 bytes
  fresh    the same into new memory, whose pages the system zeroes at the first touch
  merge    `build("mira", ...).merge`, result in new memory: what a round pays. Each client has 10 neighbours (7 of 8).
           With numba, as `pip install "fedmira[fast]"` brings it; "plain" is the same without. "stored" adds the last
           rows of neighbours that were not sampled; its copy counts their reading as well
  loop     for every client and every other client, both state dicts are loaded from files (torch.load, page cache warm)
           and their differences added up tensor by tensor; once only. "all" visits every other sampled client, as
           the public code does, "joined" counts the pairs with a similarity above 0 alone
The answers of merge and loop must agree to 1e-5 of the largest number.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout, Stored, lora_layout, mixing
from fedmira.adapters.mixing_compiled import find_loop
from fedmira.disk.table import Table
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State

RANK, LAYERS, CLIENTS, REACH, COUPLING = 8, 36, 96, 5, 0.2
WIDTHS = (("attn.c_attn", 1280, 3840), ("attn.c_proj", 1280, 1280), ("mlp.c_proj", 5120, 1280))


def gpt2_large() -> Layout:
    return lora_layout([(f"h.{i}.{name}", a, b) for i in range(LAYERS) for name, a, b in WIDTHS], RANK)


def ring(order: np.ndarray, reach: int) -> np.ndarray:
    """Similarities [K, K]: each client joined to the `reach` before and after it, in a shuffled order."""
    count, stream = len(order), np.random.default_rng(1)
    weights = np.zeros((count, count))
    for step in range(1, reach + 1):
        for place in range(count):
            one, other = order[place], order[(place + step) % count]
            weights[one, other] = weights[other, one] = stream.uniform(0.25, 1)
    np.fill_diagonal(weights, 0)
    return weights


def build_mira(weights: np.ndarray, sampled: np.ndarray, neighbours: str, folder: Path) -> Method:
    """MIRA through its record, the graph read from a file."""
    path = folder / "graph.csv"
    pairs = [
        f"c{k},c{n},{float(weights[k, n])!r}" for k, n in zip(*map(np.ndarray.tolist, weights.nonzero()), strict=True)
    ]
    path.write_text("\n".join(["client,neighbour,weight", *pairs]) + "\n", encoding="utf-8")
    ids = tuple(f"c{k}" for k in range(len(weights)))
    cohort = Cohort(ids, (1,) * len(ids), ({},) * len(ids), (sampled,), 0)
    settings = {"lambda": COUPLING, "neighbours": neighbours, "graph": {"kind": "file", "path": str(path)}}
    return build("mira", settings, cohort)


def write_files(rows: Tensor, layout: Layout, folder: Path) -> list[Path]:
    """One state dict per client."""
    paths = []
    for number, row in enumerate(rows):
        tensors = {
            f"{leaf.module}.{leaf.factor}": row[leaf.start : leaf.stop].view(leaf.shape).clone()
            for leaf in layout.parts[0].leaves
        }
        paths.append(folder / f"{number}.bin")
        torch.save(tensors, paths[-1])
    return paths


def reloading_loop(
    paths: list[Path], similarity: np.ndarray, coupling: float
) -> tuple[list[dict[str, Tensor]], float, float]:
    """w_k - c sum_l a_kl (w_k - w_l), every pair from files. Return the answers, seconds of all and of joined pairs."""
    answers, total, joined = [], 0.0, 0.0
    for k, own in enumerate(paths):
        began = time.perf_counter()
        change = {name: torch.zeros_like(value) for name, value in torch.load(own).items()}
        for other, path in enumerate(paths):
            if other == k:
                continue
            start = time.perf_counter()
            mine, theirs = torch.load(own), torch.load(path)
            for name in change:
                change[name] += similarity[k, other] * (mine[name] - theirs[name])
            if similarity[k, other] == 0:
                joined -= time.perf_counter() - start
        mine = torch.load(own)
        answers.append({name: value - coupling * change[name] for name, value in mine.items()})
        spent = time.perf_counter() - began
        total, joined = total + spent, joined + spent
    return answers, total, joined


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(sampled: int, neighbours: str, layout: Layout, pairs: int, *, loop: bool) -> dict[str, Any]:
    """One row: medians over the pairs, every pair copy, fresh copy, merge; the loop once."""
    count = CLIENTS if neighbours == "stored" else sampled
    weights = ring(np.random.default_rng(0).permutation(count), min(REACH, count // 2))
    ids = np.arange(sampled)
    stream = torch.Generator().manual_seed(0)
    uploads = torch.randn(sampled, layout.size, generator=stream)
    held = torch.randn(count, layout.size, generator=stream) if neighbours == "stored" else torch.zeros(1, layout.size)
    held = held if neighbours == "stored" else held.expand(count, -1)
    table = Table(held, torch.arange(count))
    state = State(Stored(layout, table, torch.full((count,), RANK), torch.ones(count)))
    outside = np.setdiff1d(weights[ids].nonzero()[1], ids)
    target = torch.zeros_like(uploads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method = build_mira(weights, ids, neighbours, folder)

        def merge() -> Tensor:
            return method.merge(state, torch.from_numpy(ids), Message(uploads), torch.ones(sampled), Clock(1)).rows

        def plain() -> Tensor:
            with patch.object(mixing, "find_loop", lambda: None):
                return merge()

        works: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(uploads),
            "fresh": uploads.clone,
            "merge": merge,
            "plain": plain,
        }
        taken: dict[str, list[float]] = {key: [] for key in works}
        for number in range(-1, pairs):
            for key, work in works.items():
                spent = seconds(work)
                if number >= 0:  # the first pass warms up
                    taken[key].append(spent)
        extra = len(outside) if neighbours == "stored" else 0
        more = (2 * sampled + extra) / (2 * sampled)
        ratios = {
            key: [ours / (more * copy) for ours, copy in zip(taken[key], taken["copy"], strict=True)]
            for key in ("merge", "plain")
        }
        row: dict[str, Any] = {
            "sampled": sampled,
            "neighbours": neighbours,
            "outside": extra,
            "gb_per_second": 2 * uploads.nbytes / statistics.median(taken["copy"]) / 1e9,
            "seconds": {key: statistics.median(values) for key, values in taken.items()},
            "to_copy": ratios["merge"],
            "plain_to_copy": ratios["plain"],
        }
        if loop:
            similarity = weights / weights.sum(axis=1, keepdims=True)
            answers, total, joined = reloading_loop(write_files(uploads, layout, folder), similarity, COUPLING)
            ours = Adapters(layout, merge(), torch.full((sampled,), RANK), torch.ones(sampled))
            worst = 0.0
            for leaf in layout.parts[0].leaves:
                theirs = torch.stack([answer[f"{leaf.module}.{leaf.factor}"] for answer in answers])
                worst = max(worst, float((ours.leaf(leaf) - theirs).abs().max() / theirs.abs().max()))
            assert worst < 1e-5, f"merge and loop differ by {worst:.2g}"
            row |= {"loop_s": total, "joined_loop_s": joined, "difference": worst}
    return row


def line(row: dict[str, Any]) -> str:
    taken = row["seconds"]
    text = (
        f"S = {row['sampled']}, {row['neighbours']} ({row['outside']} outside): copy {taken['copy']:.4f} s "
        f"({row['gb_per_second']:.1f} GB/s), fresh {taken['fresh']:.4f} s, merge {taken['merge']:.4f} s = "
        f"{statistics.median(row['to_copy']):.2f} x copy ({min(row['to_copy']):.2f} to {max(row['to_copy']):.2f}), "
        f"without numba {taken['plain']:.4f} s = {statistics.median(row['plain_to_copy']):.2f} x"
    )
    if "loop_s" in row:
        text += (
            f"; loop (once) all {row['loop_s']:.2f} s = {row['loop_s'] / taken['merge']:.0f} x merge, joined "
            f"{row['joined_loop_s']:.2f} s = {row['joined_loop_s'] / taken['merge']:.0f} x; "
            f"differ by {row['difference']:.1g}"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--skip-loop", action="store_true")
    options = parser.parse_args()
    layout = gpt2_large()
    assert layout.parameters == 4_055_040
    assert find_loop() is not None, "no numba for this Python and numpy: pip install -e '.[fast]'"
    rows = []
    for neighbours in ("sampled", "stored"):
        for sampled in (8, 32):
            loop = neighbours == "sampled" and not options.skip_loop
            rows.append(measure(sampled, neighbours, layout, options.pairs, loop=loop))
            print(line(rows[-1]), flush=True)
    if options.json:
        result = {"name": "merge", "threads": torch.get_num_threads(), "pairs": options.pairs, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
