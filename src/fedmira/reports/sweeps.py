"""Figures of a sweep, from sweep.csv and sweep.json: a curve for one swept setting, heat maps for two."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.disk.files import make_folder
from fedmira.reports.paper import COLUMN, Look, Plot, looks_of, new_figure, put_legend, table_of, write_plots
from fedmira.reports.results import LOWER_IS_BETTER
from fedmira.reports.wording import clean, number, title

TABLE, POINTS, FIGURES = "sweep.csv", "sweep.json", "figures"
WIDE_RANGE = 8  # largest over smallest value from which on an axis is logarithmic


class Cell(NamedTuple):
    """One method at one point. values: of the swept settings, in their order; half_width: NaN = n/a."""

    values: tuple[Any, ...]
    method: str
    mean: float
    half_width: float


def write_sweep_figures(output: Path) -> list[Path]:
    """Write OUTPUT/figures/ of a sweep of one or two settings; return the files, none for more settings.

    Raises StoreError if they cannot be written.
    """
    plots = sweep_plots(output)
    if not plots:
        return []
    make_folder(output / FIGURES)
    return write_plots(plots, output / FIGURES)


def sweep_plots(output: Path) -> list[Plot]:
    """Return a curve over one setting for each metric, or a heat map over two for each metric and method."""
    stored = json.loads((output / POINTS).read_text(encoding="utf-8"))
    keys = [str(key) for key in stored["keys"]]
    values = {point["folder"]: tuple(point[key] for key in keys) for point in stored["points"]}
    cells: dict[str, list[Cell]] = {}
    with (output / TABLE).open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            numbers = (float(line[name]) if line[name] else math.nan for name in ("mean", "half_width"))
            cells.setdefault(line["metric"], []).append(Cell(values[line["folder"]], line["method"], *numbers))
    if len(keys) == 1:
        return [_curve(metric, keys[0], some) for metric, some in cells.items()]
    if len(keys) > 2:
        return []
    methods = {metric: dict.fromkeys(cell.method for cell in some) for metric, some in cells.items()}
    return [
        _heat_map(metric, method, keys, [cell for cell in cells[metric] if cell.method == method])
        for metric, labels in methods.items()
        for method in labels
        if sum(cell.method == method for cell in cells[metric]) > 1
    ]


def ordered(values: Sequence[Any]) -> list[Any]:
    """Return each value once: numbers ascending, else in the order of the sweep."""
    once = [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]
    return sorted(once) if _are_numbers(once) else once


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _text(value: Any) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value))


def _curve(metric: str, key: str, cells: Sequence[Cell]) -> Plot:
    """Mean and interval against the setting; a method that does not have it is a level line."""
    by_method: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, {})[_text(cell.values[0])] = cell
    axis = ordered([cell.values[0] for cell in cells])
    numbers = _are_numbers(axis)
    looks = looks_of(list(by_method), "local")

    def draw() -> Any:
        figure, plane = new_figure(COLUMN)
        for method, found in by_method.items():
            if len(found) == 1 and len(axis) > 1:
                (only,) = found.values()
                look = looks[method]
                plane.axhline(only.mean, color=look.colour, linestyle=look.dash, label=clean(method), zorder=1)
                continue
            _draw_line(plane, method, looks[method], axis, found, numbers=numbers)
        if numbers and min(axis) > 0 and max(axis) >= WIDE_RANGE * min(axis):
            plane.set_xscale("log")
            plane.set_xticks(axis, [_text(value) for value in axis])
            plane.minorticks_off()
        if not numbers:
            plane.set_xticks(range(len(axis)), [_text(value) for value in axis])
        plane.set_xlabel(clean(key))
        plane.set_ylabel(title(metric))
        put_legend(plane, len(by_method))
        return figure

    name = f"sensitivity-{metric}"
    rows = [[_text(cell.values[0]), cell.method, cell.mean, cell.half_width] for cell in cells]
    return Plot(name, draw, {f"{name}.csv": table_of((key, "method", "mean", "half_width"), rows)})


def _draw_line(
    plane: Any, method: str, look: Look, axis: Sequence[Any], found: Mapping[str, Cell], *, numbers: bool
) -> None:
    """Draw a method's mean and interval at each of its values."""
    there = [(place, value) for place, value in enumerate(axis) if _text(value) in found]
    here = [found[_text(value)] for _, value in there]
    plane.errorbar(
        [value if numbers else place for place, value in there],
        [cell.mean for cell in here],
        yerr=[0.0 if math.isnan(cell.half_width) else cell.half_width for cell in here],
        color=look.colour,
        linestyle=look.dash,
        marker=look.mark,
        capsize=2,
        elinewidth=0.7,
        label=clean(method),
    )


def _heat_map(metric: str, method: str, keys: Sequence[str], cells: Sequence[Cell]) -> Plot:
    """The mean at each pair of values, also written in its cell; the lighter, the better."""
    columns, rows = ([_text(value) for value in ordered([cell.values[of] for cell in cells])] for of in (0, 1))
    table = [[math.nan] * len(columns) for _ in rows]
    for cell in cells:
        table[rows.index(_text(cell.values[1]))][columns.index(_text(cell.values[0]))] = cell.mean

    def draw() -> Any:
        figure, plane = new_figure(COLUMN)
        finite = [value for line in table for value in line if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        down = metric in LOWER_IS_BETTER
        mesh = plane.pcolormesh(table, cmap="cividis_r" if down else "cividis", vmin=low, vmax=high, edgecolors="#fff")
        for row, line in enumerate(table):
            for column, value in enumerate(line):
                share = (value - low) / (high - low) if high > low else 0.0
                light = share < 0.5 if down else share >= 0.5
                ink = "#000" if light or not math.isfinite(value) else "#fff"
                said = "" if math.isnan(value) else number(value)
                plane.text(column + 0.5, row + 0.5, said, ha="center", va="center", fontsize=7, color=ink)
        plane.set_xticks([place + 0.5 for place in range(len(columns))], columns)
        plane.set_yticks([place + 0.5 for place in range(len(rows))], rows)
        plane.tick_params(length=0)
        plane.set_xlabel(clean(keys[0]))
        plane.set_ylabel(clean(keys[1]))
        figure.colorbar(mesh, ax=plane, label=title(metric))
        return figure

    name = f"heat-map-{metric}-{method}"
    lines = [[*map(_text, cell.values), cell.mean, cell.half_width] for cell in cells]
    return Plot(name, draw, {f"{name}.csv": table_of((*keys, "mean", "half_width"), lines)})
