"""Records, and how values are taken from rows: text is checked, and no error shows it."""

import datetime
import decimal
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from fedmira.data.rows import BadRow, Row, kind_of

Keys = Mapping[str, Sequence[str]]  # our name -> the data's possible keys for it; the first one present is used

ALIASES = ("task", "category")  # columns that any format may read from another key of the data
EXACT = 2**53  # a larger float may stand for several whole numbers
NEARLY = 0.85  # of difflib: `promt`, `completions` and `instuction` are nearly a key
LONGEST_KEY = 40  # letters of a key that an error shows
PLAIN_KEY = re.compile(r"[\w .:/-]{1,40}")  # any other key may be misplaced text: errors do not show it


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    text: str  # may be empty
    trained: bool = True  # of an assistant's turn: loss is taken on it
    more: Mapping[str, str] = field(default_factory=dict)  # further keys for the chat template, such as a reasoning


@dataclass(frozen=True)
class Record:
    """One example as read."""

    instruction: str
    input: str  # may be empty
    answers: tuple[str, ...]  # the first is trained on, all are used for scoring; at least one, none empty
    columns: Mapping[str, str]  # every scalar column of the row as text
    source: str  # "file:line", "file, row 7" or "file#instance id"; never example text
    turns: tuple[Turn, ...] = ()  # a conversation's turns before its last answer; then instruction and input are empty
    more: Mapping[str, str] = field(default_factory=dict)  # as Turn.more, of the turn that is the answer
    unread: tuple[str, ...] = ()  # keys with a value that is neither text of the example nor a column


def present(row: Row, keys: Sequence[str]) -> str | None:
    """Return the first of the keys that the row has."""
    return next((key for key in keys if key in row), None)


def required(row: Row, keys: Keys, name: str) -> str:
    """Return the row's key for one of our names. Raises BadRow if it has none."""
    key = present(row, keys[name])
    if key is None:
        wanted = {letters_of(spelling) for spelling in keys[name]}
        near = next((key for key in row if letters_of(key) in wanted), None)
        hint = "" if near is None else f", but {quoted(near)}: keys are read exactly as they are written; rename it"
        raise BadRow(f"no '{keys[name][0]}'{hint}")
    return key


@functools.lru_cache(maxsize=1024)  # rows of one source have the same few keys
def letters_of(key: str) -> str:
    """Return the letters and digits of a key, equal for `System Prompt`, `systemPrompt` and ` SYSTEM-PROMPT`."""
    return "".join(letter for letter in key.casefold() if letter.isalnum())


def misspelt(row: Row, wanted: Sequence[str]) -> dict[str, str]:
    """Return the row's keys that none of the wanted ones is, but that are nearly one: key -> wanted key."""
    letters = {letters_of(key): key for key in reversed(wanted)}
    found: dict[str, str] = {}
    for key in row:
        if key not in wanted and len(key) <= LONGEST_KEY:
            near = get_close_matches(letters_of(key), list(letters), n=1, cutoff=NEARLY)
            if near and letters[near[0]] not in row:
                found[key] = letters[near[0]]
    return found


def quoted(key: str) -> str:
    """Return a key as it can be written in a config, so that spaces and signs that are not seen are."""
    return json.dumps(key)


def take_text(row: Row, keys: Keys, name: str) -> str:
    """Return the text under one of our names, which may be empty. Raises BadRow."""
    key = required(row, keys, name)
    return check_text(row[key], key)


def take_answers(row: Row, keys: Keys, name: str, *, several: bool) -> tuple[str, ...]:
    """Return one text, or if `several` a list of them, none empty. Raises BadRow."""
    key = required(row, keys, name)
    value = row[key]
    texts = value if several and isinstance(value, list) else [value]
    if not texts:
        raise BadRow(f"{shown(key)} is an empty list")
    answers = tuple(check_text(text, key) for text in texts)
    if not all(text.strip() for text in answers):
        raise BadRow(f"{shown(key)} is empty")
    return answers


def take_columns(row: Row, keys: Keys) -> dict[str, str]:
    """Return the scalar columns, with `task` and `category` from the keys in `data.columns`. Raises BadRow."""
    columns = scalars(row)
    for name in ALIASES:
        if name in keys:
            key = required(row, keys, name)
            columns = {column: text for column, text in columns.items() if column != name or key == name}
            if key in columns:
                columns[name] = columns[key]
    return columns


def check_text(value: object, key: str) -> str:
    """Return the value if it is text valid in UTF-8. JSON escapes can encode NUL and lone surrogates."""
    if not isinstance(value, str):
        raise BadRow(f"{shown(key)} is {kind_of(value)}, not text")
    if "\0" in value:
        raise BadRow(f"{shown(key)} contains a NUL character")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadRow(f"{shown(key)} contains half a character (a lone surrogate)")
    return value


def scalars(row: Row) -> dict[str, str]:
    """Return the columns that hold one value, as text; null, and the NaN that tables write for it, is not a value."""
    columns: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, str):
            columns[key] = check_text(value, key)
        elif isinstance(value, bool | int):
            columns[key] = json.dumps(value)
        elif isinstance(value, float | decimal.Decimal) and not math.isnan(value):
            columns[key] = _number(value)
        elif isinstance(value, datetime.date | datetime.time):
            columns[key] = str(value)
    return columns


def _number(value: float | decimal.Decimal) -> str:
    """Write a number; a whole one without decimals, because a table stores 7 as 7.0 beside a missing value."""
    if math.isfinite(value) and (whole := int(value)) == value and abs(whole) < EXACT:
        return str(whole)
    return json.dumps(value) if isinstance(value, float) else str(value)


def shown(key: str) -> str:
    """Return a key as errors may show it."""
    return f"'{key}'" if PLAIN_KEY.fullmatch(key) else "a column"
