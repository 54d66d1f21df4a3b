"""What the benchmarks stored: reading it, finding a row in it, and writing figures down the same way everywhere."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNITS = {
    "a": "training-a",
    "A": "training-a-random",  # not by case alone: some disks ignore it
    "b": "training-b",
    "B": "training-b-random",
    "c": "training-c",
}
CORE = ("training-a", "training-b", "training-c", "cohorts", "generation", "merge", "flexlora")
FULL = ("training-a-random", "training-b-random", "clients", "rows", "natural-instructions", "gpu")
MB, GB = 1e6, 1e9
Result = Mapping[str, Any]
Results = Mapping[str, Result]


def read_results(folder: Path) -> dict[str, Result]:
    """Stored results by name, in the order in which they are measured. Raises SystemExit for a file that is no JSON."""
    found = {}
    for name in (*CORE, *FULL):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SystemExit(f"{path}: no JSON ({error}); measure it again or remove the file") from None
    return found


def unit_row(found: Results, unit: str) -> Result | None:
    """The row of a unit of training."""
    rows: Sequence[Result] = found.get(UNITS[unit], {}).get("rows", [])
    return next((row for row in rows if row["unit"] == unit), None)


def study_rows(found: Results) -> list[Result]:
    return [row for row in found.get("clients", {}).get("rows", []) if row["name"] != "resume"]


def resume_row(found: Results) -> Result | None:
    return next((row for row in found.get("clients", {}).get("rows", []) if row["name"] == "resume"), None)


def row_parts(result: Result) -> dict[str, Result]:
    """What scale/rows.py measured one after another."""
    return {name: part for name, part in result.items() if isinstance(part, dict) and "RssAnon" in part}


def spread(values: Sequence[float]) -> str:
    """Median and both ends."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
