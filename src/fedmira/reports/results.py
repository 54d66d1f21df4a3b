"""The results.csv of a study's runs, read into one table of rows."""

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.disk.client_names import from_cell, read_client_names
from fedmira.disk.folders import NAME_COLUMN, RESULT_COLUMNS
from fedmira.errors import StoreError
from fedmira.names import ONLY_IDS

LOWER_IS_BETTER = frozenset({"loss"})


class Row(NamedTuple):
    """One line of results.csv; value NaN = n/a. The fields are RESULT_COLUMNS, in that order, and the name."""

    client: str
    method: str
    seed: int
    round: int
    view: str
    split: str
    metric: str
    value: float
    name: str = ""  # of the client, in the data


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of all runs of a study, methods in the order of its config.

    kept: (method, seed) of the runs that keep the adapters of the best rounds. There a client has two test results of a
    metric: of the round whose adapter it keeps, and of the last round, unless that is the same.
    """

    rows: list[Row]
    kept: frozenset[tuple[str, int]] = frozenset()

    @cached_property
    def clients(self) -> list[str]:
        """Each client once, in order of appearance."""
        return list(dict.fromkeys(row.client for row in self.rows))

    @cached_property
    def methods(self) -> list[str]:
        """Each method once, in order of appearance."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def where(self, keep: Callable[[Row], bool]) -> "Results":
        """Return the results with only the rows for which `keep` is true."""
        return Results([row for row in self.rows if keep(row)], self.kept)

    def of(self, *, metric: str, split: str) -> list[Row]:
        """Return the rows of one metric and split."""
        return self._sorted.get((metric, split), [])

    @cached_property
    def _sorted(self) -> dict[tuple[str, str], list[Row]]:
        sorted_rows: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            sorted_rows.setdefault((row.metric, row.split), []).append(row)
        return sorted_rows


def find_runs(study: Path) -> list[Path]:
    """List the run folders STUDY/<method>/seed-<n>, methods in the order of STUDY/config.yaml, then by name and seed.

    Raises StoreError if there is no such folder or it contains no run.
    """
    runs = [
        run
        for run in study.glob("*/seed-*")
        if run.name.removeprefix("seed-").isdigit()
        and ((run / "run.json").is_file() or (run / "results.csv").is_file())
    ]
    if not runs:
        fault = "has no <method>/seed-<n>/ with results" if study.is_dir() else "is not a folder"
        raise StoreError(f"'{study}' {fault}: a study is the output_dir of 'fedmira run'; give that folder")
    order = _configured_order(study / "config.yaml")
    return sorted(
        runs,
        key=lambda run: (
            order.get(run.parent.name, len(order)),
            run.parent.name,
            int(run.name.removeprefix("seed-")),
        ),
    )


def read_results(study: Path, runs: Sequence[Path] | None = None) -> Results:
    """Read the results of all runs of a study; runs: as listed by find_runs, None = look them up.

    A loss that was written as `nan` has diverged and is read as infinite: as n/a it would make its method look better.
    Of a row that was written twice (by a resumed run) the last one counts.
    Raises StoreError if there are no results, or a file is damaged.
    """
    folders = find_runs(study) if runs is None else runs
    files = [run / "results.csv" for run in folders if (run / "results.csv").is_file()]
    rows = [row for file in files for row in _read_file(file)]
    if not rows:
        raise StoreError(f"'{study}' has no results yet: a run writes results.csv when it has been evaluated")
    return Results(rows)


def _read_file(path: Path) -> Iterator[Row]:
    """Read one results.csv. Raises StoreError with the file and what is wrong in it."""
    try:
        header, *lines = list(csv.reader(_whole_lines(path).splitlines(keepends=True), strict=True)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise StoreError(f"'{path}' cannot be read as CSV ({error}): resume the run to write it again") from None
    missing = [name for name in RESULT_COLUMNS if name not in header]
    if missing:
        raise StoreError(f"'{path}' has no column {', '.join(missing)}: results.csv has {', '.join(RESULT_COLUMNS)}")
    columns = [header.index(name) for name in RESULT_COLUMNS]
    named = header.index(NAME_COLUMN) if NAME_COLUMN in header else None
    names = read_client_names(path.parent) if named is None else ONLY_IDS
    last: dict[tuple[Any, ...], Row] = {}
    for line in filter(None, lines):
        if len(line) != len(header):
            raise StoreError(
                f"'{path}' cannot be read as CSV ({len(line)} values under {len(header)} columns): resume the run to "
                "write it again"
            )
        row = _read_row(path, [line[column] for column in columns])
        name = names.name(row.client) if named is None else from_cell(line[named])
        key = row[: len(RESULT_COLUMNS) - 1]
        last.pop(key, None)  # the last one counts, and keeps its position
        last[key] = row._replace(name=name)
    yield from last.values()


def _read_row(path: Path, line: list[str]) -> Row:
    client, method, seed, number, view, split, metric, written = line
    try:
        value = float(written) if written.strip() else None
        row = Row(client, method, int(seed), int(number), view, split, metric, math.nan if value is None else value)
    except ValueError as error:
        raise StoreError(
            f"'{path}' has a seed, round or value that is not a number ({error}): n/a is written as an empty value"
        ) from None
    diverged = value is not None and math.isnan(value) and metric in LOWER_IS_BETTER
    return row._replace(value=math.inf) if diverged else row


def _whole_lines(path: Path) -> str:
    """Read a CSV file without a last line that a crash cut short; resuming writes that line again."""
    text = path.read_text(encoding="utf-8")
    head, newline, last = text.rpartition("\n")
    try:
        whole = len(next(csv.reader([last], strict=True), [])) == text.partition("\n")[0].count(",") + 1
    except csv.Error:  # cut inside a quoted name
        whole = False
    return text if whole else head + newline


def _configured_order(path: Path) -> dict[str, int]:
    """Return the index of each method folder in a study's config; empty if the config is absent or unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
        folders = _written_folders(text) or _parsed_folders(text)
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # only the order of the lines depends on it
    return {folder: index for index, folder in enumerate(folders)}


def _written_folders(text: str) -> list[str]:
    """Read the folders of `methods:` from a config as a study writes it; empty if it may have been written otherwise.

    It saves the import of yaml, which takes about as long as all that is computed for the report of a small study.
    """
    section = re.search(r"^methods:\n((?:[- ] .*\n)+)(?=[a-z]|\Z)", text, re.MULTILINE)
    if section is None:
        return []
    entries = re.findall(r"^- name: ([A-Za-z_][\w.-]*)\n  label: ([A-Za-z][\w-]*)$", section[1], re.MULTILINE)
    whole = len(entries) == len(re.findall("^-", section[1], re.MULTILINE))
    return [_folder({"name": name, "label": "" if label == "null" else label}) for name, label in entries if whole]


def _parsed_folders(text: str) -> list[str]:
    import yaml

    try:
        return [_folder(entry) for entry in yaml.safe_load(text)["methods"]]
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _folder(entry: str | Mapping[str, Any]) -> str:
    """Return the folder of an entry of `methods:`, which is a name or a mapping."""
    if isinstance(entry, str):
        return entry.replace("-", "_")
    return str(entry.get("label") or str(entry["name"]).replace("-", "_"))
