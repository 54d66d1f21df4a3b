"""Figures of a sweep, made from its two files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedmira.reports import paper
from fedmira.reports.sweeps import ordered, sweep_plots, write_sweep_figures

needs_matplotlib = pytest.mark.skipif(
    not paper.available(), reason="matplotlib is not installed: pip install 'fedmira[figures]'"
)


def write_sweep(folder: Path, keys: Sequence[str], points: Sequence[tuple[Any, ...]]) -> Path:
    """mira at every point, with mean 1, 2, ... and half width a tenth of it; local at the first alone."""
    folder.mkdir(parents=True)
    told = [{"folder": f"p{place}", **dict(zip(keys, some, strict=True))} for place, some in enumerate(points)]
    (folder / "sweep.json").write_text(json.dumps({"keys": list(keys), "points": told}))
    lines = ["loss,local,0.5,,p0\n"] + [f"loss,mira,{n + 1},{(n + 1) / 10},p{n}\n" for n in range(len(points))]
    (folder / "sweep.csv").write_text("metric,method,mean,half_width,folder\n" + "".join(lines))
    return folder


def test_values_are_ordered_as_numbers_where_they_are_numbers() -> None:
    assert ordered([0.3, 1, 0.01, 0.3]) == [0.01, 0.3, 1]
    assert ordered(["sgd", "adamw", "sgd"]) == ["sgd", "adamw"]
    assert ordered([0.1, "auto", 0.01]) == [0.1, "auto", 0.01]
    assert ordered([True, False]) == [True, False]


def test_one_setting_makes_a_curve_of_each_metric_with_the_numbers_of_the_table(tmp_path: Path) -> None:
    (plot,) = sweep_plots(write_sweep(tmp_path / "out", ["lambda"], [(0.1,), (0.6,)]))
    table = list(csv.reader(io.StringIO(plot.tables["sensitivity-loss.csv"])))
    assert table == [
        ["lambda", "method", "mean", "half_width"],
        ["0.1", "local", "0.5", ""],
        ["0.1", "mira", "1.0", "0.1"],
        ["0.6", "mira", "2.0", "0.2"],
    ]


def test_two_settings_make_a_heat_map_of_each_method_that_has_them_and_three_make_none(tmp_path: Path) -> None:
    two = sweep_plots(write_sweep(tmp_path / "two", ["lambda", "r"], [(0.1, 1), (0.1, 2), (0.6, 1)]))
    assert [plot.name for plot in two] == ["heat-map-loss-mira"]
    assert two[0].tables["heat-map-loss-mira.csv"].splitlines()[2] == "0.1,2,2.0,0.2"
    assert sweep_plots(write_sweep(tmp_path / "three", ["a", "b", "c"], [(1, 2, 3)])) == []


@needs_matplotlib
@pytest.mark.parametrize(
    "values",
    [
        pytest.param((0.01, 0.1, 1.0), marks=pytest.mark.slow),
        pytest.param((1, 2, 3), marks=pytest.mark.slow),
        ("adamw", "sgd", "$x$"),
        pytest.param((0.1, "auto", None), marks=pytest.mark.slow),
    ],
)
def test_a_curve_names_its_values_and_is_the_same_every_time(values: Sequence[Any], tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "out", ["x"], [(value,) for value in values])
    once = {path.name: path.read_bytes() for path in write_sweep_figures(folder)}
    assert set(once) == {f"sensitivity-loss.{kind}" for kind in ("svg", "pdf", "png", "csv")}
    assert {path.name: path.read_bytes() for path in write_sweep_figures(folder)} == once
    drawn = ["".join(one.itertext()) for one in ElementTree.fromstring(once["sensitivity-loss.svg"]).iter() if one.text]
    shown = {value if isinstance(value, str) else json.dumps(value) for value in values} - {"1", "2", "3"}
    assert shown <= set(drawn)
    assert {"x", "Test loss", "local", "mira"} <= set(drawn)
    assert not any("math" in text for text in drawn)


@needs_matplotlib
def test_a_heat_map_has_the_mean_in_each_cell_and_leaves_out_what_was_not_run(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "out", ["lambda", "r"], [(0.1, 1), (0.1, 2), (0.6, 1)])
    written = {path.name: path for path in write_sweep_figures(folder)}
    assert written["heat-map-loss-mira.svg"].parent == folder / "figures"
    drawn = ["".join(one.itertext()) for one in ElementTree.parse(written["heat-map-loss-mira.svg"]).iter() if one.text]
    assert {"1.000", "2.000", "3.000", "lambda", "0.6"} <= set(drawn)
    assert not any(text == "n/a" for text in drawn)
