"""Rows of hand-made runs, and a reader of pages that notes what a browser or a screen reader would."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from fedmira.reports.render import write_report

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "br"}
DRAWN = {"line", "polyline", "polygon", "path", "rect"}  # HTML lets only foreign elements (SVG) close themselves


def rows(values: dict[str, float | None], metric: str = "loss", number: int = 2) -> list[tuple[object, ...]]:
    """Test rows (client, round, split, metric, value) of one round."""
    return [(client, number, "test", metric, value) for client, value in values.items()]


def curve_rows(*values: float | None) -> list[tuple[object, ...]]:
    """Validation losses of client a, from round 0 on."""
    return [("a", number, "validation", "loss", value) for number, value in enumerate(values)]


def six(*values: float) -> dict[str, float | None]:
    """Values of clients c0, c1, ..."""
    return {f"c{place}": value for place, value in enumerate(values)}


@dataclass
class Table:
    """One table: its caption, the scopes of its header cells, and all cells as text, line by line."""

    caption: str = ""
    scopes: list[str | None] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)

    def line(self, label: str) -> list[str]:
        return next(line for line in self.lines if line[0] == label)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


class Page(HTMLParser):
    """Reads a page; a tag that does not nest fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.tables: list[Table] = []
        self.feed(text)
        assert self.open == []

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def table(self, caption: str) -> Table:
        """The first table whose caption begins so."""
        return next(table for table in self.tables if table.caption.startswith(caption))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr":
            self.tables[-1].lines.append([])
        elif tag == "th":
            self.tables[-1].scopes.append(element.attributes.get("scope"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def handle_endtag(self, tag: str) -> None:
        element = self.open.pop()
        assert element.tag == tag
        element.text = " ".join(element.text.split())
        if tag in ("th", "td"):
            self.tables[-1].lines[-1].append(element.text)
        elif tag == "caption":
            self.tables[-1].caption = element.text


def page(study: Path) -> Page:
    """Write a study's report and read it."""
    return Page(write_report(study).read_text(encoding="utf-8"))
