"""Run the benchmarks row by row, store their results, and write docs/results/speed.md and its figures from them.

    python benchmarks/bench.py core [--only NAME ...]    the quick rows on the CPU: `make bench`
    python benchmarks/bench.py full [--only NAME ...]    the other rows: `make bench-full`
    python benchmarks/bench.py page                      only the page, from stored results

--only selects rows of either kind by name.

Rows run one after another, each in a separate process whose output is shown. The result of a row is stored in
benchmarks/results/NAME.json if it succeeded; a row that fails leaves the older file, the others continue, and the exit
status is 1. Stored files are in git: the page can be written again without measuring.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_page import write_page
from stored import CORE, FULL, UNITS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Row:
    """One script with its options. gpu: only with CUDA."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def command(self) -> str:
        return " ".join(["python", f"benchmarks/{self.script}", *self.options])


ROWS = (
    # Each unit of training is a separate row: peak memory is measured per process.
    *(Row(name, "speed/training.py", ("--units", unit, "--pairs", "5")) for unit, name in UNITS.items()),
    Row("cohorts", "speed/cohorts.py"),
    Row("generation", "speed/generation.py"),
    Row("merge", "server/merge.py"),
    Row("flexlora", "server/flexlora.py"),
    Row("clients", "scale/clients.py", ("--full",)),
    Row("rows", "scale/rows.py"),
    Row("natural-instructions", "scale/natural_instructions.py"),
    Row("gpu", "speed/gpu.py", gpu=True),
)


def store(result: dict[str, Any], path: Path) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def run_row(row: Row, results: Path) -> str:
    """Run a row and store its result; return the error, "" if there is none."""
    with tempfile.TemporaryDirectory(prefix="fedmira-bench-row-") as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, str(HERE / row.script), *row.options, "--json", str(path)]
        began = time.monotonic()
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
        seconds = time.monotonic() - began
        if ended.returncode:
            return f"exit status {ended.returncode}"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"exit status 0, but no readable JSON: {error}"
    if "machine" not in result:
        from machine import describe

        result["machine"] = describe()
    store({**result, "command": row.command, "seconds": round(seconds, 1)}, results / f"{row.name}.json")
    return ""


def cuda_at_hand() -> bool:
    import torch

    return torch.cuda.is_available()


def run_rows(rows: Sequence[Row], results: Path, *, cuda: Callable[[], bool] = cuda_at_hand) -> list[str]:
    """Run rows one after another; return the names of those that failed."""
    failed, began = [], time.monotonic()
    for number, row in enumerate(rows, start=1):
        if row.gpu and not cuda():
            print(f"== {row.name}: no CUDA device; on a machine with one run: {row.command}", flush=True)
            continue
        print(f"== {row.name} ({number} of {len(rows)}): {row.command}", flush=True)
        start = time.monotonic()
        fault = run_row(row, results)
        spent = time.monotonic() - start
        if fault:
            failed.append(row.name)
        older = " An older result stays." if fault and (results / f"{row.name}.json").is_file() else ""
        print(f"== {row.name}: {f'FAILED, {fault}.{older}' if fault else 'done'} ({spent:.0f} s)", flush=True)
    total = (time.monotonic() - began) / 60
    print(f"== {len(rows)} rows in {total:.1f} minutes; failed: {', '.join(failed) or 'none'}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected rows, write the page, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the stored JSON")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder that gets the page and its figures")
    what = parser.add_subparsers(dest="what", required=True)
    every = [row.name for row in ROWS]
    for name, names, about in (("core", CORE, "the quick rows on the CPU"), ("full", FULL, "the other rows")):
        part = what.add_parser(name, help=f"{about}: {', '.join(names)}")
        part.add_argument("--only", nargs="+", choices=every, default=names, metavar="NAME", dest="names")
    what.add_parser("page", help="only write the page").set_defaults(names=())
    options = parser.parse_args(arguments)
    chosen = [row for row in ROWS if row.name in options.names]
    failed = run_rows(chosen, options.results) if chosen else []
    for path in write_page(options.results, options.docs):
        print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
