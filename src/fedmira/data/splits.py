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
_PIECE = re.compile(r"([^\W\d_]+?)(?:[ _-]?(?:set|split|data))?(?![^\W\d_])", re.IGNORECASE)
_SHARD = re.compile(r"[ _.-]?\d+-of-\d+$")
_BETWEEN = " _.-"  # what stands between the words of a file's name


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


def file_names(stems: Sequence[str], words: Sequence[str | None]) -> list[str]:
    """Return the value of each file for the column `file`: oslo_train and oslo_test are `oslo`, others as they are.

    words: the word that says which split each file is, None if it is none. Files are one data set if their names differ
    in that word only, two splits and among them train are there, and no file has the rest as its whole name.
    """
    rests = [
        stem if word is None else without_split(stem, WORDS[word]) for stem, word in zip(stems, words, strict=True)
    ]
    splits: dict[str, set[str]] = {}
    for rest, word in zip(rests, words, strict=True):
        splits.setdefault(rest, set()).add("" if word is None else WORDS[word])
    return [
        rest if rest and len(splits[rest]) > 1 and "train" in splits[rest] and "" not in splits[rest] else stem
        for stem, rest in zip(stems, rests, strict=True)
    ]


def without_split(stem: str, split: str | None = None) -> str:
    """Return a file's name without the word for its split, and without the number of a shard after it.

    It is empty where the name has nothing else: `train-00000-of-00001`. split: take out a word for this one only.
    """
    named = {WORDS[word] for letters in _LETTERS.findall(stem.lower()) if (word := _word(letters))}
    if len(named) != 1 or split not in (None, *named):
        return stem
    piece = next((piece for piece in _PIECE.finditer(stem) if piece[1].lower() in WORDS), None)
    if piece is None:
        return stem
    before, after = stem[: piece.start()], _SHARD.sub("", stem[piece.end() :])
    left, right = before.rstrip(_BETWEEN), after.lstrip(_BETWEEN)
    between = before[len(left) :] or after[: len(after) - len(right)]
    return f"{left}{between}{right}" if left and right else left or right


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
