"""Read rows from tables: CSV and TSV, Parquet, and the Arrow files that `datasets` saves.

Nothing is written, cached or unpickled. CSV values stay text; Parquet and Arrow values become JSON values.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from fedmira.data.rows import LINE_MIB, BadRow, BadText, Fault, Item, Place, Row, decode, parse, split_lines, too_long

BATCH = 1000  # rows converted to Python values at once

SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}


class _Lost(BadRow):
    """After this fault the start of the next row is unknown."""


class _Lines:
    """A file's lines for csv.reader, and the state of the row being read."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._lines = split_lines(stream, limit=limit)
        self._limit = limit
        self.number = 0  # of the last line yielded
        self.begin()

    def begin(self) -> None:
        self.first = self.number + 1
        self.fault: BadText | None = None
        self.quotes = self._size = 0
        self.blank = True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, offset, line = next(self._lines)
        if line is None:
            raise _Lost(too_long("line", self._limit))
        self._size += len(line)
        if self._size > self._limit:
            raise _Lost(f"{too_long('row', self._limit)}, or close its quote")
        self.quotes += line.count(b'"')
        self.blank = self.blank and not line.strip(b" \r\n")
        try:
            return decode(line, offset)
        except BadText as bad:
            if bad.stops:
                raise _Lost(str(bad)) from None
            self.fault = self.fault or bad
            return line.decode("ascii", "replace")  # only to find the end of the row


def read_csv(stream: BinaryIO, start: Place, *, delimiter: str, limit: int = LINE_MIB << 20) -> Iterator[Item]:
    """Read one row per record of a CSV file, with the names in its first one; blank lines are skipped.

    A row's place is its first line: a quoted text may span several.
    """
    lines = _Lines(stream, limit)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        while True:
            try:
                values = _next_values(reader, lines, limit)
                if values is None:
                    return
                if lines.blank or (not header and _names_separator(values)):
                    continue
                if not header:
                    header = _check_header(values, delimiter)
                else:
                    yield replace(start, line=lines.first, headed=True), _name(values, header)
            except BadRow as bad:
                if isinstance(bad, _Lost) or not header:
                    raise
                yield Fault(f"{start.file}:{lines.first}", str(bad))
    except BadRow as bad:
        yield Fault(f"{start.file}:{lines.first}", f"{bad}; the file is not read further", stops=True)


def _names_separator(values: list[str]) -> bool:
    """Is this first line Excel's `sep=;`, which names the separator?"""
    return (
        values[:1] != [] and values[0].startswith("sep=") and len(values) <= 2 and len("".join(values)) <= len("sep=;")
    )


def _next_values(reader: Iterator[list[str]], lines: _Lines, limit: int) -> list[str] | None:
    """Return the next row's values, [] for a blank line, None at the end. Raises BadRow."""
    lines.begin()
    before = csv.field_size_limit(limit)  # global to the process, so it is restored at once
    try:
        values = next(reader, None)
    except csv.Error as error:
        raise _csv_fault(str(error), lines) from None
    finally:
        csv.field_size_limit(before)
    if lines.fault is not None:
        raise lines.fault
    return values


def _csv_fault(reason: str, lines: _Lines) -> BadRow:
    """Translate an error of the csv module; reading continues only if the line cannot be inside a quoted text."""
    if "end of data" in reason:
        return _Lost("a quote opened in this row is never closed")
    what = 'a quote inside a quoted text; write it twice: ""'
    if "new-line" in reason:
        what = "a carriage return without a line feed; end lines with a line feed, or quote the text"
    alone = lines.number == lines.first and lines.quotes % 2 == 0
    return BadRow(what) if alone else _Lost(what)


def _check_header(names: list[str], delimiter: str) -> list[str]:
    """Return the column names. Raises BadRow without showing one: without a header they are an example."""
    if len(names) == 1 and (other := next((sign for sign in SEPARATORS if sign != delimiter and sign in names[0]), "")):
        raise BadRow(
            f"the first line is one column with {SEPARATORS[other]} in it, but columns are separated by "
            f"{SEPARATORS.get(delimiter, repr(delimiter))} here (.csv: ',', .tsv: a tab); if they are separated by "
            f"{SEPARATORS[other]}, write data.delimiter: {other!r}"
        )
    for index, name in enumerate(names):
        if not name.strip():
            raise BadRow(f"column {index + 1} of {len(names)} has no name in the first line; name it, or remove it")
        if name in names[:index]:
            raise BadRow(f"columns {names.index(name) + 1} and {index + 1} have the same name; rename one")
    return names


def _name(values: list[str], header: list[str]) -> Row:
    if len(values) != len(header):
        count = f"{len(values)} value" + "s" * (len(values) > 1)
        raise BadRow(f"found {count} where the first line names {len(header)}; quote texts that contain the separator")
    return dict(zip(header, values, strict=True))


# ---------------------------------------------------------------- Parquet and Arrow


def read_parquet(stream: BinaryIO, start: Place) -> Iterator[Item]:
    """Read the rows of a Parquet file."""
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True) as table:
            yield from table.iter_batches(batch_size=BATCH)

    yield from _read_batches(batches(), start, "damaged, or not a Parquet file; copy it again")


def read_saved(folder: Path, start: Place) -> Iterator[Item]:
    """Read the rows of a folder that `datasets` saved: state.json names its Arrow files, which are memory-mapped."""
    import pyarrow

    def batches() -> Iterator[Any]:
        for file in files:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
                for batch in reader:
                    batch.validate(full=True)  # Arrow does not check its files: a wrong offset would crash the process
                    yield from (batch.slice(first, BATCH) for first in range(0, batch.num_rows, BATCH))

    try:
        files = [folder / name for name in _saved_names(folder / "state.json", "_data_files")]
    except BadRow as bad:
        yield Fault(start.file, str(bad), stops=True)
        return
    yield from _read_batches(batches(), start, "damaged, or incomplete; save it again")


def saved_splits(folder: Path) -> list[str] | None:
    """Return the splits of a folder that `datasets` saved, [] if it is one table; None for another folder.

    Raises BadRow if the file that names the splits is damaged.
    """
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return []
    return _saved_names(folder / "dataset_dict.json", "splits") if (folder / "dataset_dict.json").is_file() else None


def _saved_names(file: Path, key: str) -> list[str]:
    """Return the file or folder names that one of a saved folder's JSON files lists. Raises BadRow."""
    try:
        entries = json.loads(file.read_bytes())[key]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
        plain = all(Path(name).name == name and name not in ("", "..") for name in names)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise BadRow(f"'{file.name}' is missing or damaged; save the data set again") from None
    if not plain:
        raise BadRow(f"'{file.name}' names a file outside its folder; save the data set again")
    return names


def _read_batches(batches: Iterable[Any], start: Place, damage: str) -> Iterator[Item]:
    """Yield the rows of Arrow record batches, counted from 1. damage: the message if the file cannot be read."""
    import pyarrow

    row = 0
    try:
        for batch in batches:
            if len(set(batch.schema.names)) < len(batch.schema.names):
                yield Fault(start.file, "two columns have the same name; rename one", stops=True)
                return
            for value in _to_rows(batch):
                row += 1
                place = replace(start, line=row, unit="row")
                yield Fault(str(place), value) if isinstance(value, str) else (place, value)
    except (pyarrow.ArrowException, OSError, ValueError):
        yield Fault(start.file, f"{damage} (after row {row})", stops=True)


def _to_rows(batch: Any) -> Iterator[Row | str]:
    """Yield a record batch's rows; instead of one that cannot be read, its error."""
    readers = {name: reader for name, kind in _fields(batch.schema) if (reader := _json_reader(kind)) is not None}
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # one bad value: find its row
        rows = [None] * batch.num_rows
    for index, row in enumerate(rows):
        try:
            values = batch.slice(index, 1).to_pylist()[0] if row is None else row
            yield {**values, **{name: reader(values[name]) for name, reader in readers.items()}} if readers else values
        except UnicodeDecodeError:
            yield "a text is not UTF-8; save it as UTF-8"
        except (ValueError, OverflowError):
            yield "a value that Python cannot represent; remove its column"
        except BadRow as bad:
            yield f"a column of JSON: {bad}"


def _fields(schema: Any) -> Iterator[tuple[str, Any]]:
    yield from ((field.name, field.type) for field in schema)


def _json_reader(kind: Any) -> Callable[[Any], Any] | None:
    """Return a function that parses the JSON texts in a value of an Arrow type; None if there are none.

    `datasets` stores columns of mixed kinds as JSON: without parsing, a conversation's texts would be in quotes.
    """
    import pyarrow

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else parse(value, 0)[0]
    if pyarrow.types.is_struct(kind):
        inner = {name: reader for name, inner_kind in _fields(kind) if (reader := _json_reader(inner_kind)) is not None}
        return (
            (lambda value: value and {**value, **{name: read(value[name]) for name, read in inner.items()}})
            if inner
            else None
        )
    if any(test(kind) for test in (pyarrow.types.is_list, pyarrow.types.is_large_list)):
        item = _json_reader(kind.value_type)
        return (lambda value: value and [item(entry) for entry in value]) if item is not None else None
    return None
