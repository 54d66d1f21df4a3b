"""Run a study at every point of a grid of settings, and put the results beside each other.

Every point is a study in a folder of its own, as `fedmira run` makes it; points of the same data and base share both,
and the scores of the untouched base. A method that does not have a swept setting is run with its first value alone.
What is complete is used again, what was stopped goes on, and values may be added.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.config.sections import Config
from fedmira.config.yaml_text import parse_yaml
from fedmira.disk.files import write_atomic, write_json
from fedmira.engine.events import Observer
from fedmira.errors import ConfigError, nearest
from fedmira.methods import load
from fedmira.reports.paper import available
from fedmira.reports.record import read_study
from fedmira.reports.sweeps import POINTS, TABLE, write_sweep_figures
from fedmira.study.compare import carry_on, check_container
from fedmira.study.loading import check, load_config
from fedmira.study.run import Common
from fedmira.study.trackers import check_trackers

CHOOSE_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # keys of lora
SECTIONS = ("model", "lora", "data", "federation", "training", "evaluation")
WIDE = 8  # high over low from which on a range is searched by its logarithm
_RANGE = re.compile(r"(-?\d[^,\[{]*?)\.\.(-?[.\d][^,\[{]*)")


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, for `--trials`; whole: integers alone."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def wide(self) -> bool:
        return self.low > 0 and self.high / self.low >= WIDE


Grid = Mapping[str, Sequence[Any] | Range]  # what a user calls a setting -> its values


@dataclass(frozen=True)
class Axis:
    """A setting and its values. words: where it is in the config; of_methods: the entries that have it, by place."""

    key: str
    values: Sequence[Any] | Range
    words: tuple[str, ...] = ()
    of_methods: tuple[int, ...] = ()


@dataclass(frozen=True)
class Point:
    """One study of a sweep: values by setting, its folder's name, its config."""

    values: Mapping[str, Any]
    name: str
    config: Config


def split_words(words: Sequence[str]) -> tuple[dict[str, list[Any] | Range], list[str]]:
    """Return what is swept, `key=v1,v2` or `key=low..high`, and the overrides among words of a command line.

    Raises ConfigError if a range does not go up.
    """
    grid: dict[str, list[Any] | Range] = {}
    overrides = []
    for word in words:
        key, equals, text = word.partition("=")
        if ends := _RANGE.fullmatch(text):
            low, high = (parse_yaml(part, word) for part in ends.groups())
            if not all(type(one) in (int, float) for one in (low, high)) or low >= high:
                raise ConfigError([f"{word}: a range is two numbers, the lower first, such as 1e-4..1e-2"], "sweep")
            grid[key] = Range(low, high)
            continue
        values = [parse_yaml(part, word) for part in text.split(",")] if "," in text and text[:1] not in "[{" else []
        if equals and len(values) > 1:
            grid[key] = values
        else:
            overrides.append(word)
    return grid, overrides


def plan_sweep(path: str | Path, grid: Grid, overrides: Sequence[str] = ()) -> list[Point]:
    """Return the points of a sweep, each checked as a config. Raises ConfigError that lists every fault."""
    config = load_config(path, overrides)
    if ranges := [key for key, values in grid.items() if isinstance(values, Range)]:
        raise ConfigError([f"{key}: a range is searched, with --trials N, and not swept" for key in ranges], "sweep")
    return points_of(config, axes_of(grid, config), str(path))


def axes_of(grid: Grid, config: Config) -> list[Axis]:
    """Find every setting that is swept. Raises ConfigError that lists every fault."""
    if not grid:
        raise ConfigError(["nothing is swept; give a setting several values, such as lora.r=4,8,16"], "sweep")
    faults: list[str] = []
    axes = []
    for key, values in grid.items():
        if not isinstance(values, Range) and len({json.dumps(one, sort_keys=True) for one in values}) < len(values):
            faults.append(f"{key}: a value is given twice")
        found = _axis(key, values, config)
        if isinstance(found, str):
            faults.append(found)
        else:
            axes.append(found)
    if faults:
        raise ConfigError(faults, "sweep")
    return axes


def _axis(key: str, values: Sequence[Any] | Range, config: Config) -> Axis | str:
    """Find a setting in the config, or in the methods, by its whole path or its name; a fault if it is not one."""
    words = tuple(key.split("."))
    if words[0] in SECTIONS and len(words) > 1:
        return Axis(key, values, words)
    if len(words) == 1:
        homes = [name for name in SECTIONS if key in type(getattr(config, name)).model_fields]
        if len(homes) == 1:
            return Axis(key, values, (homes[0], key))
        if homes:
            return f"{key}: is a key of {' and of '.join(homes)}; write it whole, such as {homes[0]}.{key}"
    owners = tuple(place for place, entry in enumerate(config.methods) if words[0] in _settings_of(entry.name))
    if owners:
        return Axis(key, values, words, owners)
    known = [name for section in SECTIONS for name in type(getattr(config, section)).model_fields]
    known += [name for entry in config.methods for name in _settings_of(entry.name)]
    return f"{key}: no section and no method of this config has it{nearest(words[0], known)}"


def _settings_of(name: str) -> list[str]:
    """Names of a method's settings, as in YAML."""
    return [field.alias or key for key, field in load(name).Config.model_fields.items()]


def points_of(config: Config, axes: Sequence[Axis], source: str) -> list[Point]:
    """Make the config of every point; a method stands where no setting that it does not have has another value.

    Raises ConfigError that lists the faults of every point.
    """
    points, faults = [], []
    lists = [[] if isinstance(axis.values, Range) else list(axis.values) for axis in axes]
    for chosen in itertools.product(*(range(len(some)) for some in lists)):
        values = {axis.key: some[place] for axis, some, place in zip(axes, lists, chosen, strict=True)}
        name = "_".join(f"{_plain(key)}-{_plain(value)}" for key, value in values.items())
        raw: dict[str, Any] = {**config.model_dump(by_alias=True), "output_dir": str(Path(config.output_dir) / name)}
        entries = [entry.as_written for entry in config.methods]
        stays = [True] * len(entries)
        for axis, place in zip(axes, chosen, strict=True):
            value = values[axis.key]
            if not axis.of_methods:
                _set(raw, axis.words, value)
                continue
            for index, entry in enumerate(entries):
                if index in axis.of_methods:
                    _set(entry, axis.words, value)
                elif place:
                    stays[index] = False
        raw["methods"] = [entry for entry, stays_here in zip(entries, stays, strict=True) if stays_here]
        try:
            points.append(Point(values, name, check(raw, source)))
        except ConfigError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"several points would be in a folder called {twice[0]}; sweep values whose names differ")
    if faults:
        raise ConfigError(faults, "sweep")
    return points


def _set(raw: dict[str, Any], words: Sequence[str], value: Any) -> None:
    """Set one value in a mapping of mappings."""
    for word in words[:-1]:
        inner = raw.get(word)
        raw[word] = dict(inner) if isinstance(inner, Mapping) else {}
        raw = raw[word]
    raw[words[-1]] = value


def _plain(value: Any) -> str:
    """Write a value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text)


class Commons:
    """What studies of a sweep share, by their data, base and evaluation."""

    def __init__(self) -> None:
        self._by: dict[str, Common] = {}

    def carry_on(self, point: Point, observer: Observer, *, overwrite: bool) -> None:
        """Begin the study of a point, or go on with it."""
        common = self._by.setdefault(_shared(point.config), Common())
        for other in self._by.values():
            if other is not common:
                other.close()  # its actors would hold what this one needs to start
        carry_on(point.config, common, observer, overwrite=overwrite)

    def close(self) -> None:
        """End what was started for the studies."""
        for common in self._by.values():
            common.close()


def sweep(points: Sequence[Point], observer: Observer, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Carry out every point; return the lines of the table, which are written beside the studies."""
    check_trackers(points[0].config.report_to)
    check_container(Path(points[0].config.output_dir).parent)
    with closing(Commons()) as commons:
        for point in points:
            commons.carry_on(point, observer, overwrite=overwrite)
    return write_table(points)


def write_table(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Write sweep.csv and sweep.json beside the studies; return the lines.

    Where matplotlib is installed, figures of one or two swept settings are written too.
    """
    output = Path(points[0].config.output_dir).parent
    lines = table(points)
    keys = list(points[0].values)
    write_json(output / POINTS, {"keys": keys, "points": [{"folder": one.name, **one.values} for one in points]})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(output / TABLE, buffer.getvalue().encode())
    if available():
        write_sweep_figures(output)
    return lines


def _shared(config: Config) -> str:
    """What two studies have in common that can share a base, their data, and the scores of the untouched base."""
    parts = config.model_dump(mode="json", by_alias=True)
    layers = [parts["lora"][key] for key in CHOOSE_LAYERS]
    same = [parts["model"], parts["data"], layers, parts["evaluation"], parts["report"]]
    return json.dumps(same, sort_keys=True)


def table(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return a line for each point, metric and method: mean over clients, its interval, against training alone."""
    lines = []
    for point in points:
        record = read_study(Path(point.config.output_dir))
        for metric in record.metrics:
            for item in metric.methods:
                against = item.against
                lines.append(
                    {
                        **point.values,
                        "metric": metric.name,
                        "method": item.method,
                        "mean": item.mean,
                        "half_width": item.half_width,
                        "worst": item.worst,
                        "difference": None if against is None else against.difference,
                        "p": None if against is None else against.p,
                        "folder": point.name,
                    }
                )
    return lines
