"""Figures for papers as SVG, PDF and PNG, and the data behind each as CSV, through matplotlib (the extra `figures`).

Text stays text in SVG and PDF, there is no title inside, methods differ in colour, dash and mark, and the same study
gives the same bytes. matplotlib is imported when a figure is written and not before: no other command waits for it.
"""

import csv
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.disk.client_names import as_cell
from fedmira.disk.files import write_atomic
from fedmira.reports import axes, network
from fedmira.reports.record import Metric, StudyRecord
from fedmira.reports.series import Curve, loss_curves
from fedmira.reports.stats import gains
from fedmira.reports.wording import clean, phrase

HINT = (
    "pip install 'fedmira[figures]' adds figures for papers as SVG, PDF and PNG with their data as CSV: loss by round, "
    "bytes and seconds, sorted gains, task graphs, sweeps"
)
COLUMN, PAGE = (3.4, 2.5), (6.9, 3.9)  # inches
DASHES: Sequence[Any] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
MARKS = "osD^vP*"  # but for the baseline's, six of them: no common factor with the number of dashes
SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.bbox": "tight",
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmira",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names of clients are no formulas; labels of a logarithmic axis would be
}
METADATA: Mapping[str, Mapping[str, None]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
    "png": {},
}
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
Row = Sequence[object]


class Look(NamedTuple):
    """How a method is drawn in every figure."""

    colour: str
    dash: Any
    mark: str


class Plot(NamedTuple):
    """A figure: the name of its files, what draws it, and its data by file name."""

    name: str
    draw: Callable[[], Any]
    tables: Mapping[str, str]


def available() -> bool:
    """Is matplotlib installed? It is not imported."""
    return find_spec("matplotlib") is not None


def write_plots(plots: Iterable[Plot], folder: Path) -> list[Path]:
    """Write each plot as SVG, PDF and PNG and its data as CSV, atomically, into a folder that exists.

    Raises StoreError if a file cannot be written.
    """
    import matplotlib

    written = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font does not have
        matplotlib.rcdefaults()  # not those of this machine
        matplotlib.rcParams.update(SETTINGS)
        for plot in plots:
            figure = plot.draw()
            files = {f"{plot.name}.{kind}": _saved(figure, kind) for kind in METADATA}
            files |= {name: table.encode("utf-8", "backslashreplace") for name, table in plot.tables.items()}
            for name, content in files.items():
                path = folder / re.sub(r"[^A-Za-z0-9_.-]", "-", name)
                write_atomic(path, content, shared=True)
                written.append(path)
    return written


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=METADATA[kind])
    return buffer.getvalue()


def study_plots(record: StudyRecord) -> Iterator[Plot]:
    """Yield the figures of a study. Raises StoreError if a graph.json is damaged."""
    looks = looks_of(record.labels, record.baseline)
    curves = loss_curves(record)
    for by, title in (("round", "round"), ("bytes", "sent, up and down"), ("seconds", "seconds")):
        known = [curve for curve in curves if all(getattr(point, by) is not None for point in curve.points)]
        if known:
            yield _loss_plot(known, by, title, looks)
    for metric in record.metrics:
        reference, table = gains(record.results, metric=metric.name, baseline=record.baseline)
        ranked = {label: _ranked(gain_of) for label, gain_of in table.items()}
        if any(ranked.values()):
            yield _gain_plot(record, metric, reference, ranked, looks)
    for drawn in network.networks(record):
        if drawn.drawings:
            yield _graph_plot(drawn)


def looks_of(labels: Sequence[str], baseline: str) -> dict[str, Look]:
    """Give each method a colour, a dash and a mark that together are its own; black circles for the baseline."""
    others = [label for label in labels if label != baseline]
    styles = axes.styles(labels, baseline)
    found = {label: Look(styles[label].colour, "-", MARKS[0]) for label in labels if label == baseline}
    for place, label in enumerate(others):
        dash, mark = DASHES[(place + 1) % len(DASHES)], MARKS[1 + place % (len(MARKS) - 1)]
        found[label] = Look(styles[label].colour, dash, mark)
    return found


def table_of(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Return CSV; None and NaN are empty cells."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return buffer.getvalue()


def new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes, without the state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.add_subplot()


def put_legend(plane: Any, count: int) -> None:
    """Put a legend above the plane, where it hides nothing."""
    if count:
        plane.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(count, 3), handlelength=3.2, borderaxespad=0.2)


def _loss_plot(curves: Sequence[Curve], by: str, title: str, looks: Mapping[str, Look]) -> Plot:
    most = max((getattr(curve.points[-1], by) for curve in curves), default=0)
    unit, factor = next(one for one in UNITS if most >= one[1] or one[1] == 1.0) if by == "bytes" else ("", 1.0)

    def draw() -> Any:
        figure, plane = new_figure(COLUMN)
        means = [curve for curve in curves if curve.seed is None]
        for curve in curves:
            look = looks[curve.method]
            finite = [point for point in curve.points if math.isfinite(point.loss)]
            xs, ys = [getattr(point, by) / factor for point in finite], [point.loss for point in finite]
            if curve.seed is not None:
                plane.plot(xs, ys, color=look.colour, linewidth=0.5, alpha=0.5, zorder=1)
                continue
            every = max(1, len(xs) // 8)
            plane.plot(
                xs,
                ys,
                color=look.colour,
                linestyle=look.dash,
                marker=look.mark,
                markevery=every,
                label=clean(curve.method),
                zorder=3,
            )
            halves = [point.half_width or 0.0 for point in finite]
            low, high = ([y + sign * half for y, half in zip(ys, halves, strict=True)] for sign in (-1, 1))
            plane.fill_between(xs, low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=2)
        plane.set_xlabel(f"{unit} {title}".strip())
        plane.set_ylabel("validation loss, nats per token")
        put_legend(plane, len(means))
        return figure

    fields = ("round", *(() if by == "round" else (by,)), "loss", "half_width", "clients")
    rows = [
        [curve.method, curve.seed, *(getattr(point, name) for name in fields)]
        for curve in curves
        for point in curve.points
    ]
    name = f"loss-by-{by}"
    return Plot(name, draw, {f"{name}.csv": table_of(("method", "seed", *fields), rows)})


def _ranked(gain_of: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the clients with a gain, the best first."""
    known = [(client, gain) for client, gain in gain_of.items() if not math.isnan(gain)]
    return sorted(known, key=lambda item: item[1], reverse=True)


def _gain_plot(
    record: StudyRecord,
    metric: Metric,
    reference: str,
    ranked: Mapping[str, Sequence[tuple[str, float]]],
    looks: Mapping[str, Look],
) -> Plot:
    def draw() -> Any:
        figure, plane = new_figure(COLUMN)
        plane.axhline(0, color="#6b7177", linewidth=0.8, zorder=1)
        for label, clients in ranked.items():
            look = looks[label]
            places = [place for place, (_, gain) in enumerate(clients, 1) if math.isfinite(gain)]
            plane.plot(
                places,
                [clients[place - 1][1] for place in places],
                color=look.colour,
                linestyle=look.dash,
                marker=look.mark,
                markevery=max(1, len(places) // 8),
                label=clean(label),
            )
        plane.set_xlabel("clients, from the greatest gain to the smallest")
        plane.set_ylabel(f"gain in {phrase(metric.name)} over {clean(reference)}")
        plane.xaxis.get_major_locator().set_params(integer=True)
        put_legend(plane, len(ranked))
        return figure

    rows = [
        [label, place, client, as_cell(record.called(client)), gain]
        for label, clients in ranked.items()
        for place, (client, gain) in enumerate(clients, 1)
    ]
    name = f"gains-{metric.name}"
    return Plot(name, draw, {f"{name}.csv": table_of(("method", "rank", "client", "name", "gain"), rows)})


def _graph_plot(drawn: network.Network) -> Plot:
    """The task graph as on the page: blue circles gain, vermilion squares lose, diamonds are level."""
    drawing = drawn.drawings[0]
    shapes = {axes.CIRCLE: "o", axes.SQUARE: "s", axes.DIAMOND: "D"}

    def draw() -> Any:
        from matplotlib.cm import ScalarMappable
        from matplotlib.collections import LineCollection
        from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba

        figure, plane = new_figure(PAGE)
        ends = [[(x1, y1), (x2, y2)] for x1, y1, x2, y2, _ in drawing.edges]
        shades = [to_rgba("#4a4f55", opacity) for *_, opacity in drawing.edges]
        plane.add_collection(LineCollection(ends, colors=shades, linewidths=0.7, zorder=1))
        for node in drawing.nodes:
            size = (4.6 * node.scale) ** 2  # 8 pixels of the page's 860 on 6.9 inches
            plane.scatter(
                [node.x],
                [node.y],
                s=size,
                c=[node.fill],
                marker=shapes[node.mark],
                edgecolors="#1a1a1a",
                linewidths=0.5,
                zorder=2,
            )
            if node.label:
                plane.text(node.x, node.y + node.label_y, node.label, fontsize=6, ha="center", zorder=3)
        xs = [node.x for node in drawing.nodes]
        plane.set_xlim(min(xs) - 60, max(xs) + 60)
        plane.set_ylim(drawing.box.height, 0)
        plane.set_aspect("equal")
        plane.axis("off")
        limit = max((abs(node.gain) for node in drawing.nodes if math.isfinite(node.gain)), default=0.0)
        if limit:
            colours = LinearSegmentedColormap.from_list("gain", [axes.WORSE, axes.LEVEL, axes.BETTER])
            scale = ScalarMappable(Normalize(-limit, limit), colours)
            figure.colorbar(scale, ax=plane, shrink=0.6, pad=0.01, label=drawn.measure)
        return figure

    nodes = [[as_cell(node.name), node.gain, node.x, node.y] for node in drawing.nodes]
    edges = [
        [as_cell(drawing.nodes[row].name), as_cell(drawing.nodes[column].name), weight]
        for row, column, weight in drawing.ends
    ]
    name = f"task-graph-{drawn.label}"
    return Plot(
        name,
        draw,
        {
            f"{name}.csv": table_of(("name", "gain", "x", "y"), nodes),
            f"{name}-edges.csv": table_of(("name", "neighbour", "weight"), edges),
        },
    )
