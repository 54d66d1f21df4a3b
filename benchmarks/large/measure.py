"""Bases of 0.5 and 1.5 billion parameters: speed and memory of a pass of several clients beside the PEFT loop.

    python benchmarks/large/measure.py [--pairs 1] [--only NAME ...] [--device cuda]
    python benchmarks/large/page.py

Each row is measured on both sides, one process after another (one.py), and kept in benchmarks/results/large-TYPE.json:
the type of numbers that this machine multiplies fast. What is kept there is not measured again. `make bench-large` does
all that and writes docs/results/large.md. The bases have random weights, and are made in --folder: 1 and 3 GB.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from estimate import compare_estimate
from large_rows import ROWS, STUDY, Row

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe, matmul_rate

from fedmira.model.base.load import choose_dtype

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRODUCT = (2048, 896, 4864)  # rows, in, out: the largest products of 0.5B with 8 clients


def measure(row: Row, *, pairs: int, device: str, folder: Path) -> dict[str, Any]:
    """Run both sides alternately; what is kept of memory is the least, of seconds every one."""
    found: dict[str, list[dict[str, Any]]] = {"peft": [], "fedmira": []}
    for _ in range(pairs):
        for side, results in found.items():
            command = row.command(side, device=device, folder=folder)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    kind = getattr(torch, found["fedmira"][0]["dtype"])
    rate = matmul_rate(kind, seconds=2.0, device=device, product=PRODUCT)
    sides = {
        side: {
            "seconds": [second for one in results for second in one["seconds"]],
            **{
                key: min(one[key] for one in results)
                for key in ("weights", "loading", "files", "kept", "above", "used", "peak")
            },
            "loss": results[0]["loss"],
        }
        for side, results in found.items()
    }
    where = {**describe(), "threads": torch.get_num_threads()}
    return {**asdict(row), "dtype": found["fedmira"][0]["dtype"], "matmul": rate, "machine": where, **sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(row.name for row in ROWS), STUDY]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of: {', '.join(names)}")
    parser.add_argument("--pairs", type=int, default=1, help="processes of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/large"), help="of the bases")
    parser.add_argument("--json", type=Path, help="default: large-TYPE.json in benchmarks/results, large-cuda.json")
    options = parser.parse_args()
    numbers = str(choose_dtype("auto", torch.device(options.device))).removeprefix("torch.")
    kind = numbers if options.device == "cpu" else "cuda"
    path = options.json or ROOT / "benchmarks" / "results" / f"large-{kind}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.only or names:
        if name in kept:
            continue
        print(name, flush=True)
        if name == STUDY:
            kept[name] = {**compare_estimate(options.folder, device=options.device), "machine": describe()}
        else:
            row = next(row for row in ROWS if row.name == name)
            kept[name] = measure(row, pairs=options.pairs, device=options.device, folder=options.folder)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
