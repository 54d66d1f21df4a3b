"""What privacy costs: a local phase with private gradients against the plain one, interleaved, on the same examples.

    python benchmarks/speed/private.py [--units c] [--pairs 5] [--steps 5] [--dtype float32] [--json FILE]

The private phase takes the plain phase's batches as its samples, so that both train on the same tokens. Aim: at most
4 times the plain phase on unit (c).
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training import Engine
from units import BATCH, STEPS, Unit, units
from yardstick import ALPHA, CLIP, LEARNING_RATE, RANK

from fedmira.adapters import start_adapters
from fedmira.adapters.optim import adamw
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.privacy.steps import PrivateSteps

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe

PLAIN = Training(adamw(), LEARNING_RATE, BATCH, STEPS, None, CLIP, False, 0.0, seed=0)


def train(engine: Engine, training: Training) -> float:
    """Seconds of one local phase of all clients in one cohort."""
    clients = engine.clients
    start = start_adapters(engine.layout, torch.full((len(clients),), RANK), ALPHA, torch.Generator().manual_seed(0))
    ids, counts = tuple(client.id for client in clients), tuple(len(client.train) for client in clients)
    method = build("local", {}, Cohort(ids, counts, ({},) * len(ids), (), 0))
    message, clock = Message(start.rows), Clock(1)
    began = time.perf_counter()
    local_phase(engine.base, method, clients, start, message, {}, training=training, clock=clock, cohort=len(ids))
    return time.perf_counter() - began


def measure(unit: Unit, pairs: int, *, steps: int, dtype: str) -> dict[str, Any]:
    """Interleave the plain and the private phase; the first pair warms up."""
    engine, plain = Engine(unit, dtype), replace(PLAIN, local_steps=steps)
    expected = {client.id: BATCH for client in engine.clients}
    private = replace(plain, private=PrivateSteps(1.0, 1.0, 1, expected, bytes(32), "benchmark"))
    found = [(train(engine, plain), train(engine, private)) for _ in range(pairs + 1)][1:]
    ratios = [second / first for first, second in found]
    return {
        "unit": unit.name,
        "title": unit.title,
        "dtype": dtype,
        "steps": steps,
        "parameters": engine.layout.parameters,
        "seconds_plain": [first for first, _ in found],
        "seconds_private": [second for _, second in found],
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", default="c", help="letters of units.py")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(unit, options.pairs, steps=options.steps, dtype=options.dtype) for unit in units(options.units)]
    for row in rows:
        least, most = row["spread"]
        print(f"({row['unit']}) {row['title']}: private to plain {row['ratio']:.2f} ({least:.2f} to {most:.2f})")
    if options.json:
        result = {"name": "private", "machine": describe(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
