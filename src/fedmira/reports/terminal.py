"""The tables that a command prints at the end: one line per client if there are few, then one per method."""

import math

from rich.table import Table
from rich.text import Text

from fedmira.names import writable
from fedmira.reports.record import StudyRecord
from fedmira.reports.stats import MethodSummary, client_values
from fedmira.reports.wording import counts, interval, number, seconds, short, signed, size

CLIENTS_SHOWN = 32  # more are shown in the report only
ROOM = 120  # letters in a line, from which on effect size, bytes and time are shown
NAME_SHOWN = 60  # letters of a client's name


def summary_tables(record: StudyRecord, *, encoding: str | None = None, width: int = ROOM) -> list[Table]:
    """Return the tables: one line per client if there are at most CLIENTS_SHOWN, then one line per method.

    encoding: of the stream that they are printed to, None = it has every letter; width: its letters in a line.

    Methods: mean with 95 % interval over clients and the worst client, metric by metric, the untouched base first;
    wins/ties/losses against the baseline on the first metric that is not the loss, else on the loss.
    """
    clients = _client_table(record) if len(record.results.clients) <= CLIENTS_SHOWN else None
    tables = [table for table in (clients, _method_table(record, width)) if table is not None]
    for table in tables:
        cells = [cell for column in table.columns for cell in (column.header, *column.cells)]
        for text in (table.title, table.caption, *cells):
            if isinstance(text, Text):
                text.plain = writable(text.plain, encoding)
    return tables


def _client_table(record: StudyRecord) -> Table | None:
    """One line per client: all metrics of all methods, and whether the client is better or worse than the baseline."""
    judged = record.judged
    if judged is None or not judged.methods:
        return None
    labels = [item.method for item in record.metrics[0].methods]
    shown = " / ".join(metric.title.lower() for metric in record.metrics)
    table = Table(
        title=Text(f"{record.name}, client by client: {shown}"),
        caption=Text(f"+ better, - worse, = equal to {record.baseline} on {judged.title.lower()}"),
    )
    table.add_column("client")
    for label in labels:
        table.add_column(Text(label), justify="right")
    values = {metric.name: client_values(record.results, metric=metric.name) for metric in record.metrics}
    baseline = values[judged.name].get(record.baseline)
    for client in record.results.clients:
        cells = []
        for label in labels:
            numbers = " ".join(number(values[metric.name][label][client]) for metric in record.metrics)
            mark = ""
            if baseline is not None and label != record.baseline:
                mark = _mark(values[judged.name][label][client], baseline[client], judged.lower_is_better)
            cells.append(Text(f"{numbers} {mark}".rstrip()))
        table.add_row(Text(short(record.called(client), NAME_SHOWN)), *cells)
    return table


def _mark(value: float, baseline: float, lower_is_better: bool) -> str:
    if math.isnan(value) or math.isnan(baseline):
        return "?"
    return "=" if value == baseline else "+" if (value < baseline) == lower_is_better else "-"


def _method_table(record: StudyRecord, width: int) -> Table:
    table = Table(title=Text(f"{record.name}: test split, over clients"), caption=_caption(record))
    table.add_column("method")
    for metric in record.metrics:
        table.add_column(metric.title.lower() if metric.name == "loss" else metric.title, justify="right")
        if record.repeated:
            table.add_column("sd over seeds", justify="right")
        table.add_column("worst", justify="right")
    judged = record.judged
    if judged:
        table.add_column(Text(f"W/T/L against {record.baseline} ({judged.title})"), justify="right")
    more = width >= ROOM and _has_room(record)
    for head in ("r", "bytes", "time") if more else ():
        table.add_column(head, justify="right")
    for label in _labels(record):
        cells = [Text(label)]
        compared, effect = "", ""
        for metric in record.metrics:
            summary = next((item for item in metric.lines if item.method == label), None)
            cells.append(Text(interval(summary)))
            if record.repeated:
                cells.append(Text(number(summary.seed_deviation) if summary else "n/a"))
            cells.append(Text(number(summary.worst) if summary else "n/a"))
            if metric is judged and summary:
                compared = counts(summary)
                effect = signed(summary.against.effect, 2) if summary.against else ""
        costs = record.costs.get(label)
        paid = ("", "") if costs is None else (size(costs.bytes), seconds(costs.seconds))
        table.add_row(*cells, Text(compared), *(map(Text, (effect, *paid)) if more else ()))
    return table


def _has_room(record: StudyRecord) -> bool:
    """Do effect size, bytes and time fit into ROOM letters beside the rest?"""
    return record.judged is not None and len(record.metrics) * (3 if record.repeated else 2) <= 4


def _labels(record: StudyRecord) -> list[str]:
    """List the lines of a table over all metrics: the untouched base first, then the methods."""
    items: list[MethodSummary] = [item for metric in record.metrics for item in metric.lines]
    return list(dict.fromkeys(item.method for item in sorted(items, key=lambda item: bool(item.rounds))))


def _caption(record: StudyRecord) -> Text:
    lines = ["mean ± half of the 95 % t-interval over clients"]
    if record.results.kept and record.metrics:
        first = record.metrics[0]
        last = [
            f"{item.method} {number(item.mean)}" for item in record.of_last_round[first.name] if item.mean is not None
        ]
        lines.append(
            f"adapters of the best round by validation loss; {first.title.lower()} with those of the last: "
            f"{', '.join(last) or 'n/a'}"
        )
    early = [f"{run.folder} {run.stopped_early}" for run in record.runs if run.stopped_early]
    if early:
        lines.append(f"stopped early: {', '.join(early)}")
    missing = max((item.missing for metric in record.metrics for item in metric.methods), default=0)
    if missing:
        lines.append(f"clients without a value (n/a), left out: {missing}")
    refused = sum(int(run.facts.refused_uploads or 0) for run in record.runs)
    if refused:
        lines.append(f"uploads refused, not merged: {refused}")
    replies = sum(int(run.facts.refused_replies or 0) for run in record.runs)
    if replies:
        lines.append(f"replies refused by clients: {replies}")
    unfinished = [f"{run.folder} {run.state}" for run in record.runs if run.state != "complete"]
    if unfinished:
        lines.append(f"not complete: {', '.join(unfinished)}")
    return Text("; ".join(lines))
