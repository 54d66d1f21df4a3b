"""Hand-made study folders for the report tests."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.reports.hand_made import curve_rows, rows

from fedmira.disk.folders import RESULT_COLUMNS

Row = tuple[object, ...]
WriteRun = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "check"


@pytest.fixture
def write_run(study: Path) -> WriteRun:
    """Write STUDY/<label>/seed-<n>/ from rows (client, round, split, metric, value); None = n/a."""

    def write(label: str, rows: Iterable[Row], *, seed: int = 0, view: str = "personal", **record: Any) -> Path:
        run = study / label / f"seed-{seed}"
        run.mkdir(parents=True, exist_ok=True)
        with (run / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(RESULT_COLUMNS)
            for client, number, split, metric, value in rows:
                writer.writerow([client, label, seed, number, view, split, metric, "" if value is None else value])
        fields = {"state": "complete", "seed": seed, "method": label, "label": label, **record}
        (run / "run.json").write_text(json.dumps(fields), encoding="utf-8")
        return run

    return write


@pytest.fixture
def pair(study: Path, write_run: WriteRun) -> Path:
    """local and mira on two clients, with a round 0 and two metrics."""
    start = rows({"a": 5, "b": 7}, number=0) + rows({"a": 0.1, "b": 0.1}, "rouge_l", number=0)
    write_run("local", [*start, *curve_rows(5, 4, 3), *rows({"a": 3, "b": 5}), *rows({"a": 0.5, "b": 0.2}, "rouge_l")])
    write_run("mira", [*start, *curve_rows(5, 3, 2), *rows({"a": 2, "b": 4}), *rows({"a": 0.6, "b": 0.2}, "rouge_l")])
    return study
