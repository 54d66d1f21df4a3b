"""Read files into rows: JSON lists and JSON lines, plain or gzipped, strict UTF-8, every bad row found with its place.

Nothing here knows what a row means; formats.py does. No fault ever shows the text of a row.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from fedmira.errors import DataError, nearest

Row = Mapping[str, object]

EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    file: str
    stem: str  # the file's name without its extension
    line: int
    alone: bool  # the row is the whole file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the data: where, and what to know about it without its text."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class BadRow(Exception):
    """Ends the reading of one row; becomes a Fault with the row's place."""


def find_files(path: Path) -> list[Path]:
    """Return the files to read, by name. Raises DataError if there are none, or two would share a column value."""
    if path.is_dir():
        inside = sorted(path.iterdir(), key=lambda file: file.name)
        files = [file for file in inside if file.is_file() and _extension(file) and not file.name.startswith(".")]
        if not files:
            raise DataError(f"data.path '{path}': the folder holds no {', '.join(EXTENSIONS)} file")
        stems = [_stem(file) for file in files]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice:
            raise DataError(f"data.path '{path}': more than one file is called '{twice[0]}'; keep one of them")
        return files
    if not path.is_file():
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data.path '{path}': no such file or folder{nearest(path.name, near)}; current folder: {Path.cwd()}"
        )
    if not _extension(path):
        raise DataError(f"data.path '{path}': reads {', '.join(EXTENSIONS)} files, or a folder of them")
    return [path]


def _extension(path: Path) -> str:
    return next((ending for ending in EXTENSIONS if path.name.lower().endswith(ending)), "")


def _stem(path: Path) -> str:
    return path.name[: -len(_extension(path))]


def read_rows(file: Path) -> Iterator[tuple[Place, Row] | Fault]:
    """Yield each row of a file with its place, or a Fault. Raises DataError if the file cannot be opened."""
    start = Place(file.name, _stem(file), 1, False)
    lines = ".jsonl" in _extension(file)
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as handle:
            stream = cast(BinaryIO, handle)
            yield from _read_lines(stream, start) if lines else _read_document(stream.read(), start)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield Fault(file.name, "damaged, or not a gzip file; copy it again, or drop the '.gz'")
    except OSError as error:
        raise DataError(f"data: cannot read '{file}': {error.strerror or error}") from None


def _read_lines(stream: Iterable[bytes], start: Place) -> Iterator[tuple[Place, Row] | Fault]:
    """Read one JSON object per line; lines of white space are no rows."""
    offset = 0
    for number, line in enumerate(stream, 1):
        place = replace(start, line=number)
        try:
            if text := _decode(line, offset).strip(" \t\r\n"):
                yield place, as_row(_parse(text, 0)[0])
        except BadRow as bad:
            yield Fault(str(place), str(bad))
            if offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                return  # UTF-16: every further line would be a fault of its own
        offset += len(line)


def _read_document(data: bytes, start: Place) -> Iterator[tuple[Place, Row] | Fault]:
    """Read a JSON list of objects, or one object, keeping the line on which each object begins."""
    try:
        text = _decode(data, 0)
    except BadRow as bad:
        yield Fault(start.file, str(bad))
        return
    position = _skip(text, 0)
    listed = text.startswith("[", position)
    position = _skip(text, position + 1) if listed else position
    more = position < len(text) and not (listed and text.startswith("]", position))
    line, counted = 1, 0
    while more:
        line, counted = line + text.count("\n", counted, position), position
        place = replace(start, line=line, alone=not listed)
        try:
            value, position = _parse(text, position, whole=False)
        except BadRow as bad:
            yield Fault(str(place), f"{bad}; the rest of the file is not read")
            return
        try:
            yield place, as_row(value)
        except BadRow as bad:
            yield Fault(str(place), str(bad))
        position = _skip(text, position)
        more = listed and text.startswith(",", position)
        position = _skip(text, position + 1) if more else position
    if listed and text.startswith("]", position):
        listed, position = False, _skip(text, position + 1)
    if listed or position < len(text):
        what = "the list is not closed here" if listed else "more text follows; one object per line is called .jsonl"
        yield Fault(f"{start.file}:{line + text.count(chr(10), counted, position)}", f"not JSON: {what}")


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode(data: bytes, offset: int) -> str:
    """Decode strict UTF-8. offset: the file's bytes before these; a mark at the file's start is not text."""
    if offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadRow("byte 0 is not UTF-8: the file looks like UTF-16; save it as UTF-8")
    if offset == 0 and data.startswith(_BOM):
        data, offset = data[len(_BOM) :], len(_BOM)
    if (nul := data.find(b"\0")) >= 0:
        raise BadRow(f"byte {offset + nul} of the file is NUL: text has none; save the file as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        line = f" (line {before + 1})" if before else ""
        raise BadRow(f"byte {offset + error.start} of the file is not UTF-8{line}; save the file as UTF-8") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("a key is given twice in one object; keep one")
    return row


def _no_constant(name: str) -> object:
    raise BadRow(f"{name} is no JSON number; write null where there is no value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse(text: str, position: int, *, whole: bool = True) -> tuple[object, int]:
    """Return the JSON value at a position and where it ends; `whole`: nothing but white space may follow."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        reason = error.msg.partition(":")[0].removesuffix(" at")  # what follows a colon may be the text itself
        where = f"line {error.lineno}, column {error.colno}" if not whole else f"column {error.colno}"
        raise BadRow(f"not JSON: {reason[0].lower()}{reason[1:]} at {where}") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    except ValueError:
        raise BadRow("a number with too many digits") from None
    if whole and _skip(text, end) < len(text):
        raise BadRow(f"not JSON: more text after the first value at column {_skip(text, end) + 1}; one row per line")
    return value, end


def as_row(value: object) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"found {kind_of(value)} where a row (a JSON object) was expected")
    return value


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "something else")
