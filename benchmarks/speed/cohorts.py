"""Throughput against the number of clients that share a pass, on unit (c): 1, 2, 4, ... 64 clients, batch 4.

    python benchmarks/speed/cohorts.py [--clients 1 2 4 8 16 32 64] [--pairs 3] [--json FILE]

Two kinds of text: Natural Instructions as in unit (c), and its first 24 tokens only, where one client alone is far too
little work for a pass. The plain PEFT loop trains one client at a time: its speed is the same at any number.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training import Engine
from units import BATCH, Unit, units
from yardstick import PeftLoop

from fedmira.data.batches import ClientData, Encoded

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe

STEPS, SHORT = 2, 24


def copies(unit: Unit, count: int, longest: int | None) -> tuple[ClientData, ...]:
    """Return `count` clients with two batches each, the tasks of the unit in turn; texts cut to their last tokens."""

    def cut(one: Encoded) -> Encoded:
        if longest is None or len(one.ids) <= longest:
            return one
        labels = min(one.labels, longest // 2)
        return Encoded(one.ids[-longest:], longest - labels, one.answers)

    def make(k: int) -> ClientData:
        own = unit.clients[k % len(unit.clients)]
        return replace(own, id=f"c{k}", train=tuple(cut(one) for one in own.train[: STEPS * BATCH]))

    return tuple(make(k) for k in range(count))


def measure(unit: Unit, counts: list[int], pairs: int, longest: int | None) -> dict[str, Any]:
    """Interleave all cohort sizes and one client of the loop."""
    plain = PeftLoop(unit.base, unit.targets)
    engine = Engine(unit, "bfloat16")
    found: dict[int, list[float]] = {count: [] for count in counts}
    loop: dict[str, list[float]] = {"plain fp32": [], "plain bf16": []}
    for number in range(-1, pairs):
        for count in counts:
            clients = copies(unit, count, longest)
            tokens = sum(len(one.ids) for client in clients for one in client.train)
            seconds, _ = engine.of(clients).train(steps=STEPS)
            if number >= 0:
                found[count].append(tokens / seconds)
        client = copies(unit, 8, longest)[number % 8]
        tokens = sum(len(one.ids) for one in client.train)
        for name, autocast in (("plain fp32", False), ("plain bf16", True)):
            seconds, _ = plain.train(client, steps=STEPS, batch_size=BATCH, autocast=autocast)
            if number >= 0:
                loop[name].append(tokens / seconds)
    return {
        "text": "Natural Instructions" if longest is None else f"{longest} tokens each",
        "tokens_per_second": {count: statistics.median(values) for count, values in found.items()},
        "plain": {name: statistics.median(values) for name, values in loop.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    (unit,) = units("c")
    rows = []
    for longest in (None, SHORT):
        row = measure(unit, options.clients, options.pairs, longest)
        rows.append(row)
        curve = ", ".join(f"{count}: {value:,.0f}" for count, value in row["tokens_per_second"].items())
        plain = ", ".join(f"{name} {value:,.0f}" for name, value in row["plain"].items())
        print(f"{row['text']}: tokens/s by clients per pass: {curve}; {plain}", flush=True)
    if options.json:
        result = {"name": "cohorts", "machine": describe(), "threads": torch.get_num_threads(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
