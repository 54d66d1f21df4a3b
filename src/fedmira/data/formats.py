"""Read examples in the usual formats of fine-tuning data.

A format is one entry of `FORMATS`: the keys it reads, how its rows are recognised, how one row becomes records. Reading
is strict: every bad row is found, none is dropped silently, and no error shows the text of an example.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedmira.data.chats import convert_chat, recognises_chat
from fedmira.data.converters import (
    convert_instruction,
    convert_pair,
    convert_tasks,
    convert_text,
    recognises_instruction,
    recognises_pair,
    recognises_tasks,
    recognises_text,
)
from fedmira.data.records import ALIASES, PLAIN_KEY, Keys, Record, Turn, misspelt, present, quoted
from fedmira.data.rows import FAULTS_SHOWN, BadRow, Fault, Place, Row
from fedmira.data.sources import Source, Table, open_source
from fedmira.data.text_form import TextForm
from fedmira.data.unread import list_unread, refuse_row
from fedmira.errors import DataError, nearest

__all__ = ["FORMATS", "Format", "Reading", "Record", "Turn", "read_records"]


@dataclass(frozen=True)
class Format:
    """How one kind of row is recognised and read.

    recognises: does this row have the keys? convert: the records of one row, and a Fault for each that cannot be read.
    """

    name: str
    template: str  # the usual one: alpaca, none or chat
    keys: Keys
    recognises: Callable[[Row, Keys], bool]
    convert: Callable[[Row, Keys, Place], Iterable[Record | Fault]]
    optional: frozenset[str] = frozenset()  # the first row decides whether the data has it
    anywhere: frozenset[str] = frozenset()  # any row may have it
    kind: Literal["request", "chat", "text", "tasks"] = (
        "request"  # of a row: which keys beside its texts have a meaning
    )


class UnreadRows(DataError):
    """The data is there, and rows of it cannot be read."""


@dataclass(frozen=True)
class Reading:
    """All that was read of a source."""

    format: str
    template: str  # the format's usual one
    records: list[Record]
    skipped: tuple[Fault, ...]  # one for each example that could not be read; empty unless bad rows are skipped
    counts: Mapping[str, int]  # tables (files or splits), empty (of these), others (other files), kept, skipped
    keys: Mapping[str, str]  # our name -> the data's key for it in the first row
    found: tuple[str, ...] = ()  # what was found of files that are not UTF-8 with the usual separator
    splits: tuple[str, ...] = ()  # names of the source's own splits, where it has any: values of the column `split`

    @property
    def read(self) -> int:
        """All examples seen, kept and skipped."""
        return len(self.records) + len(self.skipped)


def read_records(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    subset: str | None = None,
    revision: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Reading:
    """Read all examples of a file, of a folder's files ordered by name, of a saved data set, or of one on the hub.

    The format is found by the keys of the first row if `format` is "auto"; records are in the order of the data.
    A folder adds the column `file`, the file's name without extension, and a data set with splits, or a folder with
    files named as splits, the column `split`, where a row has no such column. columns: our name -> the data's key,
    where they differ. on_bad_row: "error", or "skip" to leave out bad rows and list them in `skipped`. subset and
    revision: of a data set on the hub. encoding: of text files, None = UTF-8, or as a CSV file's mark says. delimiter:
    of CSV, None = as the extension, the header or Excel's first line says.
    Raises DataError: nothing to read, an unknown format or column name, bad rows (the first five and their number); if
    bad rows are skipped: no row is good, or a file cannot be read to its end, so that its rows cannot be counted.
    """
    columns = dict(columns or {})
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"data.on_bad_row '{on_bad_row}' is unknown; known: error, skip")
    reader = _Reader(str(path), columns, _check_request(format, columns), on_bad_row == "skip")
    known = {key for entry in FORMATS for keys in entry.keys.values() for key in keys} | set(columns.values())
    form = TextForm(encoding, delimiter, known)
    with open_source(path, subset=subset, revision=revision, form=form) as source:
        for table in source.tables:
            reader.take_table(table)
        return reader.finish(source, form)


@dataclass
class _Reader:
    """The state of reading one source."""

    path: str
    columns: Mapping[str, str]
    chosen: Format | None  # None = not yet recognised
    skips: bool
    keys: Keys | None = None  # settled by the first row that is recognised
    keys_read: Mapping[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    empty: int = 0  # tables without an example

    def take_table(self, table: Table) -> None:
        """Read all rows of one table. Raises DataError at a fault after which nothing can be read or counted."""
        seen = len(self.records) + len(self.faults)
        for item in table.read():
            if isinstance(item, Fault):
                self.faults.append(item)
                if item.stops and self.skips:
                    raise DataError(
                        f"data.path '{self.path}': {item}. data.on_bad_row skip cannot be used here: the "
                        "number of lost rows is not known"
                    )
                continue
            place, row = item
            for result in self._convert({**table.columns, **row} if table.columns else row, place):
                self.faults.append(result) if isinstance(result, Fault) else self.records.append(result)
        if len(self.records) + len(self.faults) == seen:
            self.empty += 1
            if not self.skips:
                self.faults.append(Fault(table.name, "holds no example"))

    def _convert(self, row: Row, place: Place) -> Iterator[Record | Fault]:
        try:
            self.chosen = self.chosen or _recognise(row, self.columns, place)
            if self.keys is None:
                self.keys = _settle_keys(self.chosen, row, self.columns, place)
                named = {name: present(row, keys) for name, keys in self.keys.items()}
                self.keys_read = {name: key for name, key in named.items() if key is not None}
        except BadRow as bad:
            fault = Fault(str(place), str(bad))
            if not self.skips:  # without a format nothing below can be read
                raise self._failed([*self.faults, fault]) from None
            yield fault
            return
        kind = self.chosen.kind
        taken = {key for names in self.keys.values() for key in names}
        if kind == "chat":
            taken |= {"prompt", "completion"}  # lists of turns, or the first turn's text once more
        try:
            results = list(self.chosen.convert(row, self.keys, place))
            refuse_row(row, taken, kind=kind, named=not set(self.columns) <= set(ALIASES))
        except BadRow as bad:
            yield Fault(str(place), str(bad))
            return
        turns = [turn for key in taken for turn in _listed(row.get(key))] if kind == "chat" else []
        read = {present(row, names) for names in self.keys.values()} | ({"prompt", "completion"} & taken)
        unread = tuple(list_unread(row, {key for key in read if key is not None}, turns, kind=kind))
        for result in results:
            yield replace(result, unread=unread) if unread and isinstance(result, Record) else result

    def finish(self, source: Source, form: TextForm) -> Reading:
        """Return the reading. Raises DataError if there is no record, or a fault that is not skipped."""
        if self.chosen is None or not self.records or (self.faults and not self.skips):
            raise self._failed(self.faults or [Fault(table.name, "holds no example") for table in source.tables])
        _refuse_mixture(self.path, source, self.chosen, self.columns)
        counts = {
            "tables": len(source.tables),
            "empty": self.empty,
            "others": len(source.others),
            "kept": len(self.records),
            "skipped": len(self.faults),
        }
        chosen = self.chosen
        return Reading(
            chosen.name,
            chosen.template,
            self.records,
            tuple(self.faults),
            counts,
            self.keys_read,
            tuple(form.found),
            source.splits,
        )

    def _failed(self, faults: Sequence[Fault]) -> "UnreadRows":
        shown = "".join(f"\n  - {fault}" for fault in faults[:FAULTS_SHOWN])
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        first = f", the first {FAULTS_SHOWN}" if len(faults) > FAULTS_SHOWN else ""
        return UnreadRows(f"data.path '{self.path}': {count}{first}:{shown}")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _refuse_mixture(path: str, source: Source, chosen: Format, columns: Mapping[str, str]) -> None:
    """Raise DataError if the folder has a file of another kind that holds examples too."""
    for table in source.others:
        rows = (item[1] for item in table.read() if not isinstance(item, Fault))
        row = next(rows, None)
        if row is not None and chosen.recognises(row, _keys_of(chosen, columns)):
            raise DataError(
                f"data.path '{path}': '{table.name}' holds examples too, but is another kind of file than "
                f"'{source.tables[0].name}'; keep files of one kind in a folder, or name one file"
            )


def _check_request(format: str, columns: Mapping[str, str]) -> Format | None:
    """Return the requested format, None for "auto". Raises DataError for an unknown format or column name."""
    names = [entry.name for entry in FORMATS]
    if format not in ("auto", *names):
        raise DataError(f"data.format '{format}' is unknown{nearest(format, names)}; known: auto, {', '.join(names)}")
    chosen = next((entry for entry in FORMATS if entry.name == format), None)
    keys = [name for entry in FORMATS if chosen in (None, entry) for name in entry.keys]
    allowed = list(dict.fromkeys([*keys, *ALIASES]))
    for name in columns:
        if name not in allowed:
            raise DataError(
                f"data.columns: '{name}' is not one of our names{nearest(name, allowed)}; for format '{format}' "
                f"they are {', '.join(allowed)} (our name: the data's column)"
            )
    return chosen


def _keys_of(entry: Format, columns: Mapping[str, str]) -> Keys:
    """Return the keys of a format, with the user's names instead of the usual ones."""
    return {**entry.keys, **{name: (key,) for name, key in columns.items()}}


def _recognise(row: Row, columns: Mapping[str, str], place: Place) -> Format:
    """Return the first format that recognises the row. Raises BadRow if none does.

    Conversations come first: a column beside one, such as its first prompt, repeats a part of it.
    """
    for entry in sorted(FORMATS, key=lambda entry: entry.template != "chat"):
        if set(columns) <= {*entry.keys, *ALIASES} and entry.recognises(row, _keys_of(entry, columns)):
            return entry
    raise BadRow(_unknown_format(row, columns, place))


def _settle_keys(entry: Format, row: Row, columns: Mapping[str, str], place: Place) -> Keys:
    """Decide by the first row whether an optional text exists: then every row must have it, otherwise none may.

    Raises BadRow if `columns` takes a name that no converter requires from a key that is missing.
    """
    for name in (*ALIASES, *entry.anywhere):
        if name in columns and columns[name] not in row:
            near = nearest(columns[name], [key for key in row if PLAIN_KEY.fullmatch(key) and not place.headed])
            raise BadRow(f"no '{columns[name]}'{near}, which data.columns.{name} names")
    keys = _keys_of(entry, columns)
    absent = {name for name in entry.optional if name not in columns and present(row, keys[name]) is None}
    return {name: spellings for name, spellings in keys.items() if name not in absent}


def _unknown_format(row: Row, columns: Mapping[str, str], place: Place) -> str:
    """Say which keys were found and which each format reads."""
    usual = {key for entry in FORMATS for spellings in entry.keys.values() for key in spellings} | {
        "id",
        "label",
        "labels",
        "split",
    }
    names = {key: name for name, key in columns.items()}  # the user's first
    for entry in FORMATS:
        spelled = [(name, key) for name, keys in entry.keys.items() for key in keys if name not in ALIASES]
        names |= {key: name for name, key in spelled if key not in names}
    near = misspelt(row, list(names))
    # In a CSV file without a header the keys are an example: only words that reveal nothing are shown.
    shown_keys = [
        quoted(key) if key in near else key
        for key in row
        if key in near or (key in usual if place.headed else PLAIN_KEY.fullmatch(key))
    ][:12]
    hidden = len(row) - len(shown_keys) if place.headed else 0
    unseen = ["1 other" if hidden == 1 else f"{hidden} others"] if hidden else []
    known = "; ".join(
        f"{entry.name}: {', '.join(keys[0] for name, keys in entry.keys.items() if name not in unnamed)}"
        for entry in FORMATS
        for unnamed in [{*ALIASES, *entry.anywhere}]
    )
    if {"question", "answer"} <= set(row):  # otherwise these would seem to be unknown
        return (
            "'question' and 'answer' are read as prompt and completion only if no other column may be part of the "
            "question; if no other is needed, say so: data.columns {prompt: question, completion: answer}"
        )
    if {"chosen", "rejected"} <= set(row):
        return (
            "'chosen' and 'rejected' are a preference, and there is no training on preferences; to train on the chosen "
            "texts: data.columns {prompt: prompt, completion: chosen}, or {messages: chosen} for lists of turns"
        )
    mapped = f" and data.columns for {', '.join(columns)}" if columns else ""
    header = "; is the first line a header?" if place.headed else "."
    advice = "Name the columns in data.columns (our name: yours), as in {prompt: question, completion: answer}"
    if near:
        written = ", ".join(f"{quoted(key)} is not '{wanted}'" for key, wanted in near.items())
        header = f": keys are read exactly as they are written, and {written}."
        ours = {**columns, **{names[wanted]: key for key, wanted in near.items()}}
        told = ", ".join(f"{name}: {quoted(key)}" for name, key in ours.items())
        advice = f"Rename the columns, or write data.columns (our name: yours): {{{told}}}"
    found = ", ".join([*shown_keys, *unseen]) or "none"
    return f"no known format has these keys ({found}){mapped}{header} Known: {known}. {advice}"


# ---------------------------------------------------------------- the table, and what errors say about it

_CHAT: Keys = {"system": ("system",)}

FORMATS: tuple[Format, ...] = (
    Format(
        "natural_instructions",
        "alpaca",
        {
            "task": ("task",),
            "category": ("category", "Categories", "upstream_categories"),
            "instruction": ("definition", "Definition"),
            "instances": ("instances", "Instances"),
            "input": ("input",),
            "answer": ("output",),
        },
        recognises_tasks,
        convert_tasks,
        kind="tasks",
    ),
    Format(
        "dolly",
        "alpaca",
        {"instruction": ("instruction",), "input": ("context",), "answer": ("response",)},
        recognises_instruction,
        convert_instruction,
        optional=frozenset({"input"}),
    ),
    Format(
        "alpaca",
        "alpaca",
        {"instruction": ("instruction",), "input": ("input",), "answer": ("output",)},
        recognises_instruction,
        convert_instruction,
        optional=frozenset({"input"}),
    ),
    Format(
        "prompt_completion",
        "none",
        {"prompt": ("prompt", "question"), "completion": ("completion", "answer")},
        recognises_pair,
        convert_pair,
    ),
    Format(
        "messages",
        "chat",
        {"messages": ("messages", "conversation"), **_CHAT},
        recognises_chat,
        convert_chat,
        anywhere=frozenset(_CHAT),
        kind="chat",
    ),
    Format(
        "sharegpt",
        "chat",
        {"conversations": ("conversations",), **_CHAT},
        recognises_chat,
        convert_chat,
        anywhere=frozenset(_CHAT),
        kind="chat",
    ),
    Format("text", "none", {"text": ("text",)}, recognises_text, convert_text, kind="text"),
)
