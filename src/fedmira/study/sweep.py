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

SECTIONS = ("model", "lora", "data", "federation", "training", "evaluation")
Grid = Mapping[str, Sequence[Any]]  # what a user calls a setting -> its values


@dataclass(frozen=True)
class Axis:
    """A setting and its values. words: where it is in the config; of_methods: the entries that have it, by place."""

    key: str
    values: Sequence[Any]
    words: tuple[str, ...] = ()
    of_methods: tuple[int, ...] = ()


@dataclass(frozen=True)
class Point:
    """One study of a sweep: values by setting, its folder's name, its config."""

    values: Mapping[str, Any]
    name: str
    config: Config


def split_words(words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Return what is swept, `key=v1,v2`, and the overrides among words of a command line: those with one value."""
    grid: dict[str, list[Any]] = {}
    overrides = []
    for word in words:
        key, equals, text = word.partition("=")
        values = [parse_yaml(part, word) for part in text.split(",")] if "," in text and text[:1] not in "[{" else []
        if equals and len(values) > 1:
            grid[key] = values
        else:
            overrides.append(word)
    return grid, overrides


def plan_sweep(path: str | Path, grid: Grid, overrides: Sequence[str] = ()) -> list[Point]:
    """Return the points of a sweep, each checked as a config. Raises ConfigError that lists every fault."""
    config = load_config(path, overrides)
    if not grid:
        raise ConfigError(["nothing is swept; give a setting several values, such as lora.r=4,8,16"], "sweep")
    faults: list[str] = []
    axes = []
    for key, values in grid.items():
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            faults.append(f"{key}: a value is given twice")
        found = _axis(key, values, config)
        if isinstance(found, str):
            faults.append(found)
        else:
            axes.append(found)
    if faults:
        raise ConfigError(faults, "sweep")
    return _points(config, axes, str(path))


def _axis(key: str, values: Sequence[Any], config: Config) -> Axis | str:
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


def _points(config: Config, axes: Sequence[Axis], source: str) -> list[Point]:
    """Make the config of every point; a method stands where no setting that it does not have has another value."""
    points, faults = [], []
    for chosen in itertools.product(*(range(len(axis.values)) for axis in axes)):
        values = {axis.key: axis.values[place] for axis, place in zip(axes, chosen, strict=True)}
        name = "_".join(f"{_plain(key)}-{_plain(value)}" for key, value in values.items())
        raw: dict[str, Any] = {**config.model_dump(by_alias=True), "output_dir": str(Path(config.output_dir) / name)}
        entries = [entry.as_written for entry in config.methods]
        stays = [True] * len(entries)
        for axis, place in zip(axes, chosen, strict=True):
            if not axis.of_methods:
                _set(raw, axis.words, axis.values[place])
                continue
            for index, entry in enumerate(entries):
                if index in axis.of_methods:
                    _set(entry, axis.words, axis.values[place])
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


def sweep(points: Sequence[Point], observer: Observer, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Carry out every point; return the lines of the table, which are written beside the studies.

    Where matplotlib is installed, figures of one or two swept settings are written too.
    """
    check_trackers(points[0].config.report_to)
    check_container(Path(points[0].config.output_dir).parent)
    commons: dict[str, Common] = {}
    for point in points:
        carry_on(point.config, commons.setdefault(_shared(point.config), Common()), observer, overwrite=overwrite)
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
    same = [parts["model"], parts["data"], parts["lora"]["target_modules"], parts["evaluation"], parts["report"]]
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
