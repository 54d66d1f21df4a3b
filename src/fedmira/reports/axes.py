"""Boxes, axes, colours and marks that the page's charts share; positions are pixels, rounded to keep pages small."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Okabe & Ito's colours, which colour-blind readers can distinguish; yellow is last because it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
BETTER, WORSE, LEVEL = "#0072B2", "#D55E00", "#F2F2F2"  # the two ends and the middle of gain
BASELINE_COLOUR = "#000000"
DASHES = ("", "7 3", "2 3")

CIRCLE = "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z"
SQUARE = "M-3.6,-3.6h7.2v7.2h-7.2z"
DIAMOND = "M0,-5L5,0L0,5L-5,0z"
MARKS = (  # in addition to colour; the number of marks and that of colours have no common factor
    SQUARE,
    "M0,-4.8L4.6,3.6H-4.6z",
    DIAMOND,
    "M0,4.8L4.6,-3.6H-4.6z",
    "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "M-4.8,0L-2.4,-4.2H2.4L4.8,0L2.4,4.2H-2.4z",
)


class Style(NamedTuple):
    """How one method is drawn everywhere on the page. mark: an SVG path around (0, 0)."""

    colour: str
    dash: str
    mark: str


class Box(NamedTuple):
    """A chart's size and margins."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def x_end(self) -> int:
        return self.width - self.right

    @property
    def y_end(self) -> int:
        return self.height - self.bottom


class Axis(NamedTuple):
    """Values [low, high] along pixels [start, end]. marks: (pixel, label)."""

    low: float
    high: float
    start: float
    end: float
    marks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        """Return the pixel of a value; values beyond an end, and infinities, are drawn at that end."""
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)


def styles(labels: Sequence[str], baseline: str) -> dict[str, Style]:
    """Give each method a colour, a dash and a mark: black circles for the baseline, a different pair for each other."""
    others = [label for label in labels if label != baseline]
    coloured = {
        label: Style(
            COLOURS[index % len(COLOURS)],
            DASHES[index // len(COLOURS) % len(DASHES)],
            MARKS[index % len(MARKS)],
        )
        for index, label in enumerate(others)
    }
    return {label: coloured.get(label, Style(BASELINE_COLOUR, "", CIRCLE)) for label in labels}


def enclosing_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Lay out an axis whose first and last mark enclose the values."""
    marked = marks(min(values), max(values))
    axis = Axis(marked[0], marked[-1], start, end, [])
    return Axis(axis.low, axis.high, start, end, [(axis.at(value), f"{value:g}") for value in marked])


def round_axis(low: int, high: int, start: float, end: float) -> Axis:
    """Lay out an axis of rounds that ends with the last one; its marks are whole numbers, including the last round."""
    high = max(high, low + 1)
    axis = Axis(low, high, start, end, [])
    gap = 0.1 * (high - low)
    marked = [value for value in marks(low, high, whole=True) if low <= value <= high - gap] + [high]
    return Axis(low, high, start, end, [(axis.at(value), f"{value:g}") for value in marked])


def balanced_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Lay out an axis that includes zero and all values, with a mark at zero."""
    return enclosing_axis([0.0, *values], start, end)


def marks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return 2 to 7 evenly spaced round numbers that enclose [low, high]; whole: integers only."""
    if high <= low:
        high = low + (1 if whole else max(abs(low) * 0.1, 1e-3))
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{multiple * step:.10g}") for multiple in range(first, last + 1)]


def spread_out(count: int, most: int) -> list[int]:
    """Choose at most `most` of the indices 0 .. count - 1, evenly, including the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(step * (count - 1) / (most - 1)) for step in range(most)})


def gain_colour(gain: float, limit: float) -> str:
    """Mix the colour of a gain: blue at +limit, near white at 0, vermilion at -limit."""
    share = 1.0 if math.isinf(gain) else min(abs(gain) / limit, 1.0) if limit > 0 else 0.0
    return mixed(LEVEL, BETTER if gain > 0 else WORSE, share)


def mixed(start: str, end: str, share: float) -> str:
    """Mix two colours #RRGGBB: the first at share 0, the second at 1."""
    pairs = [(int(start[i : i + 2], 16), int(end[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(low + share * (high - low)):02X}" for low, high in pairs)
