"""Loss by round: one curve per method, and what each merge did to single clients."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedmira.reports.axes import Axis, Box, Style, enclosing_axis, round_axis, spread_out
from fedmira.reports.record import RunRecord, StudyRecord
from fedmira.reports.stats import base_values, curve, gains
from fedmira.reports.wording import clean, number, short

WIDE = Box(860, 350, 56, 18, 14, 44)
NARROW = Box(350, 300, 46, 14, 12, 42)
PANEL = Box(178, 128, 36, 8, 8, 22)
PANELS = 12  # clients whose merges are drawn, of each method
MOST_POINTS, MOST_MARKS, MOST_LINES = 400, 13, 40  # of a curve, on it, and in its table


class Line(NamedTuple):
    """One method's curve. points: (x, y, tooltip)."""

    label: str
    style: Style
    path: str
    points: list[tuple[float, float, str]]
    first: float
    last: float


class Chart(NamedTuple):
    """Curves with their axes; the curve with the best last value is first."""

    box: Box
    x: Axis
    y: Axis
    lines: list[Line]
    title: str


class Panel(NamedTuple):
    """One client under one method. merges: (x, y before, y after, better | worse | level, tooltip)."""

    client: str
    name: str
    path: str
    merges: list[tuple[float, float, float, str, str]]
    title: str


class Merging(NamedTuple):
    """The effect of a method's merges. lower, equal, higher: uploads whose validation loss fell, stayed, rose."""

    label: str
    before: float
    after: float
    lower: int
    equal: int
    higher: int
    box: Box
    x: Axis
    y: Axis
    panels: list[Panel]
    shown: int
    clients: int


def mean_curves(record: StudyRecord) -> dict[str, list[tuple[int, float]]]:
    """Return stats.curve without its infinite points, which cannot be drawn."""
    finite = {
        label: [(turn, value) for turn, value in points if math.isfinite(value)]
        for label, points in curve(record.results).items()
    }
    return {label: points for label, points in finite.items() if points}


def curve_chart(record: StudyRecord, styles: dict[str, Style], box: Box) -> Chart | None:
    """Lay out the mean validation loss by round; None if nothing was validated."""
    curves = mean_curves(record)
    if not curves:
        return None
    turns = [turn for points in curves.values() for turn, _ in points]
    x = round_axis(min(turns), max(turns), box.left, box.x_end)
    y = enclosing_axis([value for points in curves.values() for _, value in points], box.y_end, box.top)
    lines = []
    for label, points in sorted(curves.items(), key=lambda item: item[1][-1][1]):
        drawn = [points[index] for index in spread_out(len(points), MOST_POINTS)]
        marked = [points[index] for index in spread_out(len(points), MOST_MARKS)]
        lines.append(
            Line(
                label=label,
                style=styles[label],
                path=" ".join(f"{x.at(turn)},{y.at(value)}" for turn, value in drawn),
                points=[
                    (x.at(turn), y.at(value), f"{clean(label)}, round {turn}: {number(value)}")
                    for turn, value in marked
                ],
                first=points[0][1],
                last=points[-1][1],
            )
        )
    ends = "; ".join(
        f"{clean(label)} from {number(points[0][1])} to {number(points[-1][1])}" for label, points in curves.items()
    )
    return Chart(box, x, y, lines, f"Mean validation loss by round: {ends}")


def curve_table(record: StudyRecord) -> tuple[list[str], list[tuple[int, list[float | None]]]]:
    """Return the curves as a table: methods, and (round, each method's value); thinned where there are many rounds."""
    curves = mean_curves(record)
    by_turn = {label: dict(points) for label, points in curves.items()}
    turns = sorted({turn for points in curves.values() for turn, _ in points})
    shown = [turns[index] for index in spread_out(len(turns), MOST_LINES)]
    return list(curves), [(turn, [by_turn[label].get(turn) for label in curves]) for turn in shown]


def merging(record: StudyRecord, label: str) -> Merging | None:
    """Draw the effect of the merges of a method's first run; None if no merge changed any client's loss.

    A client's line rises or falls while it trains, then drops or jumps at the merge. At most PANELS clients are drawn:
    in order of their gain, at even steps, including the worst and the best.
    """
    run = record.first_run(label)
    tracks = _tracks(run) if run else {}
    pairs = [(before, after) for track in tracks.values() for _, before, after in track]
    if run is None or all(before == after for before, after in pairs):
        return None
    start = base_values(record.results, metric="loss", split="validation", baseline=record.baseline)
    order = _by_gain(record, label, list(tracks))
    chosen = [order[index] for index in spread_out(len(order), PANELS)]
    starts = {client: start.get(client, math.nan) for client in chosen}
    values = [value for client in chosen for _, *both in tracks[client] for value in both]
    values += [value for value in starts.values() if math.isfinite(value)]
    last = max(turn for client in chosen for turn, _, _ in tracks[client])
    x = round_axis(0, last, PANEL.left, PANEL.x_end)
    y = enclosing_axis(values, PANEL.y_end, PANEL.top)
    return Merging(
        label=label,
        before=sum(before for before, _ in pairs) / len(pairs),
        after=sum(after for _, after in pairs) / len(pairs),
        lower=sum(after < before for before, after in pairs),
        equal=sum(after == before for before, after in pairs),
        higher=sum(after > before for before, after in pairs),
        box=PANEL,
        x=x,
        y=y,
        panels=[_panel(record.called(client), tracks[client], starts[client], x, y) for client in chosen],
        shown=len(chosen),
        clients=len(tracks),
    )


Track = Sequence[tuple[int, float, float]]  # (round, loss before, loss after the merge)


def _tracks(run: RunRecord) -> dict[str, list[tuple[int, float, float]]]:
    """Collect each client's losses around its merges, rounds ascending; a refused upload has none."""
    tracks: dict[str, list[tuple[int, float, float]]] = {}
    for line in run.rounds:
        befores, afters = line.get("loss_before", ()), line.get("loss_after", ())
        for client, before, after in zip(line.get("clients", ()), befores, afters, strict=False):
            if before is not None and after is not None:
                tracks.setdefault(str(client), []).append((int(line["round"]), float(before), float(after)))
    return tracks


def _by_gain(record: StudyRecord, label: str, clients: Sequence[str]) -> list[str]:
    """Order clients from the worst gain to the best; those without one first; ties in the order of the table."""
    if record.judged is None:
        return list(clients)
    _, table = gains(record.results, metric=record.judged.name, baseline=record.baseline)
    gain_of = table.get(label, {})
    known = {client: value for client in clients if not math.isnan(value := gain_of.get(client, math.nan))}
    return sorted(clients, key=lambda client: known.get(client, -math.inf))


def _panel(client: str, track: Track, start: float, x: Axis, y: Axis) -> Panel:
    """Draw one client's loss from the common start on."""
    drawn = [track[index] for index in spread_out(len(track), MOST_POINTS // 4)]
    path = [f"{x.at(0)},{y.at(start)}"] if math.isfinite(start) else []
    merges = []
    for turn, before, after in drawn:
        path += [f"{x.at(turn)},{y.at(before)}", f"{x.at(turn)},{y.at(after)}"]
        effect = "better" if after < before else "worse" if after > before else "level"
        tooltip = f"round {turn}: {number(before)} before, {number(after)} after the merge"
        merges.append((x.at(turn), y.at(before), y.at(after), effect, tooltip))
    lower = sum(after < before for _, before, after in track)
    higher = sum(after > before for _, before, after in track)
    return Panel(
        client=client,
        name=short(client, 22),
        path=" ".join(path),
        merges=merges,
        title=f"{clean(client)}: sampled in {len(track)} rounds; merges lowered its validation loss {lower} times and "
        f"raised it {higher} times; {number(track[-1][2])} after the last",
    )
