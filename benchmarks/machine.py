"""The machine of a benchmark, and its speed at matrix products, which bound the work."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "numpy")
PRODUCT = (4096, 768, 3072)  # rows, in, out: the products of unit (a)


def describe() -> dict[str, Any]:
    """Return machine, versions, commit and time."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    model = re.search(r"model name\s*: (.*)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": model.group(1) if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": [name for name in ("amx_bf16", "avx512_bf16") if name in text],
        "memory_gb": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": git.stdout.strip() or "no git",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def matmul_rate(
    dtype: torch.dtype, *, seconds: float = 1.0, device: str = "cpu", product: tuple[int, int, int] = PRODUCT
) -> float:
    """Return FLOP/s of a matrix product. product: rows, inputs, outputs."""
    rows, first, second = product
    left = torch.randn(rows, first, device=device).to(dtype)
    right = torch.randn(first, second, device=device).to(dtype)
    left @ right
    wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(100 if device != "cpu" else 1):
            left @ right
            count += 1
        wait(device)
    return count * 2 * rows * first * second / (time.perf_counter() - began)


def wait(device: str) -> None:
    """Wait until a device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)
