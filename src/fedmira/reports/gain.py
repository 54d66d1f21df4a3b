"""Each client's gain: bars for few clients, one sorted line for many; and the pictures in tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fedmira.reports.axes import Axis, Box, balanced_axis, enclosing_axis, spread_out
from fedmira.reports.record import Metric, StudyRecord
from fedmira.reports.stats import MethodSummary, gains
from fedmira.reports.wording import clean, fitted, phrase, signed

BARS_SHOWN = 60  # clients; more are drawn as one sorted line
ROW, FONT = 18, 12
WIDTH, LEFT, RIGHT = 350, 112, 56
AREA = Box(350, 190, 48, 10, 12, 34)
MOST_POINTS = 240
DOTS = Box(150, 22, 6, 6, 0, 0)


class Bar(NamedTuple):
    """One client. client: its name; name: this, cut to fit; x, width: of its bar, from zero; text: its signed gain."""

    client: str
    name: str
    y: float
    x: float
    width: float
    effect: str  # better | worse | level
    text: str


class GainPanel(NamedTuple):
    """One method's clients, the best first. path: the sorted line, if there are no bars."""

    label: str
    better: int
    equal: int
    worse: int
    missing: int
    best: tuple[str, float] | None
    least: tuple[str, float] | None
    box: Box
    axis: Axis
    bars: list[Bar]
    path: str
    split: tuple[float, float]  # x where gain stops being positive, and where it starts to be negative
    title: str


class Gains(NamedTuple):
    """All methods on one metric, against one reference, on one scale."""

    metric: Metric
    reference: str
    panels: list[GainPanel]


class Dots(NamedTuple):
    """One line of a table as a picture: mean, interval, worst client, in pixels."""

    mean: float
    low: float
    high: float
    worst: float


def gain_panels(record: StudyRecord, metric: Metric) -> Gains:
    """Lay out every method's gains on one metric."""
    reference, table = gains(record.results, metric=metric.name, baseline=record.baseline)
    finite = [value for gain_of in table.values() for value in gain_of.values() if math.isfinite(value)]
    panels = [_panel(label, gain_of, finite, reference, metric, record.called) for label, gain_of in table.items()]
    return Gains(metric, reference, panels)


def dots(metric: Metric) -> tuple[Axis, Mapping[str, Dots]]:
    """Lay out means, intervals and worst clients of a metric's table on one scale; infinite values are at its end."""
    spans = {item.method: _span(item) for item in metric.lines if item.mean is not None}
    values = [value for span in spans.values() for value in span if math.isfinite(value)]
    axis = enclosing_axis(values or [0.0], DOTS.left, DOTS.x_end)
    return axis, {label: Dots(*(axis.at(value) for value in span)) for label, span in spans.items()}


def _span(item: MethodSummary) -> tuple[float, float, float, float]:
    mean, half, worst = item.mean, item.half_width or 0.0, item.worst
    assert mean is not None  # the caller leaves such lines out
    return mean, mean - half, mean + half, mean if worst is None else worst


def _panel(
    label: str,
    gain_of: Mapping[str, float],
    finite: Sequence[float],
    reference: str,
    metric: Metric,
    called: Callable[[str], str],
) -> GainPanel:
    known = [(client, value) for client, value in gain_of.items() if not math.isnan(value)]
    ranked = sorted(known, key=lambda item: item[1], reverse=True)
    better, worse = sum(value > 0 for _, value in ranked), sum(value < 0 for _, value in ranked)
    few = len(ranked) <= BARS_SHOWN
    box = Box(WIDTH, 24 + ROW * max(len(ranked), 1), LEFT, RIGHT, 4, 20) if few else AREA
    axis = balanced_axis(finite, box.left, box.x_end) if few else balanced_axis(finite, box.y_end, box.top)
    ends = f"; best {clean(called(ranked[0][0]))} {signed(ranked[0][1])}" if ranked else ""
    ends += f", worst {clean(called(ranked[-1][0]))} {signed(ranked[-1][1])}" if ranked else ""
    share = (box.x_end - box.left) / max(len(ranked), 1)
    return GainPanel(
        label=label,
        better=better,
        equal=len(ranked) - better - worse,
        worse=worse,
        missing=len(gain_of) - len(ranked),
        best=ranked[0] if ranked else None,
        least=ranked[-1] if ranked else None,
        box=box,
        axis=axis,
        bars=[_bar(row, called(client), value, axis) for row, (client, value) in enumerate(ranked)] if few else [],
        path="" if few else _path(ranked, box, axis),
        split=(round(box.left + share * better, 1), round(box.x_end - share * worse, 1)),
        title=f"Gain of each client under {clean(label)} against {clean(reference)} on {phrase(metric.name)}: {better} "
        f"better, {len(ranked) - better - worse} equal, {worse} worse{ends}",
    )


def _bar(row: int, name: str, value: float, axis: Axis) -> Bar:
    start, end = sorted((axis.at(0.0), axis.at(value)))
    effect = "better" if value > 0 else "worse" if value < 0 else "level"
    return Bar(
        name, fitted(name, (LEFT - 8) / FONT), 4 + ROW * row, start, round(end - start, 1), effect, signed(value)
    )


def _path(ranked: Sequence[tuple[str, float]], box: Box, axis: Axis) -> str:
    """Draw the sorted gains from left to right."""
    step = (box.x_end - box.left) / (len(ranked) - 1)
    drawn = spread_out(len(ranked), MOST_POINTS)
    return " ".join(f"{box.left + step * index:.1f},{axis.at(ranked[index][1])}" for index in drawn)
