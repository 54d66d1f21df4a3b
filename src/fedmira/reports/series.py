"""Validation loss against rounds, bytes and seconds: what the curves of a paper are drawn from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedmira.reports.averages import half_width, mean
from fedmira.reports.record import RunRecord, StudyRecord
from fedmira.reports.results import Results, Row
from fedmira.reports.stats import client_curves


class Point(NamedTuple):
    """One round. loss: mean over clients; half_width: of its 95 % t-interval, None below two clients.

    bytes, seconds: of all rounds up to this one, up and down together, mean over the runs that had it; None = unknown.
    """

    round: int
    bytes: float | None
    seconds: float | None
    loss: float
    half_width: float | None
    clients: int


class Curve(NamedTuple):
    """A method's curve over all seeds (seed None: a client's seeds are averaged first), or that of one seed."""

    method: str
    seed: int | None
    points: Sequence[Point]


def loss_curves(record: StudyRecord) -> list[Curve]:
    """Return the curve of each method that was validated, and, where it has several seeds, one of each."""
    results, curves = record.results, []
    rows: dict[int, list[Row]] = {}
    for row in results.of(metric="loss", split="validation"):
        rows.setdefault(row.seed, []).append(row)
    whole = client_curves(results)
    by_seed = {run.seed: client_curves(Results(rows.get(run.seed, []))) for run in record.runs}
    for label in record.labels:
        runs = [run for run in record.runs if run.label == label]
        curves.append(Curve(label, None, _points(whole.get(label, {}), runs)))
        for run in runs if len(runs) > 1 else ():
            curves.append(Curve(label, run.seed, _points(by_seed[run.seed].get(label, {}), [run])))
    return [curve for curve in curves if curve.points]


def _points(by_round: Mapping[int, Mapping[str, float]], runs: Sequence[RunRecord]) -> list[Point]:
    """Return a point for each validated round; `by_round` has the value of each client."""
    paid = [_paid(run) for run in runs]
    points = []
    for turn, values in by_round.items():
        sent, spent = ([costs[turn][of] for costs in paid if turn in costs] for of in (0, 1))
        points.append(
            Point(
                round=turn,
                bytes=_mean(sent),
                seconds=_mean(spent),
                loss=mean(values.values()),
                half_width=half_width(list(values.values())),
                clients=len(values),
            )
        )
    return points


def _paid(run: RunRecord) -> dict[int, tuple[float | None, float | None]]:
    """Return bytes and seconds of a run up to each round; None from the first round on that does not have them."""
    sent: float | None = 0.0
    spent: float | None = 0.0
    paid: dict[int, tuple[float | None, float | None]] = {0: (sent, spent)}
    for line in run.rounds:
        up, down, seconds = (line.get(key) for key in ("bytes_up", "bytes_down", "seconds"))
        known = isinstance(up, int | float) and isinstance(down, int | float)
        sent = sent + up + down if sent is not None and known else None  # type: ignore[operator]
        spent = spent + seconds if spent is not None and isinstance(seconds, int | float) else None
        paid[int(line["round"])] = (sent, spent)
    return paid


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
