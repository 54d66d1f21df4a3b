"""The page's charts as SVG files that stand alone, for papers and slides."""

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmira.disk.files import make_folder, write_atomic
from fedmira.errors import StoreError
from fedmira.reports import axes, curves, gain, network, paper
from fedmira.reports.record import StudyRecord
from fedmira.reports.templates import page_template
from fedmira.reports.wording import clean, number, title

# Colours are written out: a file of its own has no variables of the page.
STYLE = (
    "text{font:12px system-ui,'Segoe UI',Roboto,Arial,sans-serif;fill:#1a1a1a}text.soft{fill:#54595f}"
    "text.node{font-size:11px;paint-order:stroke;stroke:#fff;stroke-width:3px}"
    ".grid{stroke:#e3e6e9}.axis{stroke:#6b7177}"
)
COLOURS = {"better": axes.BETTER, "worse": axes.WORSE, "level": "#767676"}
HEAD, LINE = 26, 18  # pixels of the title and of one line of the legend


def write_figures(record: StudyRecord, folder: Path) -> list[Path]:
    """Write loss.svg, gain-<metric>-<method>.svg and graph-<method>.svg into a folder; return the files.

    Where matplotlib is installed, the figures for papers too (reports/paper.py).
    Raises StoreError if they cannot be written.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise StoreError(f"'{folder}' cannot be created: {error.strerror}; choose another --figures") from None
    written = []
    for name, svg in _figures(record):
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '-', name)}.svg"
        write_atomic(path, svg.encode("utf-8", "backslashreplace"), shared=True)
        written.append(path)
    return [*written, *(paper.write_plots(paper.study_plots(record), folder) if paper.available() else ())]


def _figures(record: StudyRecord) -> Iterator[tuple[str, str]]:
    """Yield (name, SVG) of the loss, of each method's gains on each metric, and of its graph."""
    draw: Any = page_template().environment.get_template("figures.html.j2").module
    styles = axes.styles(record.labels, record.baseline)
    if chart := curves.curve_chart(record, styles, curves.WIDE):
        legend = [
            (line.style, f"{clean(line.label)}: {number(line.first)} to {number(line.last)}") for line in chart.lines
        ]
        yield "loss", _alone(draw.curves(chart, ""), "Validation loss by round, mean over clients", legend)
    for metric in record.metrics:
        panels = gain.gain_panels(record, metric)
        for panel in panels.panels:
            if not panel.path and not panel.bars:
                continue
            drawn = draw.sorted_line(panel, COLOURS) if panel.path else draw.bars(panel, COLOURS)
            about = f"{clean(panel.label)}: gain on {title(metric.name)} over {clean(panels.reference)}"
            yield f"gain-{metric.name}-{panel.label}", _alone(drawn, about)
    for drawing in network.networks(record):
        if drawing.drawings:
            about = f"{clean(drawing.label)}: {drawing.about}"
            yield f"graph-{drawing.label}", _alone(draw.graph(drawing.drawings[0], drawing.title, ""), about)


def _alone(svg: str, about: str, legend: Sequence[tuple[axes.Style, str]] = ()) -> str:
    """Put a chart of the page below a title and above a legend, in a file with its own colours."""
    width, height = (int(re.search(rf' {side}="(\d+)"', svg)[1]) for side in ("width", "height"))  # type: ignore[index]
    whole = HEAD + height + LINE * len(legend) + 8
    lines = [
        f'<g transform="translate(20,{HEAD + height + LINE * place + 8})"><path d="{style.mark}" fill="{style.colour}" '
        f'stroke="#1a1a1a" stroke-width=".8"/><text x="12" y="4">{html.escape(text)}</text></g>'
        for place, (style, text) in enumerate(legend)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{whole}" fill="#fff"/>',
            f'<text x="8" y="17">{html.escape(about)}</text>',
            f'<g transform="translate(0,{HEAD})">{svg.strip()}</g>',
            *lines,
            "</svg>",
            "",
        ]
    )
