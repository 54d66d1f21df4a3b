"""Training speed: FedMira's local phase against the plain PEFT loop, interleaved, in real tokens per second.

    python benchmarks/speed/training.py [--units abcAB] [--pairs 5] [--json FILE]

Useful FLOP/s count what the mathematics needs and nothing else: 2 per frozen weight and real token forward and 2
backward (4 in all), the output head at labelled positions only; attention and adapters are left out. The machine's
matmul rate is measured in the same run.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from units import BATCH, STEPS, Unit, real_tokens, units
from yardstick import ALPHA, CLIP, LEARNING_RATE, RANK, PeftLoop

from fedmira.adapters import lora_layout, start_adapters
from fedmira.adapters.optim import adamw
from fedmira.data.batches import ClientData
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.model.base.load import Base, load_base

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe, matmul_rate


def useful_flops(base: Base, clients: tuple[ClientData, ...]) -> float:
    """FLOPs that a local phase needs: 4 per frozen weight of the blocks and real token, 4 per head weight and label."""
    tokens = real_tokens(clients)
    labels = sum(one.labels for client in clients for one in client.train)
    weights = (
        module.weight
        for module in base.decoder.modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and not isinstance(module, torch.nn.Embedding)
    )
    blocks = sum(weight.numel() for weight in weights if isinstance(weight, torch.Tensor) and weight.ndim == 2)
    return 4.0 * blocks * tokens + 4.0 * base.head.weight.numel() * labels


class Engine:
    """FedMira on the clients of one unit."""

    def __init__(self, unit: Unit, dtype: str) -> None:
        self.base = load_base(str(unit.base), dtype=dtype, device="cpu", targets=list(unit.targets))
        self.layout = lora_layout(self.base.shapes, RANK)
        self.clients = unit.clients

    def of(self, clients: tuple[ClientData, ...]) -> "Engine":
        """Return the same base with other clients."""
        other = copy.copy(self)
        other.clients = clients
        return other

    def train(self, *, steps: int = STEPS) -> tuple[float, float]:
        """One local phase of all clients in one cohort; return seconds and their mean loss."""
        count = len(self.clients)
        start = start_adapters(self.layout, torch.full((count,), RANK), ALPHA, torch.Generator().manual_seed(0))
        ids = tuple(client.id for client in self.clients)
        examples = tuple(len(client.train) for client in self.clients)
        method = build("local", {}, Cohort(ids, examples, ({},) * count, (), 0))
        training = Training(
            optimizer=adamw(),
            learning_rate=LEARNING_RATE,
            batch_size=BATCH,
            local_steps=steps,
            local_epochs=None,
            max_grad_norm=CLIP,
            keep_optimizer=False,
            dropout=0.0,
            seed=0,
        )
        message = Message(start.rows)
        began = time.perf_counter()
        done = local_phase(
            self.base, method, self.clients, start, message, {}, training=training, clock=Clock(1), cohort=count
        )
        seconds = time.perf_counter() - began
        assert done.tokens == real_tokens(self.clients)
        return seconds, float(done.losses.mean())


def measure(unit: Unit, pairs: int) -> dict[str, Any]:
    """Interleave: one client of the yardstick in fp32, one under autocast, FedMira in bf16, FedMira in fp32."""
    plain = PeftLoop(unit.base, unit.targets)
    ours, exact = Engine(unit, "bfloat16"), Engine(unit, "float32")
    times: dict[str, list[float]] = {"plain fp32": [], "plain bf16": [], "fedmira bf16": [], "fedmira fp32": []}
    losses: dict[str, float] = {}
    rates: list[float] = []
    tokens = [sum(len(one.ids) for one in client.train) for client in unit.clients]
    for number in range(-1, pairs):
        which = number % len(unit.clients)
        client = unit.clients[which]
        found = {
            "plain fp32": plain.train(client, steps=STEPS, batch_size=BATCH),
            "fedmira bf16": ours.train(),
            "plain bf16": plain.train(client, steps=STEPS, batch_size=BATCH, autocast=True),
            "fedmira fp32": exact.train(),
        }
        if number < 0:
            continue  # warm-up
        for name, (seconds, loss) in found.items():
            work = tokens[which] if name.startswith("plain") else sum(tokens)
            times[name].append(work / seconds)
            losses[name] = loss
        rates.append(matmul_rate(torch.bfloat16, seconds=0.5))
    useful = useful_flops(ours.base, unit.clients) / sum(tokens)
    rate = statistics.median(rates)
    return {
        "unit": unit.name,
        "title": unit.title,
        "tokens": sum(tokens),
        "tokens_per_second": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "ratio": [ours_ / plain_ for ours_, plain_ in zip(times["fedmira bf16"], times["plain fp32"], strict=True)],
        "useful_gflops": useful * statistics.median(times["fedmira bf16"]) / 1e9,
        "bf16_matmul_gflops": rate / 1e9,
        "share": useful * statistics.median(times["fedmira bf16"]) / rate,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", default="abcAB", help="letters of units.py")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for unit in units(options.units):
        row = measure(unit, options.pairs)
        rows.append(row)
        speeds = ", ".join(f"{name} {value:,.0f}" for name, value in row["tokens_per_second"].items())
        print(
            f"({row['unit']}) {row['title']}: tokens/s: {speeds}; ratio {statistics.median(row['ratio']):.2f} "
            f"({min(row['ratio']):.2f} to {max(row['ratio']):.2f}); {row['useful_gflops']:.0f} useful GFLOP/s of "
            f"{row['bf16_matmul_gflops']:.0f} ({row['share']:.0%}); peak RSS {row['peak_rss_mb']:.0f} MB",
            flush=True,
        )
    if options.json:
        result = {"name": "training", "machine": describe(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
