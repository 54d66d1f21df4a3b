"""Hand-made study folders for the report tests."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedmira.runs import RESULT_COLUMNS

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
