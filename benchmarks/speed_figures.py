"""The two figures of docs/results/speed.md, as SVG: tokens/s by clients per pass, rounds and memory by clients.

Each has a white background, so that it is readable on a dark page; each line is named at its end, and differs from the
others in more than its colour.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedmira.reports.axes import CIRCLE, COLOURS, DASHES, DIAMOND, SQUARE, Axis, Box, enclosing_axis

INK, FAINT, LINE_HEIGHT = "#222222", "#DDDDDD", 17
FONT = 'font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13"'
MARK_OF_TEXT = (CIRCLE, SQUARE, DIAMOND)


@dataclass(frozen=True)
class Line:
    """One line of a chart: (x, y) with lowest and highest y, and how it is drawn. mark: an SVG path, "" for none."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    colour: str
    dash: str = ""
    mark: str = ""


def log_axis(low: float, high: float, start: float, end: float, ticks: Iterable[float]) -> Axis:
    """Lay out an axis of logarithms to base 2; a value v is at `axis.at(log2(v))`."""
    if low == high:
        low, high = low / 2, high * 2
    axis = Axis(math.log2(low), math.log2(high), start, end, [])
    places = [(axis.at(math.log2(tick)), f"{tick:,g}") for tick in ticks if low <= tick <= high]
    return Axis(axis.low, axis.high, start, end, places)


def round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from the last not above `low` to the first not below `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(number for number in every if number <= low)
    last = min(number for number in every if number >= high)
    return [number for number in every if first <= number <= last]


def apart(positions: Sequence[float], low: float, high: float, gap: float = LINE_HEIGHT) -> list[float]:
    """Move positions apart to at least `gap`, in their order and within [low, high] if there is room."""
    order = sorted(range(len(positions)), key=lambda k: positions[k])
    moved = [0.0] * len(positions)
    last = low - gap
    for k in order:
        last = moved[k] = max(positions[k], last + gap)
    limit = high
    for k in reversed(order):
        moved[k] = min(moved[k], limit)
        limit = moved[k] - gap
    return moved


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" {more}>{escape(words)}</text>'


def stroke(points: Iterable[tuple[float, float]], line: Line, width: float = 2) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="{width}"{dash}/>'


def frame(box: Box, x: Axis, y: Axis, titles: tuple[str, str, str]) -> list[str]:
    """Draw grid, marks and titles: of the chart, of x, of y."""
    out = [text(box.left, box.top - 16, titles[0], 'font-weight="bold"')]
    for position, label in y.marks:
        out.append(f'<path d="M{box.left},{position}H{box.x_end}" stroke="{FAINT}"/>')
        out.append(text(box.left - 8, position + 4.5, label, 'text-anchor="end"'))
    for position, label in x.marks:
        out.append(f'<path d="M{position},{box.y_end}v5" stroke="{INK}"/>')
        out.append(text(position, box.y_end + 20, label, 'text-anchor="middle"'))
    middle = (box.top + box.y_end) / 2
    out.append(f'<path d="M{box.left},{box.y_end}H{box.x_end}" stroke="{INK}"/>')
    out.append(text((box.left + box.x_end) / 2, box.y_end + 42, titles[1], 'text-anchor="middle"'))
    turned = f'text-anchor="middle" transform="rotate(-90 {box.left - 58} {middle:.1f})"'
    return [*out, text(box.left - 58, middle, titles[2], turned)]


def draw(line: Line, x: Axis, y: Axis, *, log: bool) -> list[str]:
    """Draw a line with its marks and the spread of its points."""

    def up(value: float) -> float:
        return y.at(math.log2(value) if log else value)

    places = [(x.at(math.log2(k)), up(value)) for k, value, _, _ in line.points]
    out = [stroke(places, line)]
    for (across, down), (_, _, least, most) in zip(places, line.points, strict=True):
        if most > least:
            out.append(f'<path d="M{across},{up(least)}V{up(most)}" stroke="{line.colour}" stroke-width="1.5"/>')
        if line.mark:
            out.append(f'<path d="{line.mark}" transform="translate({across},{down})" fill="{line.colour}"/>')
    return out


def name_lines(lines: Sequence[Line], ends: Sequence[float], box: Box) -> list[str]:
    """Write each line's name at its end, with a sample of the line; a thin line connects them."""
    out = []
    for line, end, height in zip(lines, ends, apart(ends, box.top + 4, box.y_end - 4), strict=True):
        left = box.x_end + 22
        out.append(f'<path d="M{box.x_end + 2},{end:.1f}L{left - 2},{height:.1f}" stroke="#999999"/>')
        out.append(stroke([(left, height), (left + 26, height)], line))
        if line.mark:
            out.append(f'<path d="{line.mark}" transform="translate({left + 13},{height:.1f})" fill="{line.colour}"/>')
        out.append(text(left + 33, height + 4.5, line.name))
    return out


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Put parts on a white background."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="#FFFFFF"/>'
    return "\n".join([f'{head} role="img" {FONT}>', f"<title>{escape(title)}</title>", ground, *parts, "</svg>\n"])


def cohort_lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return FedMira's line for each kind of text, and the plain loops as horizontal lines over all cohort sizes."""
    lines = []
    for index, row in enumerate(rows):
        colour, mark = COLOURS[index % len(COLOURS)], MARK_OF_TEXT[index % len(MARK_OF_TEXT)]
        curve = sorted((int(count), value) for count, value in row["tokens_per_second"].items())
        points = tuple((count, value, value, value) for count, value in curve)
        lines.append(Line(f"FedMira bf16, {row['text']}", points, colour, mark=mark))
        for number, (name, value) in enumerate(row["plain"].items(), start=1):
            level = tuple((count, value, value, value) for count in (curve[0][0], curve[-1][0]))
            lines.append(Line(f"{name} loop, {row['text']}", level, colour, DASHES[number % len(DASHES)]))
    return lines


def cohort_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw tokens per second against the clients that share a pass; both axes are logarithmic."""
    box = Box(width=880, height=440, left=90, right=305, top=48, bottom=64)
    lines = cohort_lines(rows)
    values = [point[1] for line in lines for point in line.points]
    counts = sorted({int(point[0]) for line in lines for point in line.points})
    ticks = round_numbers(min(values), max(values))
    x = log_axis(counts[0], counts[-1], box.left + 12, box.x_end, counts)
    y = log_axis(ticks[0], ticks[-1], box.y_end, box.top, ticks)
    title = "Training speed by clients per pass"
    parts = frame(box, x, y, (title, "clients per pass (log scale)", "real tokens per second (log scale)"))
    for line in lines:
        parts += draw(line, x, y, log=True)
    ends = [y.at(math.log2(line.points[-1][1])) for line in lines]
    return svg(box.width, box.height, title, [*parts, *name_lines(lines, ends, box)])


def panel(box: Box, lines: Sequence[Line], titles: tuple[str, str, str]) -> list[str]:
    """Draw lines against the number of clients, y from zero."""
    counts = sorted({point[0] for line in lines for point in line.points})
    x = log_axis(counts[0], counts[-1], box.left + 12, box.x_end, counts)
    values = [value for line in lines for point in line.points for value in point[1:]]
    y = enclosing_axis([0.0, *values], box.y_end, box.top)
    parts = frame(box, x, y, titles)
    for line in lines:
        parts += draw(line, x, y, log=False)
    return [*parts, *name_lines(lines, [y.at(line.points[-1][1]) for line in lines], box)]


def client_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw time and memory of a round against K, from rows of one method."""
    rows = sorted(rows, key=lambda row: row["clients"])

    def line(name: str, key: str, unit: float, style: tuple[str, str, str], spread: str | None = None) -> Line:
        points = []
        for row in rows:
            least, most = row[spread] if spread else (row[key], row[key])
            points.append((row["clients"], row[key] / unit, least / unit, most / unit))
        return Line(name, tuple(points), *style)

    first, second = (COLOURS[0], "", CIRCLE), (COLOURS[1], DASHES[1], SQUARE)
    clients = "clients K (log scale)"
    times = [
        line("seconds (least to most)", "round_s", 1, first, "round_spread_s"),
        line("CPU seconds, all threads", "round_cpu_s", 1, second),
    ]
    memory = [
        line("RssAnon (anonymous)", "anon_rounds", 1e6, first),
        line("RssFile (mapped files)", "file_rounds", 1e6, second),
    ]
    sizes = {"width": 880, "left": 90, "right": 255}
    upper = Box(height=300, top=48, bottom=64, **sizes)
    lower = Box(height=610, top=358, bottom=64, **sizes)
    sampled = rows[0]["sampled"]
    parts = panel(upper, times, (f"A round of {sampled} sampled clients", clients, "seconds"))
    parts += panel(lower, memory, ("Largest memory in rounds, above the base model alone", clients, "MB"))
    return svg(880, 610, "Time and memory of a round by clients", parts)
