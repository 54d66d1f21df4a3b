"""Read bytes into rows: JSON lists and JSON lines, strict UTF-8, every bad row reported with its place.

formats.py, not this module, knows the meaning of a row. No fault shows the text of a row.
"""

import datetime
import decimal
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

Row = Mapping[str, object]

FAULTS_SHOWN = 5  # of all that an error reports
LINE_MIB = 64  # a longer line is not a row: one line at a time is in memory
DOCUMENT_GIB = 2  # a whole .json file is in memory

UTF8_BOM = b"\xef\xbb\xbf"
BOMS = (  # the longer ones first: UTF-16's is a part of UTF-32's
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_SPACE = re.compile(r"[ \t\n\r]*")
_SAVE = "save the file as UTF-8, or write its encoding, such as data.encoding: cp1252"
_ISO_2022 = re.compile(rb"\x1b[$()&]")  # pure ASCII bytes that mean other letters; a terminal's colours begin \x1b[
_PIECE = 1 << 24  # bytes read at once


@dataclass(frozen=True)
class Place:
    """The place of a row."""

    file: str
    stem: str  # the file's name without its extension
    line: int  # counted from 1
    alone: bool  # the row is the whole file
    unit: Literal["line", "row"] = "line"  # what is counted; a row of a binary table has no line
    headed: bool = False  # the keys are a file's first line, which is an example if the header is missing

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}, row {self.line}"


@dataclass(frozen=True)
class Fault:
    """One error in the data: where, and what, without its text."""

    where: str
    what: str
    stops: bool = False  # the file is not read further, so that its number of rows is unknown

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


Item = tuple[Place, Row] | Fault


class BadRow(Exception):
    """Ends the reading of one row; becomes a Fault with the row's place."""


class BadText(BadRow):
    """Bytes that are not text; `position` of the first, and whether all further bytes must be bad too."""

    def __init__(self, what: str, position: int, *, stops: bool = False) -> None:
        self.position = position
        self.stops = stops
        super().__init__(what)


def split_lines(stream: BinaryIO, *, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number (from 1), offset in the file and bytes of each line; None instead of a line longer than `limit`."""
    number, offset = 0, 0
    while line := stream.readline(limit + 1):
        number += 1
        length, piece = len(line), line
        while length > limit and not piece.endswith(b"\n") and (piece := stream.readline(_PIECE)):
            length += len(piece)
        yield number, offset, line if length <= limit else None
        offset += length


def read_lines(stream: BinaryIO, start: Place, *, limit: int = LINE_MIB << 20) -> Iterator[Item]:
    """Read one JSON object per line; lines of white space are skipped."""
    for number, offset, line in split_lines(stream, limit=limit):
        place = replace(start, line=number)
        try:
            if line is None:
                raise BadRow(too_long("line", limit))
            if text := decode(line, offset).strip(" \t\r\n"):
                yield place, as_row(parse(text, 0)[0])
        except BadRow as bad:
            stops = isinstance(bad, BadText) and bad.stops
            yield Fault(str(place), str(bad), stops)
            if stops:
                return


def too_long(what: str, limit: int) -> str:
    size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
    return f"the {what} is longer than {size}; is it one example? split it, or remove it"


def read_document(stream: BinaryIO, start: Place, *, limit: int = DOCUMENT_GIB << 30) -> Iterator[Item]:
    """Read a JSON list of objects, or one object, keeping the line on which each object begins."""
    data = bytearray()
    while piece := stream.read(_PIECE):
        data += piece
        if len(data) > limit:
            yield too_large(start, limit)
            return
    try:
        text = decode(data, 0)
    except BadText as bad:
        yield Fault(f"{start.file}:{1 + data.count(bytes([10]), 0, bad.position)}", str(bad), stops=True)
        return
    del data, piece  # the text is a copy of it
    yield from _read_text(text, start)


def too_large(start: Place, limit: int = DOCUMENT_GIB << 30) -> Fault:
    size = f"{limit >> 30} GiB" if limit >= 1 << 30 else f"{limit} bytes"
    what = f"a JSON document of more than {size} is not read, because it must fit in memory; write one row per line"
    return Fault(start.file, f"{what} (.jsonl)", stops=True)


def _read_text(text: str, start: Place) -> Iterator[Item]:
    position = _skip(text, 0)
    listed = text.startswith("[", position)
    position = _skip(text, position + 1) if listed else position
    more = position < len(text) and not (listed and text.startswith("]", position))
    line, counted = 1, 0
    while more:
        line, counted = line + text.count("\n", counted, position), position
        place = replace(start, line=line, alone=not listed)
        try:
            value, end = parse(text, position, whole=False)
        except BadRow as bad:
            value_end = _end_of(text, position)
            if value_end is None:
                yield Fault(str(place), f"{bad}; the file is not read further", stops=True)
                return
            yield Fault(str(place), str(bad))
            end = value_end
        else:
            yield _item(place, value)
        position = _skip(text, end)
        more = listed and text.startswith(",", position)
        position = _skip(text, position + 1) if more else position
    if listed and text.startswith("]", position):
        listed, position = False, _skip(text, position + 1)
    if listed or position < len(text):
        what = "the list is not closed here" if listed else "more text follows; use .jsonl for one object per line"
        where = f"{start.file}:{line + text.count(chr(10), counted, position)}"
        yield Fault(where, f"not JSON: {what}", stops=True)


def _item(place: Place, value: object) -> Item:
    try:
        return place, as_row(value)
    except BadRow as bad:
        return Fault(str(place), str(bad))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def decode(data: bytes | bytearray, offset: int) -> str:
    """Decode strict UTF-8. offset: the file's bytes before these; a mark at the file's start is not text.

    Raises BadText at the first byte that is not text.
    """
    if offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadText(f"byte 0 of the file is not UTF-8: {_wide(data)}", 0, stops=True)
    faults = []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        faults.append((error.start, f"is not UTF-8; {_SAVE}"))
    if (nul := data.find(b"\0")) >= 0:
        faults.append((nul, "is NUL, which is not text; save the file as UTF-8"))
    if escape := _ISO_2022.search(data):
        faults.append((escape.start(), "starts an escape sequence of ISO-2022, not text; save the file as UTF-8"))
    if faults:
        position, what = min(faults)
        wide = offset + nul < 4 and position == nul
        what = f"is NUL: {_wide(data)}" if wide else what
        raise BadText(f"byte {offset + position} of the file {what}", position, stops=wide)
    return text[1:] if offset == 0 and data.startswith(UTF8_BOM) else text


def _wide(start: bytes | bytearray) -> str:
    """Say which encoding the first bytes of a file look like, where each letter takes two or four."""
    marked = next((name for mark, name in BOMS if start.startswith(mark)), None)
    zeros = "".join("x" if byte else "0" for byte in start[:4])
    forms = {"x000": "utf-32-le", "000x": "utf-32-be"}
    name = marked or forms.get(zeros) or ("utf-16-be" if zeros.startswith("0") else "utf-16-le")
    return f"the file looks like UTF-16 or UTF-32; save it as UTF-8, or write data.encoding: {name}"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("a key is given twice in one object; keep one")
    return row


def _no_constant(name: str) -> object:
    raise BadRow(f"{name} is not a JSON number; write null where there is no value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()


def parse(text: str, position: int, *, whole: bool = True) -> tuple[object, int]:
    """Return the JSON value at a position and where it ends; `whole`: only white space may follow."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        reason = error.msg.partition(":")[0].removesuffix(" at")  # what follows a colon may be text of the row
        where = f"line {error.lineno}, column {error.colno}" if not whole else f"column {error.colno}"
        raise BadRow(f"not JSON: {reason[0].lower()}{reason[1:]} at {where}") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    except ValueError:
        raise BadRow("a number with too many digits") from None
    if whole and _skip(text, end) < len(text):
        raise BadRow(f"not JSON: more text after the first value at column {_skip(text, end) + 1}; one row per line")
    return value, end


def _end_of(text: str, position: int) -> int | None:
    """Return where a value ends that only a lenient reader accepts (a key twice, NaN); None if it is not JSON."""
    try:
        return _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return None


def as_row(value: object) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"found {kind_of(value)} where a row (a JSON object) was expected")
    return value


def kind_of(value: object) -> str:
    """Return the name of a value's kind, for errors."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    names = {dict: "an object", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    names |= {decimal.Decimal: "a number", bytes: "bytes"}
    return names.get(type(value), "something else")
