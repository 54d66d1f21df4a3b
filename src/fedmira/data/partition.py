"""Form clients from records: one or several per value of a column, or one per part of a partitioner (partitioners.py).

Every draw has a separate stream, default_rng([seed, client_key(name), purpose]): what a client gets depends on its own
name and records only, never on the other clients or their order.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmira.data.formats import Record
from fedmira.data.splits import SPLITS, WORDS, read_splits, split_word
from fedmira.errors import DataError, nearest
from fedmira.names import shown_name

ID_LENGTH = 64
MOST_VALUES = 1000  # of a column that is counted; one with more is treated as text

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{ID_LENGTH - 1}}}")
_RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)  # not allowed as a folder name on Windows
_DEAL, _SUBSAMPLE, _SPLIT = range(3)  # what a stream is used for


@dataclass(frozen=True)
class Client:
    """One client and its records; every record is in exactly one of the three splits."""

    id: str  # matches [A-Za-z0-9][A-Za-z0-9_-]{0,63}, unique even if case is ignored; safe as a folder name
    name: str  # the value in the data, with "-0", "-1", ... where several clients share one
    group: str | None  # None = not named in the data
    columns: Mapping[str, str]  # columns with one value in all its records; never texts of its examples
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # column -> value -> training records with it


def client_key(text: str) -> int:
    """Return 64 bits that identify a client in every random stream.

    key = the first 8 bytes of sha256(text in UTF-8), big-endian; the same on every machine, unlike hash().
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def form_clients(
    records: Sequence[Record],
    *,
    by: str = "task",
    per_group: int = 1,
    parts: Sequence[np.ndarray] | None = None,
    whole: str | None = None,
    first: int | None = None,
    groups: str | None = None,
    subsample: float = 1.0,
    validation: float = 0.1,
    test: float = 0.1,
    split_column: str | None = None,
    seed: int = 0,
) -> list[Client]:
    """Form clients in the order in which the values of column `by` first appear, or of `parts`.

    parts: for each client the indices of its records, instead of `by` and `per_group`; the clients are called
    client-0, client-1, ..., and have no group unless `groups` names one. whole: the name of the only client, which has
    all records, instead of `by`, `per_group`, `parts` and `first`. first: keep the first n values or parts.
    per_group > 1: each value's records are dealt at random, as evenly as possible, to clients named
    value-0, value-1, ... subsample: the fraction of each client's records kept, at least one (of each split, where
    a column gives the splits). Of n records round(test * n) and round(validation * n) are held out, but never all
    of them; or `split_column` says train, validation or test for each record. groups: the column that names
    a client's group; None = its value of `by`.
    Raises DataError: an unknown column, a record without a value, an ambiguous group or split, fractions that
    leave nothing to train on, or a client without a record to train on.
    """
    _check_numbers(per_group, first, subsample=subsample, validation=validation, test=test, seed=seed)
    if not records:
        raise DataError("no records: there is nothing to form clients from")
    known = known_columns(records)
    columns = (("clients.by", None if parts is not None or whole is not None else by), ("clients.groups", groups))
    for key, column in (*columns, ("split_column", split_column)):
        if column is not None:
            _check_column(key, column, known)
    texts = _text_columns(records, known)
    counted = [name for name in known if name not in texts and _is_counted(records, name)]
    if whole is not None:
        named: list[_Named] = [(whole, "", list(records))]
    elif parts is not None:
        named = _by_parts(records, parts, first)
    else:
        named = _by_value(records, by, per_group, first, seed)
    ids = client_ids([name for name, _, _ in named])
    split_of = {} if split_column is None else _read_splits(records, split_column)
    clients = []
    for name, value, own_records in named:
        splits = _split(
            name,
            own_records,
            subsample,
            validation=validation,
            test=test,
            column=split_column,
            split_of=split_of,
            seed=seed,
        )
        if not splits["train"]:
            raise DataError(
                f"client '{shown_name(name)}': none of its {len(own_records)} records is for training "
                f"(data.split_column '{split_column}'); mark some as train, or leave it out"
            )
        group = value or None if groups is None else _group(name, own_records, groups)
        counts = {
            column: Counter(value for record in splits["train"] if (value := record.columns.get(column, "")).strip())
            for column in counted
        }
        clients.append(Client(ids[name], name, group, _constant_columns(own_records, texts), **splits, counts=counts))
    return clients


def client_ids(names: Sequence[str]) -> dict[str, str]:
    """Map distinct names to ids that are safe folder names and differ even if case is ignored.

    A name that is a valid id is kept; any other becomes its slug, "-" and 8 hex digits of its sha256, and so do all
    names whose ids would collide. An id does not depend on the order of the names.
    """
    digits = dict.fromkeys(names, 0)
    while True:
        ids = {name: _client_id(name, digits[name]) for name in names}
        by_lower_case: dict[str, list[str]] = {}
        for name, id in ids.items():
            by_lower_case.setdefault(id.lower(), []).append(name)
        clashes = [name for same in by_lower_case.values() if len(same) > 1 for name in same]
        if not clashes:
            return ids
        for name in clashes:
            digits[name] += 8


def _client_id(name: str, digits: int) -> str:
    """Return the name if it is a valid id (0 digits), else a slug with `digits` digits of its hash, 8 or more."""
    if digits == 0 and _ID.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    suffix = hashlib.sha256(name.encode()).hexdigest()[: max(digits, 8)]
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", name).lstrip("-_")[: max(ID_LENGTH - 1 - len(suffix), 0)]
    return f"{slug}-{suffix}" if slug else suffix


def _check_numbers(per_group: int, first: int | None, *, subsample: float, **others: float) -> None:
    """Raise DataError for numbers out of range."""
    faults = [
        f"{name} = {value}: must be at least {least}"
        for name, value, least in (("clients.per_group", per_group, 1), ("clients.first", first, 1))
        if value is not None and value < least
    ]
    if not 0 < subsample <= 1:
        faults.append(f"subsample = {subsample}: must be above 0 and at most 1")
    if others["seed"] < 0:
        faults.append(f"seed = {others['seed']}: must be at least 0")
    validation, test = others["validation"], others["test"]
    if min(validation, test) < 0 or not validation + test < 1:
        faults.append(f"split: validation {validation} + test {test}: each at least 0, together below 1")
    if faults:
        raise DataError("data: " + "; ".join(faults))


def known_columns(records: Sequence[Record]) -> list[str]:
    """Return the columns that any record has, in order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record.columns))


def column_values(records: Sequence[Record], column: str, key: str) -> list[str]:
    """Return each record's value of a column. Raises DataError if there is no such column, or a record has no value."""
    _check_column(key, column, known_columns(records))
    return _values(records, column, key)


def _check_column(key: str, column: str, known: Sequence[str]) -> None:
    if column in known:
        return
    hint = ""
    if key == "clients.by":
        hint = ". Every value of a column is a client (file: one file per client); with no such column, let a "
        hint += "partitioner form them: data.clients.partitioner: {name: iid, num_partitions: 10}"
    shown_columns = (
        f"found: {', '.join(shown_name(name) for name in known[:20])}"
        if known
        else "the data has no columns besides text"
    )
    raise DataError(f"data.{key}: no column '{column}'{nearest(column, known)}; {shown_columns}{hint}")


# A client before its splits: its name, its value of `by` (empty: none), its records.
_Named = tuple[str, str, list[Record]]


def _by_value(records: Sequence[Record], by: str, per_group: int, first: int | None, seed: int) -> list[_Named]:
    """Form one client per value, or `per_group` clients. Raises DataError if one would have no record."""
    by_column: dict[str, list[Record]] = {}
    for record, value in zip(records, _values(records, by, "clients.by"), strict=True):
        by_column.setdefault(value, []).append(record)
    for value in list(by_column)[:first]:  # before anything is dealt: per_group may be very large
        if (count := len(by_column[value])) < per_group:
            raise DataError(
                f"client '{shown_name(f'{value}-{count}')}': no record is left for it: '{shown_name(value)}' has "
                f"{count}; lower data.clients.per_group"
            )
    return [
        (name, value, dealt)
        for value in list(by_column)[:first]
        for name, dealt in _deal(value, by_column[value], per_group, seed)
    ]


def _by_parts(records: Sequence[Record], parts: Sequence[np.ndarray], first: int | None) -> list[_Named]:
    """Form one client per part. Raises DataError naming an empty one."""
    width = len(str(len(parts) - 1))
    named = [
        (f"client-{number:0{width}d}", "", [records[index] for index in part])
        for number, part in enumerate(parts[:first])
    ]
    for name, _, own_records in named:
        if not own_records:
            raise DataError(
                f"client '{name}': the partitioner gives it none of {len(records)} records "
                "(data.clients.partitioner); use fewer or larger partitions"
            )
    return named


def _values(records: Sequence[Record], column: str, key: str) -> list[str]:
    """Return each record's value of a column. Raises DataError naming the records that have none."""
    values = [record.columns.get(column, "") for record in records]
    missing = [record.source for record, value in zip(records, values, strict=True) if not value.strip()]
    if missing:
        raise DataError(
            f"data.{key}: {len(missing)} of {len(records)} records have no '{column}': {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; fill it in, or use another column"
        )
    return values


def _group(name: str, records: Sequence[Record], column: str) -> str | None:
    """Return the one value of a column in all of a client's records, None if none has any. Raises DataError if more."""
    values = {record.columns.get(column, "").strip() for record in records}
    if len(values) > 1:
        count = f"{len(values)} values" if "" not in values else "a value in some records only"
        raise DataError(
            f"client '{shown_name(name)}': found {count} in '{column}' (data.clients.groups); "
            "a client is in one group: use a column that is constant within each client"
        )
    return values.pop() or None


def _text_columns(records: Sequence[Record], known: Sequence[str]) -> set[str]:
    """Return the columns that repeat a text of the example in every record.

    A client with one record would otherwise have its example among its columns, and so in run folders.
    """
    texts: tuple[Callable[[Record], str], ...] = (
        lambda record: record.instruction,
        lambda record: record.input,
        lambda record: record.answers[0],
    )
    return {
        name
        for name in known
        if any(all(record.columns.get(name) == text(record) for record in records) for text in texts)
    }


def _is_counted(records: Sequence[Record], column: str) -> bool:
    """Does a column have at most MOST_VALUES values, so that counts of them describe a client?"""
    values: set[str] = set()
    for record in records:
        values.add(record.columns.get(column, ""))
        if len(values) > MOST_VALUES:
            return False
    return True


def _constant_columns(records: Sequence[Record], texts: set[str]) -> dict[str, str]:
    """Return the columns that all records have with the same, non-empty value."""
    common = {name: value for name, value in records[0].columns.items() if value.strip() and name not in texts}
    return {
        name: value for name, value in common.items() if all(record.columns.get(name) == value for record in records)
    }


def _deal(value: str, records: Sequence[Record], count: int, seed: int) -> list[tuple[str, list[Record]]]:
    """Deal a value's records at random to `count` clients; their numbers differ by at most one."""
    if count == 1:
        return [(value, list(records))]
    order = np.random.default_rng([seed, client_key(value), _DEAL]).permutation(len(records))
    parts = np.array_split(order, count)
    return [(f"{value}-{number}", [records[index] for index in sorted(part)]) for number, part in enumerate(parts)]


def _split(
    name: str,
    records: Sequence[Record],
    subsample: float,
    *,
    validation: float,
    test: float,
    column: str | None,
    split_of: Mapping[str, str],
    seed: int,
) -> dict[str, tuple[Record, ...]]:
    """Return the client's train, validation and test records, each in file order.

    split_of: the split that each value of `column` names.
    """
    key = client_key(name)
    thinning = np.random.default_rng([seed, key, _SUBSAMPLE])
    if column is not None:
        values = _values(records, column, "split_column")
        odd = [record.source for record, value in zip(records, values, strict=True) if value not in split_of]
        if odd:
            raise DataError(
                f"client '{shown_name(name)}': {len(odd)} records have a '{column}' other than {', '.join(SPLITS)} "
                f"(data.split_column; known too: {', '.join(word for word in WORDS if word not in SPLITS)}): "
                f"{', '.join(odd[:5])}; rename these values"
            )
        chosen = {split: [index for index, value in enumerate(values) if split_of[value] == split] for split in SPLITS}
        return {split: tuple(records[index] for index in _thin(chosen[split], subsample, thinning)) for split in SPLITS}
    thinned = _thin(range(len(records)), subsample, thinning)
    order = [thinned[index] for index in np.random.default_rng([seed, key, _SPLIT]).permutation(len(thinned))]
    count = len(thinned)
    # the test part is drawn first: changing the validation fraction does not change the test examples
    tested = min(round(test * count), max(count - 1, 0))
    validated = min(round(validation * count), max(count - 1 - tested, 0))
    parts = {
        "test": order[:tested],
        "validation": order[tested : tested + validated],
        "train": order[tested + validated :],
    }
    return {split: tuple(records[index] for index in sorted(parts[split])) for split in SPLITS}


def _read_splits(records: Sequence[Record], column: str) -> dict[str, str]:
    """Return the split that each value of a column names. Raises DataError if one may be validation or test."""
    values = dict.fromkeys(value for record in records if (value := record.columns.get(column, "")).strip())
    split_of = read_splits(values)
    if unclear := [value for value in values if value not in split_of and split_word(value)]:
        raise DataError(
            f"data.split_column '{column}': '{shown_name(unclear[0])}' beside a test may be the validation; rename it "
            "to validation, or to test"
        )
    return split_of


def _thin(indices: Sequence[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """Keep round(fraction * n) of n indices, at least one if there is one, in order."""
    keep = max(round(fraction * len(indices)), min(len(indices), 1))
    return sorted(indices[position] for position in generator.permutation(len(indices))[:keep])
