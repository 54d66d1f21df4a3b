"""The stored results of the benchmarks: reading them, finding a row, and formatting figures uniformly."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNITS = {
    "a": "training-a",
    "A": "training-a-random",  # not by case alone: some file systems ignore it
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
    """Return stored results by name, in measuring order. Raises SystemExit for a file that is not JSON."""
    results = {}
    for name in (*CORE, *FULL):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            results[name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SystemExit(f"{path}: not JSON ({error}); measure it again or remove the file") from None
    return results


def unit_row(results: Results, unit: str) -> Result | None:
    """Return the row of a unit of training."""
    rows: Sequence[Result] = results.get(UNITS[unit], {}).get("rows", [])
    return next((row for row in rows if row["unit"] == unit), None)


def study_rows(results: Results) -> list[Result]:
    return [row for row in results.get("clients", {}).get("rows", []) if row["name"] != "resume"]


def resume_row(results: Results) -> Result | None:
    return next((row for row in results.get("clients", {}).get("rows", []) if row["name"] == "resume"), None)


def row_parts(result: Result) -> dict[str, Result]:
    """Return the parts measured by scale/rows.py, in order."""
    return {name: part for name, part in result.items() if isinstance(part, dict) and "RssAnon" in part}


def spread(values: Sequence[float]) -> str:
    """Return the median, the smallest and the largest value as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
