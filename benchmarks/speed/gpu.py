"""Training on a GPU at the paper's setting: FedMira's local phase against the plain PEFT loop, both in bfloat16.

    python benchmarks/speed/gpu.py [--pairs 5] [--shapes gpt2-large llama-1.3b] [--json FILE]

8 clients, 2 steps of batch 8, r 16, up to 1,024 tokens, loss on the response; random weights and ids, lengths drawn
from 200 to 1,024. Interleaved in one run, real tokens per second, peak device memory of each. The products' rate is
measured in the same run. `--tiny --device cpu` runs everything at a size that shows that the script works.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import useful_flops
from transformers import GPT2Config, LlamaConfig
from units import random_base
from yardstick import CLIP, LEARNING_RATE, PeftLoop

from fedmira.adapters import lora_layout, start_adapters
from fedmira.adapters.optim import adamw
from fedmira.data.batches import ClientData, Encoded, Truncation
from fedmira.engine.phase import local_phase
from fedmira.engine.tools import Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message
from fedmira.model.base.load import load_base

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import PRODUCT, describe, matmul_rate, wait

CLIENTS, STEPS, BATCH, RANK = 8, 2, 8, 16
SHAPES = {
    "gpt2-large": (("c_attn", "c_proj"), {"n_layer": 36, "n_embd": 1280, "n_head": 20, "vocab_size": 50257}),
    "llama-1.3b": (
        ("q_proj", "v_proj"),
        {"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16},
    ),
}


def shape(name: str, *, tiny: bool) -> GPT2Config | LlamaConfig:
    """Return the config of a shape; `tiny` keeps its kind and little else."""
    settings: dict[str, Any] = dict(SHAPES[name][1])
    if name.startswith("gpt2"):
        settings |= {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512} if tiny else {}
        return GPT2Config(**settings, n_positions=1024, eos_token_id=0, bos_token_id=None)
    settings |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96} if tiny else {}
    return LlamaConfig(
        **settings, vocab_size=512 if tiny else 32000, max_position_embeddings=1024, eos_token_id=0, bos_token_id=None
    )


def make_clients(vocabulary: int, longest: int) -> tuple[ClientData, ...]:
    """Draw texts of random ids; the last fifth of each is its response."""
    stream = np.random.default_rng(0)

    def text() -> Encoded:
        length = int(stream.integers(longest // 5, longest + 1))
        return Encoded(tuple(stream.integers(1, vocabulary, length).tolist()), length - length // 5, ("",))

    return tuple(
        ClientData(f"c{k}", f"c{k}", None, {}, tuple(text() for _ in range(STEPS * BATCH)), (), (), Truncation())
        for k in range(CLIENTS)
    )


def measure(name: str, *, pairs: int, device: str, tiny: bool) -> dict[str, Any]:
    """Interleave all clients of the loop and all clients of FedMira."""
    targets = SHAPES[name][0]
    config = shape(name, tiny=tiny)
    folder = random_base(config, Path(tempfile.gettempdir()) / "fedmira-bench" / f"{name}{'-tiny' if tiny else ''}")
    clients = make_clients(config.vocab_size, 64 if tiny else 1024)
    tokens = sum(len(one.ids) for client in clients for one in client.train)
    plain = PeftLoop(folder, targets, device=device, dtype=torch.bfloat16, rank=RANK)
    base = load_base(str(folder), dtype="bfloat16", device=device, targets=list(targets))
    layout = lora_layout(base.shapes, RANK)
    start = start_adapters(layout, torch.full((CLIENTS,), RANK), 2.0 * RANK, torch.Generator().manual_seed(0))
    ids = tuple(client.id for client in clients)
    method = build("local", {}, Cohort(ids, (STEPS * BATCH,) * CLIENTS, ({},) * CLIENTS, (), 0))
    training = Training(adamw(), LEARNING_RATE, BATCH, STEPS, None, CLIP, False, 0.0, seed=0)

    def loop() -> None:
        for client in clients:
            plain.train(client, steps=STEPS, batch_size=BATCH)

    def ours() -> None:
        local_phase(
            base, method, clients, start, Message(start.rows), {}, training=training, clock=Clock(1), cohort=CLIENTS
        )

    times: dict[str, list[float]] = {"plain bf16": [], "fedmira bf16": []}
    peaks = dict.fromkeys(times, 0.0)
    for number in range(-1, pairs):
        for what, work in zip(times, (loop, ours), strict=True):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            wait(device)
            began = time.perf_counter()
            work()
            wait(device)
            if number >= 0:
                times[what].append(tokens / (time.perf_counter() - began))
            if device != "cpu":
                peaks[what] = max(peaks[what], torch.cuda.max_memory_allocated() / 2**30)
    rate = matmul_rate(torch.bfloat16, device=device, product=(64, 64, 64) if tiny else PRODUCT)
    useful = useful_flops(base, clients) / tokens * statistics.median(times["fedmira bf16"])
    ratio = [one / other for one, other in zip(times["fedmira bf16"], times["plain bf16"], strict=True)]
    return {
        "shape": name,
        "tokens": tokens,
        "tokens_per_second": {what: statistics.median(values) for what, values in times.items()},
        "ratio": ratio,
        "useful_tflops": useful / 1e12,
        "bf16_matmul_tflops": rate / 1e12,
        "share": useful / rate,
        "peak_device_gb": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand; --tiny --device cpu shows that the script works")
    rows = []
    for name in options.shapes:
        row = measure(name, pairs=options.pairs, device=options.device, tiny=options.tiny)
        rows.append(row)
        speeds = ", ".join(f"{what} {value:,.0f}" for what, value in row["tokens_per_second"].items())
        memory = ", ".join(f"{what} {value:.1f} GB" for what, value in row["peak_device_gb"].items())
        print(
            f"{name}: tokens/s: {speeds}; ratio {statistics.median(row['ratio']):.2f} ({min(row['ratio']):.2f} to "
            f"{max(row['ratio']):.2f}); {row['useful_tflops']:.2f} useful TFLOP/s of {row['bf16_matmul_tflops']:.2f} "
            f"({row['share']:.0%}); peak memory: {memory}",
            flush=True,
        )
    if options.json:
        result = {"name": "gpu", "machine": describe(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
