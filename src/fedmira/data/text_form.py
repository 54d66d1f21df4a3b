"""How a text file is written: its encoding, and in CSV its separator. What is sure is found, the rest is as configured.

Sure are the mark (BOM) of UTF-16 or UTF-32 in a CSV file, Excel's first line `sep=;`, and a header that only one
separator cuts into names that FedMira knows.
"""

import codecs
import csv
import gzip
import io
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from fedmira.data.rows import BOMS, UTF8_BOM
from fedmira.data.tables import SEPARATORS
from fedmira.errors import DataError

HEAD = 1 << 16  # bytes in which a header is looked for


@dataclass(frozen=True)
class TextForm:
    """What the config says, None where it says nothing, and what was found instead.

    known: names of columns that show that a header is cut correctly. found: one line per file that is not the usual
    UTF-8 with the separator of its extension, filled while files are read.
    """

    encoding: str | None = None
    delimiter: str | None = None
    known: Collection[str] = ()
    found: list[str] = field(default_factory=list)


def check_form(file: Path, ending: str, form: TextForm) -> None:
    """Raise DataError for a setting that does not apply to this kind of file, or that its mark contradicts."""
    if form.delimiter is not None and ending not in (".csv", ".tsv"):
        raise DataError(f"data.delimiter: only .csv and .tsv files have one, and '{file.name}' is another; remove it")
    if form.encoding is not None and ending == ".parquet":
        raise DataError(f"data.encoding: '{file.name}' is not a text file and has none; remove it")


@contextmanager
def in_utf8(stream: BinaryIO, file: Path, *, form: TextForm, table: bool) -> Iterator[BinaryIO]:
    """Give the bytes of a text file in UTF-8. table: it is CSV, where the mark of UTF-16 or UTF-32 is believed.

    Raises DataError if a mark at its start contradicts data.encoding.
    """
    head = _head(file, 4)
    marked = (
        "utf-8" if head.startswith(UTF8_BOM) else next((name for mark, name in BOMS if head.startswith(mark)), None)
    )
    if form.encoding is not None and marked and not _may_be(form.encoding, marked):
        raise DataError(
            f"data.encoding '{form.encoding}': '{file.name}' begins with the mark of {marked.upper()}; write "
            f"data.encoding: {marked}, or null"
        )
    encoding = form.encoding or (marked if table and marked != "utf-8" else None)
    if encoding is None:
        yield stream
        return
    if form.encoding is None:
        form.found.append(f"{file.name} is {encoding.upper()}")
    text = io.TextIOWrapper(stream, encoding, newline="\n")
    try:
        yield cast(BinaryIO, _Recoded(text))
    finally:
        text.detach()


def find_delimiter(file: Path, *, usual: str, form: TextForm) -> str:
    """Return the separator of a CSV file's columns."""
    if form.delimiter is not None:
        return form.delimiter
    head = _head(file, HEAD)
    marked = next((name for mark, name in BOMS if head.startswith(mark)), "utf-8-sig")
    text = head.decode(form.encoding or marked, "replace")
    line = next((line for line in text.splitlines() if line.strip()), "")
    if named := re.fullmatch(r'"?sep=(.)"?', line):
        return named[1]
    names = {sign: _cut(line, sign) for sign in (usual, *SEPARATORS)}
    if set(form.known) & set(names[usual]):
        return usual
    fits = [sign for sign, cells in names.items() if len(cells) > 1 and set(form.known) & set(cells)]
    if len(fits) != 1:
        return usual
    form.found.append(f"{file.name} has columns separated by {SEPARATORS[fits[0]]}")
    return fits[0]


def _cut(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _head(file: Path, size: int) -> bytes:
    """Return the first bytes of a file, uncompressed."""
    with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as handle:
        return cast(BinaryIO, handle).read(size)


def _may_be(encoding: str, marked: str) -> bool:
    """May a file with this mark be in an encoding? utf-16-le has the mark of UTF-16."""
    return codecs.lookup(encoding).name.startswith(marked)


class _Recoded:
    """The bytes in UTF-8 of a text stream."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def readline(self, size: int = -1) -> bytes:
        return self._text.readline(size).encode()

    def read(self, size: int = -1) -> bytes:
        return self._text.read(size).encode()
