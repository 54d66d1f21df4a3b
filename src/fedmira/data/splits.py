"""A data set's own splits: how people and programs spell train, validation and test, in columns and in file names."""

import re
from collections.abc import Iterable, Mapping, Sequence

from fedmira.data.records import Record

SPLITS = ("train", "validation", "test")
COLUMN = "split"  # what a folder adds whose files are named as splits, and a data set saved by `datasets`
WORDS: Mapping[str, str] = {  # as `datasets` reads the names of files; in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MOST_SPLITS = 50  # values of a column with splits
EVALUATION = frozenset({"eval", "evaluation"})  # a second name of the test, or, beside a test, of the validation

_LETTERS = re.compile(r"[^\W\d_]+")
_WHOLE = re.compile(r"(\w+?)(?:[ _-]?(?:set|split|data))?")


def split_word(text: str) -> str | None:
    """Return the word that names a split in a value or a name: `dev` of `Dev_2`, `train` of `train-00000-of-00001`.

    It is the first word, and no other word may name another split; None if there is none.
    """
    words = [_word(letters) for letters in _LETTERS.findall(text.lower())]
    named = {WORDS[word] for word in words if word}
    return words[0] if len(named) == 1 and words[0] else None


def _word(letters: str) -> str | None:
    """Return a word of WORDS, also out of `trainset` or `testdata`."""
    match = _WHOLE.fullmatch(letters)
    return match[1] if match and match[1] in WORDS else None


def file_words(stems: Sequence[str]) -> list[str | None]:
    """Return for each file of a folder the word in its name that says which split it is.

    It may be anywhere (`gsm8k-train-v2`) if all files have such a word; where some have none, it must be the first or
    the last. None for all files unless they name two splits at least: a single `test.jsonl` may be anything.
    """
    found: list[str | None] = []
    inside: list[str | None] = []
    for stem in stems:
        words = [_word(letters) for letters in _LETTERS.findall(stem.lower())]
        words = words[:-1] if words[1:] and re.search(r"\d-of-\d+$", stem) else words  # -00000-of-00001
        known = [word for word in words if word]
        one = known[0] if len({WORDS[word] for word in known}) == 1 else None
        inside.append(one)
        found.append(one if one and (words[0] or words[-1]) else None)
    chosen = inside if all(inside) else found
    distinct = {WORDS[word] for word in chosen if word}
    return chosen if len(distinct) > 1 else [None] * len(stems)


def read_splits(values: Iterable[str]) -> dict[str, str]:
    """Return which split each value of a column names; a value that names none is left out.

    `eval` is the test, but beside a test it is left out too: it may be the validation.
    """
    words = {value: word for value in dict.fromkeys(values) if (word := split_word(value)) is not None}
    tested = any(WORDS[word] == "test" and word not in EVALUATION for word in words.values())
    return {value: WORDS[word] for value, word in words.items() if not (tested and word in EVALUATION)}


def find_splits(records: Sequence[Record], *, tables: Sequence[str] = ()) -> tuple[str, list[str]] | None:
    """Return the column that holds the data's own splits, and its values, sorted; None if there is none.

    tables: the splits that the source itself has. A column `split` counts if two values or more name one at least;
    any other, such as `set` or `partition`, if all of its values do, train is one of them, and each is a single word.
    """
    if len(tables) > 1:
        return COLUMN, sorted(tables)
    names = dict.fromkeys(name for record in records for name in record.columns)
    for name in sorted(names, key=lambda name: name.strip().lower() != COLUMN):
        loose = name.strip().lower() == COLUMN
        values = _few_values(records, name, loose=loose)
        splits = {WORDS[word] for value in values if (word := split_word(value))}
        if (loose and len(values) > 1 and splits) or (len(splits) > 1 and "train" in splits):
            return name, sorted(values)
    return None


def _few_values(records: Sequence[Record], column: str, *, loose: bool) -> set[str]:
    """Return the values of a column; none as soon as one is not a split, unless `loose`."""
    values: set[str] = set()
    for record in records:
        value = record.columns.get(column, "")
        if value in values or (loose and not value.strip()):
            continue
        if not loose and _word(value.strip().lower()) is None:
            return set()
        values.add(value)
        if len(values) > MOST_SPLITS:
            return set()
    return values
