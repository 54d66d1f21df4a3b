"""Read examples from JSON and JSONL files in the formats that federated fine-tuning data comes in.

A format is one entry of `FORMATS`: the keys it reads, how its rows are recognised, how one row becomes records. Reading
is strict: every bad row is found, none is dropped in silence, and no error ever shows the text of an example.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from fedmira.errors import DataError, nearest

Row = Mapping[str, object]
Keys = Mapping[str, Sequence[str]]  # our name -> the data's keys that may hold it, the first one present counts

EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ALIASES = ("task", "category")  # columns that any format may take from another key of the data
FAULTS_SHOWN = 5

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN_KEY = re.compile(r"[\w .:/-]{1,40}")  # keys outside it may be text in the wrong place: errors do not show them
_PLAIN_ID = re.compile(r"[\w.:#/-]{1,120}")


@dataclass(frozen=True)
class Record:
    """One example as read."""

    instruction: str
    input: str  # may be empty
    answers: tuple[str, ...]  # the first is trained on, all count for scoring; at least one, none empty
    columns: Mapping[str, str]  # every scalar column of the row as text
    source: str  # "file:line" or "file#instance id"; never example text


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


@dataclass(frozen=True)
class Format:
    """How one kind of row is known and read.

    recognises: does this row have the keys? convert: the records of one row, and a Fault for each that cannot be read.
    """

    name: str
    keys: Keys
    recognises: Callable[[Row, Keys], bool]
    convert: Callable[[Row, Keys, Place], Iterable[Record | Fault]]
    optional: frozenset[str] = frozenset()


class _BadRow(Exception):
    """Ends the reading of one row; becomes a Fault with the row's place."""


def read_records(
    path: str | Path, *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[str, list[Record]]:
    """Read all examples of a file, or of a folder's files in the order of their names.

    Returns the format's name (found by the keys of the first row if `format` is "auto") and the records in file order.
    A folder adds the column `file`, the file's name without extension, where a row has no `file` of its own.
    columns: our name -> the data's key, where they differ (`instruction`, `input`, `answer`, `prompt`, `completion`,
    `task`, `category`).
    Raises DataError: nothing to read, an unknown format or column name, or bad rows (the first five and their number).
    """
    path = Path(path)
    columns = dict(columns or {})
    chosen = _check_request(format, columns)
    files = _find_files(path)
    is_folder = path.is_dir()
    keys: Keys | None = None  # settled by the first row
    records: list[Record] = []
    faults: list[Fault] = []
    for file in files:
        seen = len(records) + len(faults)
        for item in _read_rows(file):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            place, row = item
            if is_folder:
                row = {"file": place.stem, **row}
            try:
                chosen = chosen or _recognise(row, columns)
                keys = keys or _settle_keys(chosen, row, columns)
            except _BadRow as bad:  # nothing below can be read without knowing how
                raise _bad_rows(path, [*faults, Fault(str(place), str(bad))]) from None
            for made in _convert(chosen, row, keys, place):
                if isinstance(made, Fault):
                    faults.append(made)
                else:
                    records.append(made)
        if len(records) + len(faults) == seen:
            faults.append(Fault(file.name, "holds no example"))
    if faults or chosen is None:
        raise _bad_rows(path, faults)
    return chosen.name, records


# ---------------------------------------------------------------- files to rows


def _check_request(format: str, columns: Mapping[str, str]) -> Format | None:
    """Return the format asked for, None for "auto". Raises DataError for an unknown format or column name."""
    names = [entry.name for entry in FORMATS]
    if format not in ("auto", *names):
        raise DataError(f"data.format '{format}' is unknown{nearest(format, names)}; known: auto, {', '.join(names)}")
    chosen = next((entry for entry in FORMATS if entry.name == format), None)
    keys = [name for entry in FORMATS if chosen in (None, entry) for name in entry.keys]
    allowed = list(dict.fromkeys([*keys, *ALIASES]))
    for name in columns:
        if name not in allowed:
            raise DataError(
                f"data.columns: '{name}' is no name of ours{nearest(name, allowed)}; for format '{format}' "
                f"they are {', '.join(allowed)} (our name: the data's column)"
            )
    return chosen


def _find_files(path: Path) -> list[Path]:
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


def _read_rows(file: Path) -> Iterator[tuple[Place, Row] | Fault]:
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
                yield place, _as_row(_parse(text, 0)[0])
        except _BadRow as bad:
            yield Fault(str(place), str(bad))
            if offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                return  # UTF-16: every further line would be a fault of its own
        offset += len(line)


def _read_document(data: bytes, start: Place) -> Iterator[tuple[Place, Row] | Fault]:
    """Read a JSON list of objects, or one object, keeping the line on which each object begins."""
    try:
        text = _decode(data, 0)
    except _BadRow as bad:
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
        except _BadRow as bad:
            yield Fault(str(place), f"{bad}; the rest of the file is not read")
            return
        try:
            yield place, _as_row(value)
        except _BadRow as bad:
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
        raise _BadRow("byte 0 is not UTF-8: the file looks like UTF-16; save it as UTF-8")
    if offset == 0 and data.startswith(_BOM):
        data, offset = data[len(_BOM) :], len(_BOM)
    if (nul := data.find(b"\0")) >= 0:
        raise _BadRow(f"byte {offset + nul} of the file is NUL: text has none; save the file as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        line = f" (line {before + 1})" if before else ""
        raise _BadRow(f"byte {offset + error.start} of the file is not UTF-8{line}; save the file as UTF-8") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _BadRow("a key is given twice in one object; keep one")
    return row


def _no_constant(name: str) -> object:
    raise _BadRow(f"{name} is no JSON number; write null where there is no value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse(text: str, position: int, *, whole: bool = True) -> tuple[object, int]:
    """Return the JSON value at a position and where it ends; `whole`: nothing but white space may follow."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        reason = error.msg.partition(":")[0].removesuffix(" at")  # what follows a colon may be the text itself
        where = f"line {error.lineno}, column {error.colno}" if not whole else f"column {error.colno}"
        raise _BadRow(f"not JSON: {reason[0].lower()}{reason[1:]} at {where}") from None
    except RecursionError:
        raise _BadRow("JSON nested too deeply") from None
    except ValueError:
        raise _BadRow("a number with too many digits") from None
    if whole and _skip(text, end) < len(text):
        raise _BadRow(f"not JSON: more text after the first value at column {_skip(text, end) + 1}; one row per line")
    return value, end


def _as_row(value: object) -> Row:
    if not isinstance(value, dict):
        raise _BadRow(f"found {_kind(value)} where a row (a JSON object) was expected")
    return value


# ---------------------------------------------------------------- rows to records


def _keys_of(entry: Format, columns: Mapping[str, str]) -> Keys:
    """Return the keys of a format with the user's names in place of the usual ones."""
    return {**entry.keys, **{name: (key,) for name, key in columns.items()}}


def _recognise(row: Row, columns: Mapping[str, str]) -> Format:
    """Return the first format of the table that knows the row. Raises _BadRow if none does."""
    for entry in FORMATS:
        if set(columns) <= {*entry.keys, *ALIASES} and entry.recognises(row, _keys_of(entry, columns)):
            return entry
    raise _BadRow(_unknown_format(row, columns))


def _settle_keys(entry: Format, row: Row, columns: Mapping[str, str]) -> Keys:
    """Decide by the first row whether an optional text exists: then every row must have it, else none may.

    Raises _BadRow if `columns` takes `task` or `category` from a key that is not there.
    """
    for name in ALIASES:
        if name in columns and columns[name] not in row:
            near = nearest(columns[name], [key for key in row if _PLAIN_KEY.fullmatch(key)])
            raise _BadRow(f"no '{columns[name]}'{near}, which data.columns.{name} names")
    keys = _keys_of(entry, columns)
    absent = {name for name in entry.optional if name not in columns and _present(row, keys[name]) is None}
    return {name: own for name, own in keys.items() if name not in absent}


def _convert(entry: Format, row: Row, keys: Keys, place: Place) -> Iterator[Record | Fault]:
    try:
        yield from entry.convert(row, keys, place)
    except _BadRow as bad:
        yield Fault(str(place), str(bad))


def _present(row: Row, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in row), None)


def _recognises_flat(row: Row, keys: Keys) -> bool:
    """Every text must be there; the input may be absent, but not stand under a name that would go unread."""
    needed = [name for name in keys if name not in ("input", *ALIASES)]
    return all(_present(row, keys[name]) is not None for name in needed) and _unread_input(row, keys) is None


def _unread_input(row: Row, keys: Keys) -> str | None:
    """Return the key of an input that is not read: losing it in silence would change the task."""
    if "prompt" in keys or _present(row, keys.get("input", ())) is not None:
        return None
    taken = {key for own in keys.values() for key in own}
    return next((key for key in ("input", "context") if key in row and key not in taken), None)


def _convert_flat(row: Row, keys: Keys, place: Place) -> Iterator[Record]:
    """One row, one example: instruction (or prompt), input if the data has one, answer (or completion)."""
    ask, reply = ("prompt", "completion") if "prompt" in keys else ("instruction", "answer")
    instruction = _text(row, keys, ask)
    text = _text(row, keys, "input") if "input" in keys else ""
    if unread := _unread_input(row, keys):
        raise _BadRow(f"'{unread}' would not be read; the first row has no input, or name it: {{input: {unread}}}")
    answers = _answers(row, keys, reply, several=reply == "completion")
    columns = _scalars(row)
    for name in ALIASES:
        if name in keys:
            key = _required(row, keys, name)
            columns = {own: text for own, text in columns.items() if own != name or key == name}
            if key in columns:
                columns[name] = columns[key]
    yield Record(instruction, text, answers, columns, str(place))


def _recognises_tasks(row: Row, keys: Keys) -> bool:
    return all(_present(row, keys[name]) is not None for name in ("instruction", "instances"))


def _convert_tasks(row: Row, keys: Keys, place: Place) -> Iterator[Record | Fault]:
    """One row, one Natural Instructions task: a record for each of its instances."""
    definition = _answers(row, keys, "instruction", several=True)
    instances = row[_required(row, keys, "instances")]
    if not isinstance(instances, list) or not instances:
        raise _BadRow(f"'{_present(row, keys['instances'])}' is {_kind(instances)}, not a list with an instance")
    columns = _task_columns(row, keys, place)
    for index, instance in enumerate(instances):
        try:
            example = _as_row(instance)
            text = _text(example, keys, "input")
            answers = _answers(example, keys, "answer", several=True)
        except _BadRow as bad:
            yield Fault(f"{place}, instance {index + 1} of {len(instances)}", str(bad))
            continue
        name = example.get("id")
        known = isinstance(name, str) and _PLAIN_ID.fullmatch(name)
        source = f"{place.file}#{name}" if known else f"{place}#{index}"
        yield Record("\n".join(definition), text, answers, columns, source)


def _task_columns(row: Row, keys: Keys, place: Place) -> dict[str, str]:
    """Return a task's fields as text, lists of scalars joined by "; ", with `task` and, where known, `category`."""
    unread = {_present(row, keys[name]) for name in ("instruction", "instances")}
    columns: dict[str, str] = {}
    for key, value in row.items():
        words = _scalar_list(value, key)
        if key not in unread and words:
            columns[key] = "; ".join(words)
    for name in ALIASES:
        source = _present(row, keys[name])
        if source is not None and (words := _scalar_list(row[source], source)):
            columns[name] = words[0]
    if not columns.get("task"):
        if not place.alone:
            raise _BadRow("no 'task': only a .json file that is one task may leave its name to the file's name")
        columns["task"] = place.stem
    return columns


def _scalar_list(value: object, key: str) -> list[str]:
    """Return a scalar, or a list of nothing but scalars, as texts; anything else as none."""
    values = value if isinstance(value, list) else [value]
    words = [text for word in values for text in _scalars({key: word}).values()]
    return words if len(words) == len(values) else []


def _required(row: Row, keys: Keys, name: str) -> str:
    key = _present(row, keys[name])
    if key is None:
        raise _BadRow(f"no '{keys[name][0]}'")
    return key


def _text(row: Row, keys: Keys, name: str) -> str:
    key = _required(row, keys, name)
    return _check_text(row[key], key)


def _answers(row: Row, keys: Keys, name: str, *, several: bool) -> tuple[str, ...]:
    """Return one text, or if `several` a list of them, none empty."""
    key = _required(row, keys, name)
    value = row[key]
    texts = value if several and isinstance(value, list) else [value]
    if not texts:
        raise _BadRow(f"'{key}' is an empty list")
    answers = tuple(_check_text(text, key) for text in texts)
    if not all(text.strip() for text in answers):
        raise _BadRow(f"'{key}' is empty")
    return answers


def _check_text(value: object, key: str) -> str:
    """Return the value if it is text that UTF-8 can hold. JSON escapes can smuggle in NUL and half characters."""
    shown = f"'{key}'" if _PLAIN_KEY.fullmatch(key) else "a column"
    if not isinstance(value, str):
        raise _BadRow(f"{shown} is {_kind(value)}, not text")
    if "\0" in value:
        raise _BadRow(f"{shown} contains a NUL character")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise _BadRow(f"{shown} contains half a character (a lone surrogate)")
    return value


def _scalars(row: Row) -> dict[str, str]:
    """Return the columns that hold one value, as text; null is no value."""
    columns: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, str):
            columns[key] = _check_text(value, key)
        elif isinstance(value, bool | int | float):
            columns[key] = json.dumps(value)
    return columns


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "something else")


# ---------------------------------------------------------------- the table, and what errors say about it

FORMATS: tuple[Format, ...] = (
    Format(
        "natural_instructions",
        {
            "task": ("task",),
            "category": ("category", "Categories", "upstream_categories"),
            "instruction": ("definition", "Definition"),
            "instances": ("instances", "Instances"),
            "input": ("input",),
            "answer": ("output",),
        },
        _recognises_tasks,
        _convert_tasks,
    ),
    Format(
        "dolly",
        {"instruction": ("instruction",), "input": ("context",), "answer": ("response",)},
        _recognises_flat,
        _convert_flat,
        frozenset({"input"}),
    ),
    Format(
        "alpaca",
        {"instruction": ("instruction",), "input": ("input",), "answer": ("output",)},
        _recognises_flat,
        _convert_flat,
        frozenset({"input"}),
    ),
    Format(
        "prompt_completion",
        {"prompt": ("prompt",), "completion": ("completion",)},
        _recognises_flat,
        _convert_flat,
    ),
)


def _unknown_format(row: Row, columns: Mapping[str, str]) -> str:
    """Say which keys were found and which each format reads."""
    found = [key for key in row if _PLAIN_KEY.fullmatch(key)][:12]
    known = "; ".join(
        f"{entry.name}: {', '.join(keys[0] for name, keys in entry.keys.items() if name not in ALIASES)}"
        for entry in FORMATS
    )
    mapped = f" and data.columns for {', '.join(columns)}" if columns else ""
    return (
        f"no known format has the keys found here ({', '.join(found) or 'none'}){mapped}. Known: {known}. "
        "Name the columns in data.columns (our name: yours), as in {prompt: question, completion: answer}"
    )


def _bad_rows(path: Path, faults: Sequence[Fault]) -> DataError:
    shown = "".join(f"\n  - {fault}" for fault in faults[:FAULTS_SHOWN])
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    first = f", the first {FAULTS_SHOWN}" if len(faults) > FAULTS_SHOWN else ""
    return DataError(f"data.path '{path}': {count}{first}:{shown}")
