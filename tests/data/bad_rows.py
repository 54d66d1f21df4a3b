"""Rows, files of them, and thirty ways in which a row can be bad, shared by the tests of the readers."""

import gzip
import json
from pathlib import Path

import pytest

from fedmira.data.formats import Reading, Record, read_records
from fedmira.errors import DataError

PAIR = {"prompt": "1 + 1 =", "completion": "2"}
GOOD = json.dumps(PAIR).encode()
SECRET = "Zq7secretZq7"

# kind -> a line, and what is said about it; wherever a row may hold a text, that is the secret
BAD_LINES = {
    "not JSON at all": (b"hello", "not JSON: expecting value at column 1"),
    "cut short": (b'{"prompt": "Zq7secretZq7', "not JSON: unterminated string starting at column 12"),
    "two rows on one line": (GOOD + GOOD, "not JSON: more text after the first value"),
    "single quotes": (b"{'prompt': 'Zq7secretZq7', 'completion': 'b'}", "not JSON: expecting property name"),
    "a trailing comma": (b'{"prompt": "Zq7secretZq7", "completion": "b",}', "not JSON"),
    "a raw tab in a text": (b'{"prompt": "Zq7secretZq7\tb", "completion": "b"}', "not JSON: invalid control character"),
    "a bad escape": (rb'{"prompt": "Zq7secretZq7\q", "completion": "b"}', "not JSON: invalid \\escape"),
    "a list": (b'["Zq7secretZq7", "b"]', "found a list where a row"),
    "null": (b"null", "found null where a row"),
    "a text": (b'"Zq7secretZq7"', "found text where a row"),
    "no completion": (b'{"prompt": "Zq7secretZq7"}', "no 'completion'"),
    "no prompt": (b'{"completion": "Zq7secretZq7"}', "no 'prompt'"),
    "a null completion": (b'{"prompt": "Zq7secretZq7", "completion": null}', "'completion' is null, not text"),
    "a number": (b'{"prompt": "Zq7secretZq7", "completion": 5}', "'completion' is a number, not text"),
    "a truth value": (b'{"prompt": true, "completion": "Zq7secretZq7"}', "'prompt' is a truth value, not text"),
    "an object": (
        b'{"prompt": "Zq7secretZq7", "completion": {"x": "Zq7secretZq7"}}',
        "'completion' is an object, not text",
    ),
    "a list as prompt": (b'{"prompt": ["Zq7secretZq7"], "completion": "b"}', "'prompt' is a list, not text"),
    "an empty completion": (b'{"prompt": "Zq7secretZq7", "completion": ""}', "'completion' is empty"),
    "no answer in the list": (b'{"prompt": "Zq7secretZq7", "completion": []}', "'completion' is an empty list"),
    "one empty answer": (b'{"prompt": "a", "completion": ["Zq7secretZq7", ""]}', "'completion' is empty"),
    "a number among the answers": (
        b'{"prompt": "a", "completion": ["Zq7secretZq7", 1]}',
        "'completion' is a number, not text",
    ),
    "Latin-1": (b'{"prompt": "Zq7secretZq7 caf\xe9", "completion": "b"}', "is not UTF-8"),
    "a NUL byte": (b'{"prompt": "Zq7secretZq7\0b", "completion": "b"}', "of the file is NUL"),
    "an escaped NUL": (
        rb'{"prompt": "Zq7secretZq7\u0000", "completion": "b"}',
        "'prompt' contains a NUL character",
    ),
    "half a character": (rb'{"prompt": "Zq7secretZq7\ud83d", "completion": "b"}', "'prompt' contains half a character"),
    "a NUL in another column": (
        rb'{"prompt": "a", "completion": "b", "x": "Zq7secretZq7\u0000"}',
        "'x' contains a NUL",
    ),
    "a key twice": (b'{"prompt": "Zq7secretZq7", "prompt": "b", "completion": "c"}', "a key is given twice"),
    "NaN": (b'{"prompt": "Zq7secretZq7", "completion": "b", "x": NaN}', "NaN is not a JSON number"),
    "a bomb of brackets": (b"[" * 100_000, "JSON nested too deeply"),
    "a number of 5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "a number with too many digits"),
}


def write(path: Path, *rows: object) -> Path:
    """Write rows as the extension asks: one per line, or a list; compressed if it ends in .gz."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(list(rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def records(path: Path, **options: object) -> list[Record]:
    return read_records(path, **options).records  # type: ignore[arg-type]


def skipping(path: Path, **options: object) -> Reading:
    return read_records(path, on_bad_row="skip", **options)  # type: ignore[arg-type]


def fault(path: str | Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)  # type: ignore[arg-type]
    return str(caught.value)
