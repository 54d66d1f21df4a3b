"""Read examples from JSON and JSONL files in the formats that federated fine-tuning data comes in.

A format is one entry of `FORMATS`: the keys it reads, how its rows are recognised, how one row becomes records. Reading
is strict: every bad row is found, none is dropped in silence, and no error ever shows the text of an example.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmira.data.rows import BadRow, Fault, Place, Row, as_row, find_files, kind_of, read_rows
from fedmira.errors import DataError, nearest

Keys = Mapping[str, Sequence[str]]  # our name -> the data's keys that may hold it, the first one present counts

ALIASES = ("task", "category")  # columns that any format may take from another key of the data
FAULTS_SHOWN = 5

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
class Format:
    """How one kind of row is known and read.

    recognises: does this row have the keys? convert: the records of one row, and a Fault for each that cannot be read.
    """

    name: str
    keys: Keys
    recognises: Callable[[Row, Keys], bool]
    convert: Callable[[Row, Keys, Place], Iterable[Record | Fault]]
    optional: frozenset[str] = frozenset()


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
    files = find_files(path)
    is_folder = path.is_dir()
    keys: Keys | None = None  # settled by the first row
    records: list[Record] = []
    faults: list[Fault] = []
    for file in files:
        seen = len(records) + len(faults)
        for item in read_rows(file):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            place, row = item
            if is_folder:
                row = {"file": place.stem, **row}
            try:
                chosen = chosen or _recognise(row, columns)
                keys = keys or _settle_keys(chosen, row, columns)
            except BadRow as bad:  # nothing below can be read without knowing how
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


def _keys_of(entry: Format, columns: Mapping[str, str]) -> Keys:
    """Return the keys of a format with the user's names in place of the usual ones."""
    return {**entry.keys, **{name: (key,) for name, key in columns.items()}}


def _recognise(row: Row, columns: Mapping[str, str]) -> Format:
    """Return the first format of the table that knows the row. Raises BadRow if none does."""
    for entry in FORMATS:
        if set(columns) <= {*entry.keys, *ALIASES} and entry.recognises(row, _keys_of(entry, columns)):
            return entry
    raise BadRow(_unknown_format(row, columns))


def _settle_keys(entry: Format, row: Row, columns: Mapping[str, str]) -> Keys:
    """Decide by the first row whether an optional text exists: then every row must have it, else none may.

    Raises BadRow if `columns` takes `task` or `category` from a key that is not there.
    """
    for name in ALIASES:
        if name in columns and columns[name] not in row:
            near = nearest(columns[name], [key for key in row if _PLAIN_KEY.fullmatch(key)])
            raise BadRow(f"no '{columns[name]}'{near}, which data.columns.{name} names")
    keys = _keys_of(entry, columns)
    absent = {name for name in entry.optional if name not in columns and _present(row, keys[name]) is None}
    return {name: own for name, own in keys.items() if name not in absent}


def _convert(entry: Format, row: Row, keys: Keys, place: Place) -> Iterator[Record | Fault]:
    try:
        yield from entry.convert(row, keys, place)
    except BadRow as bad:
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
        raise BadRow(f"'{unread}' would not be read; the first row has no input, or name it: {{input: {unread}}}")
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
        raise BadRow(f"'{_present(row, keys['instances'])}' is {kind_of(instances)}, not a list with an instance")
    columns = _task_columns(row, keys, place)
    for index, instance in enumerate(instances):
        try:
            example = as_row(instance)
            text = _text(example, keys, "input")
            answers = _answers(example, keys, "answer", several=True)
        except BadRow as bad:
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
            raise BadRow("no 'task': only a .json file that is one task may leave its name to the file's name")
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
        raise BadRow(f"no '{keys[name][0]}'")
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
        raise BadRow(f"'{key}' is an empty list")
    answers = tuple(_check_text(text, key) for text in texts)
    if not all(text.strip() for text in answers):
        raise BadRow(f"'{key}' is empty")
    return answers


def _check_text(value: object, key: str) -> str:
    """Return the value if it is text that UTF-8 can hold. JSON escapes can smuggle in NUL and half characters."""
    shown = f"'{key}'" if _PLAIN_KEY.fullmatch(key) else "a column"
    if not isinstance(value, str):
        raise BadRow(f"{shown} is {kind_of(value)}, not text")
    if "\0" in value:
        raise BadRow(f"{shown} contains a NUL character")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadRow(f"{shown} contains half a character (a lone surrogate)")
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
