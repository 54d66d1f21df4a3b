"""The facts of a machine that a bug report needs and that explain a speed: versions, devices, memory, disk."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from fedmira.model.base.load import choose_device, choose_dtype

LIBRARIES = (
    "fedmira",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pandas",
    "pydantic",
    "typer",
)
WATCHED = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # never a token
SIDE = 1024  # of the square matrices that are multiplied
PROBE_S = 0.5


def examine(folder: Path) -> dict[str, Any]:
    """Return the facts by name. folder: on the disk whose free space is reported. Multiplies matrices for a second."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    memory = psutil.virtual_memory()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count()},
        "threads": torch.get_num_threads(),
        "memory_bytes": {"total": memory.total, "free": memory.available},
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "device": str(device),
        "cuda": [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ],
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": {
            str(kind).removeprefix("torch."): round(_gflops(device, kind), 1)
            for kind in (torch.float32, torch.bfloat16)
        },
        "environment": {name: os.environ[name] for name in WATCHED if name in os.environ},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure matrix products: 2 n^3 operations each."""
    left = torch.randn(SIDE, SIDE, dtype=dtype, device=device)
    left @ left

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began, done = time.monotonic(), 0
    while time.monotonic() - began < PROBE_S:
        left @ left
        wait()
        done += 1
    return done * 2 * SIDE**3 / (time.monotonic() - began) / 1e9


def describe_machine(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts as lines of text."""
    memory, cores = facts["memory_bytes"], facts["cores"]
    lines = [f"{name:14s}{version}" for name, version in facts["versions"].items()]
    lines += [
        f"{'system':14s}{facts['system']}",
        f"{'processor':14s}{facts['processor']}, {cores['physical']} cores, {facts['threads']} threads used",
        f"{'memory':14s}{memory['free'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB free",
        f"{'disk':14s}{facts['disk_free_bytes'] / 1e9:.1f} GB free here",
        f"{'device':14s}{facts['device']}, dtype {facts['dtype']}",
    ]
    lines += [f"{'cuda':14s}{gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB" for gpu in facts["cuda"]]
    speeds = ", ".join(f"{name} {value:g}" for name, value in facts["gflops"].items())
    lines.append(f"{'GFLOP/s':14s}{speeds} ({SIDE} x {SIDE} products)")
    return lines + [f"{name:14s} {value}" for name, value in facts["environment"].items()]
