"""The main table of a study as text: CSV with all digits, Markdown and LaTeX rounded as on the page."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from fedmira.disk.client_names import as_cell
from fedmira.disk.folders import NAME_COLUMN, RESULT_COLUMNS
from fedmira.errors import ConfigError, nearest
from fedmira.reports.record import Metric, StudyRecord
from fedmira.reports.stats import MethodSummary
from fedmira.reports.wording import clean, interval, number, seconds, signed, size

TableFormat = Literal["csv", "md", "latex"]
COLUMNS = (
    *("metric", "method", "seeds", "clients", "missing"),
    *("mean", "half_width", "seed_deviation", "worst", "lowest_tenth"),
    *("difference", "difference_half_width", "wins", "ties", "losses", "p_holm"),
    *("p", "effect", "weighted_mean", "bytes", "seconds"),
)
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\u2212": "$-$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}


def table_text(record: StudyRecord, kind: str) -> str:
    """Return the study's table, metric by metric, the untouched base first. Raises ConfigError if `kind` is unknown."""
    allowed = get_args(TableFormat)
    if kind not in allowed:
        raise ConfigError([f"--table: found '{kind}'{nearest(kind, allowed)}; allowed: {', '.join(allowed)}"], "report")
    if kind == "csv":
        return _csv(COLUMNS, (_numbers(record, metric, item) for metric in record.metrics for item in metric.lines))
    head, *lines = _rounded(record)
    if kind == "md":
        rows = [head, ["---", "---", *["---:"] * (len(head) - 2)], *lines]
        return "".join(f"| {' | '.join(map(_markdown, row))} |\n" for row in rows)
    first, *rest = [" & ".join(map(_latex, row)) + r" \\" for row in (head, *lines)]
    begin = rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}"
    return "\n".join([begin, r"\hline", first, r"\hline", *rest, r"\hline", r"\end{tabular}", ""])


def results_csv(record: StudyRecord) -> str:
    """Return the rows of all runs' results.csv under one header; a value that is n/a is empty."""
    width = len(RESULT_COLUMNS) - 1
    rows = (
        [*row[:width], None if math.isnan(row.value) else row.value, as_cell(row.name)] for row in record.results.rows
    )
    return _csv((*RESULT_COLUMNS, NAME_COLUMN), rows)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def _numbers(record: StudyRecord, metric: Metric, item: MethodSummary) -> list[object]:
    """Return one line of COLUMNS; None is an empty cell."""
    compared: list[object] = [None] * 8
    if (one := item.against) is not None:
        compared = [one.difference, one.half_width, one.wins, one.ties, one.losses, one.p_holm, one.p, one.effect]
    numbers = [item.mean, item.half_width, item.seed_deviation, item.worst, item.lowest_tenth]
    costs = record.costs.get(item.method, (None, None))
    counts = [len(item.seeds), item.clients, item.missing]
    return [metric.name, item.method, *counts, *numbers, *compared, item.weighted_mean, *costs]


def _rounded(record: StudyRecord) -> Iterator[list[str]]:
    """Yield the head and the lines, as text."""
    spread = ["SD over seeds"] if record.repeated else []
    compared = [f"Minus {record.baseline}", "Better / equal / worse", "p (Holm)", "Effect r"]
    yield ["Metric", "Method", "Mean ± 95 %", *spread, "Weighted mean", "Worst client", *compared, "Bytes", "Time"]
    for metric in record.metrics:
        for item in metric.lines:
            compared = ["", "", "", ""]
            if (against := item.against) is not None:
                half = f" ± {number(against.half_width)}" if against.half_width is not None else ""
                shares = f"{against.wins} / {against.ties} / {against.losses}"
                p = "n/a" if against.p_holm is None else f"{against.p_holm:.2g}"
                compared = [f"{signed(against.difference)}{half}", shares, p, signed(against.effect, 2)]
            deviation = [number(item.seed_deviation)] if record.repeated else []
            means = [interval(item), *deviation, number(item.weighted_mean), number(item.worst)]
            costs = record.costs.get(item.method)
            paid = ["", ""] if costs is None else [size(costs.bytes), seconds(costs.seconds)]
            yield [metric.title, item.method, *means, *compared, *paid]


def _markdown(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace("|", "\\|")


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in clean(text))
