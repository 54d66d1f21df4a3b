"""Mean matrices by hand: over seeds, minus the own adapter, clients without a test, and the files for papers."""

import csv
from pathlib import Path
from typing import Any

import pytest
from tests.reports.hand_made import rows

from fedmira.disk.folders import MATRIX
from fedmira.reports import paper
from fedmira.reports.crossing import crossings, write_crossings
from fedmira.reports.record import read_study


def write_matrix(run: Path, table: dict[str, dict[str, float | None]]) -> None:
    lines = [f"{k},{c},{'' if loss is None else loss}" for k, losses in table.items() for c, loss in losses.items()]
    (run / MATRIX).write_text("\n".join(["adapter,client,loss", *lines]) + "\n", encoding="utf-8")


@pytest.fixture
def crossed(study: Path, write_run: Any) -> Path:
    tables: list[dict[str, dict[str, float | None]]] = [
        {
            "a": {"a": 2.0, "b": 4.0, "c": None},
            "b": {"a": 1.0, "b": 3.0, "c": None},
            "c": {"a": 5.0, "b": 9.0, "c": None},
        },
        {
            "a": {"a": 4.0, "b": 2.0, "c": None},
            "b": {"a": 2.0, "b": 2.0, "c": None},
            "c": {"a": 7.0, "b": 1.0, "c": None},
        },
    ]
    for seed, table in enumerate(tables):
        write_matrix(write_run("mira", rows({"a": 1, "b": 2, "c": None}), seed=seed), table)
    write_run("fedavg", rows({"a": 1, "b": 2, "c": None}))
    return study


def test_means_over_seeds_and_who_would_gain(crossed: Path) -> None:
    (one,) = crossings(read_study(crossed))
    assert (one.label, one.seeds, list(one.clients)) == ("mira", 2, ["a", "b", "c"])
    assert one.losses == [[3.0, 3.0, None], [1.5, 2.5, None], [6.0, 5.0, None]]
    assert one.differences == [[0.0, 0.5, None], [-1.5, 0.0, None], [3.0, 2.5, None]]
    assert one.better_elsewhere == 1  # a, with the adapter of b


@pytest.mark.slow
def test_files_beside_the_study(crossed: Path, tmp_path: Path) -> None:
    write_crossings(read_study(crossed), tmp_path / "matrix")
    kinds = {path.suffix for path in (tmp_path / "matrix").iterdir()}
    assert kinds == ({".csv", ".svg", ".pdf", ".png"} if paper.available() else {".csv"})
    with (tmp_path / "matrix" / "matrix-mira.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[3] == {"adapter": "b", "client": "a", "loss": "1.5", "minus_own": "-1.5"}
    assert lines[2] == {"adapter": "a", "client": "c", "loss": "", "minus_own": ""}
