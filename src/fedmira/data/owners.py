"""Columns that may say whose an example is: few distinct short values, the same ones again and again."""

from collections.abc import Sequence
from typing import NamedTuple

from fedmira.data.partition import known_columns
from fedmira.data.records import Record
from fedmira.data.splits import find_splits, without_split

FIRST = ("client", "site", "user")  # names that need no further sign, the best first
LAST = ("task", "file")
NAMED = frozenset(  # words in a column's name that say that it is an owner
    (
        *("hospital", "clinic", "ward", "department", "centre", "center", "practice", "patient", "doctor", "lab"),
        *("customer", "company", "organisation", "organization", "org", "firm", "bank", "branch", "store", "shop"),
        *("school", "university", "institution", "institute", "teacher", "student", "author", "writer", "poet"),
        *("speaker", "annotator", "worker", "person", "owner", "tenant", "account", "device", "sensor", "station"),
        *("country", "region", "city", "state", "location", "source", "domain", "provider", "team", "group"),
        *FIRST,
    )
)
OTHERS = frozenset(  # words of names that describe an example, not its owner
    (
        *("label", "labels", "class", "score", "rating", "stars", "grade", "level", "difficulty", "split", "fold"),
        *("year", "month", "date", "time", "type", "kind", "correct", "answer", "answers", "index", "id", "version"),
        *("count", "length", "number", "language", "lang", "license", "licence", "model", "quality", "flag"),
    )
)
MOST_VALUES = 1000
LONGEST = 60  # letters of a value
LEAST_ROWS = 2  # of each value, in the mean


class Owner(NamedTuple):
    """A column that may name the clients, and how many values it has."""

    column: str
    values: int


class Owners(NamedTuple):
    """chosen: the column that names the clients, None if none or several fit; fitting: all that fit, best first.

    partial: columns with the name of an owner that would fit, if every example had a value.
    """

    chosen: str | None
    fitting: list[Owner]
    partial: Sequence[Owner] = ()


def find_owners(records: Sequence[Record]) -> Owners:
    """Find the column that names the clients.

    A column `client`, `site` or `user` does. Then one column with the name of an owner and few values, `task`, `file`
    if the files are not the splits of one data set, or a single column with few values. Several are a question, not an
    answer.
    """
    known = known_columns(records)
    spelled = {name.lower(): name for name in reversed(known)}
    own_splits = find_splits(records)
    used = {own_splits[0]} if own_splits else set()
    if not _names_several(records):
        used.add("file")
    likely = [name for name in known if name not in used and (is_named(name) or not _words(name) & OTHERS)]
    fitting = [Owner(name, count) for name in likely if (count := _count(records, name))]
    fitting.sort(key=lambda owner: not is_named(owner.column))
    for name in FIRST:  # but `user` may be the one who asks, and its values the prompts
        if name in spelled and not all(_is_text(record, spelled[name]) for record in records):
            return Owners(spelled[name], fitting)
    named = [owner for owner in fitting if is_named(owner.column)]
    if named:
        return Owners(named[0].column if len(named) == 1 else None, fitting)
    for name in LAST:
        if name in spelled and spelled[name] not in used:
            return Owners(spelled[name], fitting)
    if fitting:
        return Owners(fitting[0].column if len(fitting) == 1 else None, fitting)
    counts = {name: _count(records, name, partial=True) for name in likely if is_named(name)}
    return Owners(None, fitting, [Owner(name, count) for name, count in counts.items() if count])


def is_named(column: str) -> bool:
    """Does a column's name say that it is an owner, as `hospital` or `customer_id`?"""
    return bool(_words(column) & NAMED)


def _names_several(records: Sequence[Record]) -> bool:
    """Do the files of a folder have several names, if the word for a split and the number of a shard are left out?

    The files of one data set, `train-00000-of-00002` or `gsm8k_test`, are no clients.
    """
    stems = {record.columns.get("file", "") for record in records}
    return len({without_split(stem) for stem in stems}) > 1


def _words(column: str) -> set[str]:
    return set("".join(letter.lower() if letter.isalnum() else " " for letter in column).split())


def _count(records: Sequence[Record], column: str, *, partial: bool = False) -> int:
    """Return the number of a column's values, 0 if it cannot name clients.

    It can if every record has a short value (partial: half of them or more), there are two values at least and on
    average LEAST_ROWS records of each, and it does not repeat a text of the example.
    """
    if partial:
        having = [record for record in records if record.columns.get(column, "").strip()]
        return _count(having, column) if 2 * len(having) >= len(records) else 0
    values: set[str] = set()
    most = min(MOST_VALUES, len(records) // LEAST_ROWS)
    for record in records:
        value = record.columns.get(column, "").strip()
        if value in values:
            continue
        values.add(value)
        if not value or len(value) > LONGEST or "\n" in value or len(values) > most:
            return 0
    if len(values) < 2 or values <= {"true", "false"} or all(_is_text(record, column) for record in records):
        return 0
    return len(values)


def _is_text(record: Record, column: str) -> bool:
    value = record.columns.get(column, "").strip()
    return value in (record.instruction.strip(), record.input.strip(), record.answers[0].strip())
