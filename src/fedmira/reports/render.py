"""A study's report: one self-contained HTML page, summary.json for programs, one table for the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from fedmira.errors import StoreError
from fedmira.reports.examples import Example, read_examples
from fedmira.reports.stats import (
    LOWER_IS_BETTER,
    MethodSummary,
    base_values,
    client_values,
    curve,
    find_runs,
    read_results,
    summarise,
    summarise_base,
)
from fedmira.runs import RunFolder
from fedmira.store import read_json, write_atomic

SCHEMA = 1
# Okabe & Ito's colours, which colour-blind readers can tell apart; yellow comes last because it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
BASELINE_COLOUR = "#000000"
CLIENTS_SHOWN = 32  # more than this are read in the report, not in the terminal
DASHES = ("", "7 3", "2 3")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 60, 16, 14, 42  # of the chart, in pixels
NAMES = {
    "loss": "Test loss",
    "rouge_l": "ROUGE-L",
    "exact_match": "Exact match",
    "word_accuracy": "Word accuracy",
}


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it; `fields` is run.json, in which any key may be absent."""

    folder: str  # relative to the study, with forward slashes
    label: str
    seed: int
    adapters: int  # folders below adapters/
    never_sampled: int | None  # clients that took part in no round; None if the run does not tell
    fields: Mapping[str, Any]

    @property
    def state(self) -> str:
        return str(self.fields.get("state", "unknown"))


@dataclass(frozen=True)
class Metric:
    """Everything the report says of one metric."""

    name: str
    title: str
    lower_is_better: bool
    base: MethodSummary | None
    methods: list[MethodSummary]


@dataclass(frozen=True)
class Line:
    """One method's curve in chart pixels."""

    label: str
    colour: str
    dash: str
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """The curves, with their axes: ticks are (pixel, label)."""

    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    title: str


@dataclass(frozen=True)
class StudyRecord:
    """A study as it is read for a report."""

    name: str
    baseline: str
    frame: pd.DataFrame
    runs: list[RunRecord]
    metrics: list[Metric]
    config: str
    examples: Mapping[str, list[Example]]  # by client; empty unless report.examples


def write_report(study: Path) -> Path:
    """Write STUDY/report.html and STUDY/summary.json, each at once or not at all; return the page's path.

    Raises StoreError if the study has no results, or cannot be written.
    """
    record = _read_study(study)
    write_atomic(study / "summary.json", _summary_json(record).encode())
    page = study / "report.html"
    write_atomic(page, _page(record).encode())
    return page


def summary_tables(study: Path) -> list[Table]:
    """Return what the terminal shows: clients one by one where they are few, then a line for each method.

    Methods: mean with 95 % interval over clients and the worst client, metric by metric, the untouched base first;
    wins/ties/losses against the baseline on the first metric that is not the loss, else on the loss.
    Raises StoreError if the study has no results.
    """
    record = _read_study(study)
    clients = _client_table(record) if record.frame["client"].nunique() <= CLIENTS_SHOWN else None
    return [table for table in (clients, _method_table(record)) if table is not None]


def _client_table(record: StudyRecord) -> Table | None:
    """One line per client: every metric of every method, and whether it gained or lost against the baseline."""
    labels = [item.method for item in record.metrics[0].methods] if record.metrics else []
    if not labels:
        return None
    shown = " / ".join(metric.title.lower() for metric in record.metrics)
    table = Table(
        title=Text(f"{record.name}, client by client: {shown}"),
        caption=Text(f"+ better, - worse, = equal to {record.baseline} on {_judged(record).title.lower()}"),
    )
    table.add_column("client")
    for label in labels:
        table.add_column(Text(label), justify="right")
    values = {metric.name: _by_client(record, metric) for metric in record.metrics}
    judged = _judged(record)
    baseline = values[judged.name].get(record.baseline)
    for client in record.frame["client"].unique():
        cells = []
        for label in labels:
            numbers = " ".join(_number(values[metric.name][label][client]) for metric in record.metrics)
            mark = ""
            if baseline is not None and label != record.baseline:
                mark = _mark(values[judged.name][label][client], baseline[client], judged.lower_is_better)
            cells.append(Text(f"{numbers} {mark}".rstrip()))
        table.add_row(Text(str(client)), *cells)
    return table


def _by_client(record: StudyRecord, metric: Metric) -> dict[str, dict[str, float]]:
    """Return method -> client -> value, NaN = n/a."""
    table = client_values(record.frame, metric=metric.name).astype(float)
    return {
        str(label): {str(client): float(value) for client, value in table[label].items()} for label in table.columns
    }


def _mark(own: float, other: float, lower_is_better: bool) -> str:
    if math.isnan(own) or math.isnan(other):
        return "?"
    return "=" if own == other else "+" if (own < other) == lower_is_better else "-"


def _judged(record: StudyRecord) -> Metric:
    """The metric by which gain is told: the first that is not the loss, because a loss can be lowered by hedging."""
    return next((metric for metric in record.metrics if metric.name != "loss"), record.metrics[0])


def _method_table(record: StudyRecord) -> Table:
    table = Table(title=Text(f"{record.name}: test split, over clients"), caption=_caption(record))
    table.add_column("method")
    for metric in record.metrics:
        table.add_column(metric.title.lower() if metric.name == "loss" else metric.title, justify="right")
        table.add_column("worst", justify="right")
    judged = _judged(record) if record.metrics else None
    if judged:
        table.add_column(Text(f"W/T/L against {record.baseline} ({judged.title})"), justify="right")
    for label in _labels(record):
        cells = [Text(label)]
        counts = ""
        for metric in record.metrics:
            summary = _find(metric, label)
            cells += [Text(_interval(summary)), Text(_number(summary.worst) if summary else "n/a")]
            if metric is judged and summary and summary.against:
                counts = _counts(summary)
        table.add_row(*cells, Text(counts))
    return table


def _read_study(study: Path) -> StudyRecord:
    frame = read_results(study)
    runs = [_read_run(study, folder) for folder in find_runs(study)]
    # A study may give `local` another label; the runs know which method they are.
    baseline = next((run.label for run in runs if run.fields.get("method") == "local"), "local")
    measured = frame[(frame["split"] == "test") & (frame["round"] > 0)]["metric"].unique()
    names = sorted((str(name) for name in measured), key=lambda name: name != "loss")
    config = study / "config.yaml"
    return StudyRecord(
        name=study.resolve().name,
        baseline=baseline,
        frame=frame,
        runs=runs,
        metrics=[
            Metric(
                name=name,
                title=NAMES.get(name, name),
                lower_is_better=name in LOWER_IS_BETTER,
                base=summarise_base(frame, metric=name, baseline=baseline),
                methods=summarise(frame, metric=name, baseline=baseline),
            )
            for name in names
        ],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        examples=read_examples({run.label: study / run.folder for run in runs if run.seed == runs[0].seed}),
    )


def _read_run(study: Path, folder: Path) -> RunRecord:
    """Read one run folder. Raises StoreError if its run.json is damaged; an absent one is an empty record."""
    path = folder / "run.json"
    fields = read_json(path) if path.is_file() else {}
    if not isinstance(fields, dict):
        raise StoreError(f"'{path}' holds a {type(fields).__name__}: run.json is an object; restore it from a copy")
    clients, never = fields.get("clients"), None
    if isinstance(clients, int) and (folder / "metrics.jsonl").is_file():
        never = clients - len({client for line in RunFolder(folder).records() for client in line.get("clients", [])})
    adapters = folder / "adapters"
    return RunRecord(
        folder=folder.relative_to(study).as_posix(),
        label=folder.parent.name,
        seed=int(folder.name.removeprefix("seed-")),
        adapters=sum(entry.is_dir() for entry in adapters.iterdir()) if adapters.is_dir() else 0,
        never_sampled=never,
        fields=fields,
    )


def _page(record: StudyRecord) -> str:
    # Client names come from data that others wrote: autoescape stays on, and nothing is marked safe.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": _number,
        "interval": _interval,
        "counts": _counts,
        "bytes": _size,
        "chance": _chance,
        "range": _range,
    }
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        record=record,
        unfinished=[run for run in record.runs if run.state != "complete"],
        rounds=sorted({number for metric in record.metrics for item in metric.methods for number in item.rounds}),
        clients=[(metric, _client_lines(record, metric)) for metric in record.metrics],
        chart=_chart(record),
        examples=record.examples,
        size=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        settings=[(run.folder, json.dumps(dict(run.fields), indent=2, ensure_ascii=False)) for run in record.runs],
    )


def _client_lines(record: StudyRecord, metric: Metric) -> list[tuple[str, list[float | None]]]:
    """Return (client, [untouched base, each method's value]) for one metric, None = n/a."""
    values = client_values(record.frame, metric=metric.name)
    values.insert(0, "", base_values(record.frame, metric=metric.name, baseline=record.baseline))
    return [
        (str(client), [None if math.isnan(value) else float(value) for value in line])
        for client, line in zip(values.index, values.to_numpy(), strict=True)
    ]


def _chart(record: StudyRecord) -> Chart | None:
    """Lay out the mean validation loss by round; None if nothing was validated. Infinite points are left out."""
    curves = {
        label: kept
        for label, points in curve(record.frame).items()
        if (kept := [(number, value) for number, value in points if math.isfinite(value)])
    }
    if not curves:
        return None
    rounds = [number for points in curves.values() for number, _ in points]
    losses = [value for points in curves.values() for _, value in points]
    x_marks, y_marks = _marks(min(rounds), max(rounds), whole=True), _marks(min(losses), max(losses))

    def x(number: float) -> float:
        return round(LEFT + (number - x_marks[0]) / (x_marks[-1] - x_marks[0]) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_marks[0]) / (y_marks[-1] - y_marks[0]) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    others = [label for label in curves if label != record.baseline]
    for label, points in curves.items():
        place = others.index(label) if label in others else 0
        lines.append(
            Line(
                label=label,
                colour=COLOURS[place % len(COLOURS)] if label in others else BASELINE_COLOUR,
                dash=DASHES[place // len(COLOURS) % len(DASHES)] if label in others else "",
                path=" ".join(f"{x(number)},{y(value)}" for number, value in points),
                points=[
                    (x(number), y(value), f"{label}, round {number}: {_number(value)}") for number, value in points
                ],
            )
        )
    ends = "; ".join(
        f"{label} from {_number(points[0][1])} to {_number(points[-1][1])}" for label, points in curves.items()
    )
    return Chart(
        lines=lines,
        x_ticks=[(x(mark), f"{mark:g}") for mark in x_marks],
        y_ticks=[(y(mark), f"{mark:g}") for mark in y_marks],
        title=f"Mean validation loss by round: {ends}",
    )


def _marks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return 2 to 7 evenly spaced round numbers that enclose [low, high]; whole: integers only."""
    if high <= low:
        high = low + (1 if whole else max(abs(low) * 0.1, 1e-3))
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def _summary_json(record: StudyRecord) -> str:
    """Return summary.json: every figure of the headline tables, numbers unrounded, null = n/a."""
    summary = {
        "schema": SCHEMA,
        "study": record.name,
        "baseline": record.baseline,
        "metrics": {
            metric.name: {
                "split": "test",
                "lower_is_better": metric.lower_is_better,
                "base": asdict(metric.base) if metric.base else None,
                "methods": [asdict(item) for item in metric.methods],
            }
            for metric in record.metrics
        },
        "validation_loss": curve(record.frame),
        "runs": [
            {"folder": run.folder, "label": run.label, "seed": run.seed, "state": run.state}
            | {"adapters": run.adapters, "never_sampled": run.never_sampled}
            | {key: run.fields.get(key) for key in ("method", "bytes_up", "bytes_down", "seconds")}
            for run in record.runs
        ],
    }
    return json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Make a value fit for JSON, which has no infinity: a diverged loss becomes the text "inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _labels(record: StudyRecord) -> list[str]:
    """List the lines of a table over all metrics: the untouched base first, then the methods."""
    items = [item for metric in record.metrics for item in (metric.base, *metric.methods) if item]
    return list(dict.fromkeys(item.method for item in sorted(items, key=lambda item: bool(item.rounds))))


def _find(metric: Metric, label: str) -> MethodSummary | None:
    return next((item for item in (metric.base, *metric.methods) if item and item.method == label), None)


def _caption(record: StudyRecord) -> Text:
    lines = ["mean ± half of the 95 % t-interval over clients"]
    missing = max((item.missing for metric in record.metrics for item in metric.methods), default=0)
    if missing:
        lines.append(f"clients without a value (n/a), left out: {missing}")
    refused = sum(int(run.fields.get("refused_uploads") or 0) for run in record.runs)
    if refused:
        lines.append(f"uploads refused, not merged: {refused}")
    unfinished = [f"{run.folder} {run.state}" for run in record.runs if run.state != "complete"]
    if unfinished:
        lines.append(f"not complete: {', '.join(unfinished)}")
    return Text("; ".join(lines))


def _chance(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def _number(value: float | None, digits: int = 3) -> str:
    """Format a measured value; None and NaN are n/a."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}f}"


def _interval(summary: MethodSummary | None) -> str:
    if summary is None or summary.mean is None:
        return "n/a"
    half = f" ± {_number(summary.half_width)}" if summary.half_width is not None else ""
    return _number(summary.mean) + half


def _counts(summary: MethodSummary) -> str:
    return f"{summary.against.wins}/{summary.against.ties}/{summary.against.losses}" if summary.against else ""


def _size(count: Any) -> str:
    """Format a number of bytes with a decimal unit; anything else is n/a."""
    if not isinstance(count, int | float):
        return "n/a"
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(count) // 3), len(units) - 1) if count >= 1 else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def _range(values: Any) -> str:
    """Format a list of numbers as its smallest and largest; anything else is n/a."""
    numbers = [item for item in values if isinstance(item, int | float)] if isinstance(values, Sequence) else []
    return f"{min(numbers):.2g} to {max(numbers):.2g}" if numbers else "n/a"
