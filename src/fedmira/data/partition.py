"""Form clients from records: one per value of a column, each value's records dealt at random to several, or as given
by a partitioner (partitioners.py).

Every draw comes from a stream of its own, default_rng([seed, client_key(name), purpose]): what one client gets depends
on its own name and records only, never on which other clients exist or in what order they stand.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmira.data.formats import Record
from fedmira.errors import DataError, nearest

SPLITS = ("train", "validation", "test")
ID_LENGTH = 64
MOST_VALUES = 1000  # of a column that is counted; one of more is taken for text

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{ID_LENGTH - 1}}}")
_RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)  # no folder may be called so on Windows
_DEAL, _SUBSAMPLE, _SPLIT = range(3)  # purposes of a stream


@dataclass(frozen=True)
class Client:
    """One client and its records; every record is in exactly one of the three splits."""

    id: str  # matches [A-Za-z0-9][A-Za-z0-9_-]{0,63}, unique whatever the case; safe as a folder name
    name: str  # the value in the data, with "-0", "-1", ... where several clients share one
    group: str | None  # None = the data names none
    columns: Mapping[str, str]  # columns with one value in all its records; never its examples' texts
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # column -> value -> training records with it


def client_key(text: str) -> int:
    """Return 64 bits that stand for a client in every random stream.

    key = the first 8 bytes of sha256(text in UTF-8), big-endian; the same on every machine, unlike hash().
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def form_clients(
    records: Sequence[Record],
    *,
    by: str = "task",
    per_group: int = 1,
    parts: Sequence[np.ndarray] | None = None,
    first: int | None = None,
    groups: str | None = None,
    subsample: float = 1.0,
    validation: float = 0.1,
    test: float = 0.1,
    split_column: str | None = None,
    seed: int = 0,
) -> list[Client]:
    """Form clients in the order in which the values of column `by` first appear, or of `parts`.

    parts: for each client the indices of its records, in the place of `by` and `per_group`; the clients are called
    client-0, client-1, ..., and have no group unless `groups` names one. first: keep the first n values or parts.
    per_group > 1: each value's records are dealt at random, in numbers as equal as possible, to clients named
    value-0, value-1, ... subsample: the fraction of each client's records kept, at least one (of each split, where
    a column gives the splits). Of n records round(test * n) and round(validation * n) are held out, never the last
    one to train on; or `split_column` says train, validation or test for each record. groups: the column that names
    a client's group; None = its value of `by`.
    Raises DataError: an unknown column, a record without a value, a group or split that is not clear, fractions that
    leave nothing to train on, or a client without a record to train on.
    """
    _check_numbers(per_group, first, subsample=subsample, validation=validation, test=test, seed=seed)
    if not records:
        raise DataError("no records: there is nothing to form clients from")
    known = known_columns(records)
    columns = (("clients.by", None if parts is not None else by), ("clients.groups", groups))
    for key, column in (*columns, ("split_column", split_column)):
        if column is not None:
            _check_column(key, column, known)
    texts = _text_columns(records, known)
    counted = [name for name in known if name not in texts and _is_counted(records, name)]
    named = _by_parts(records, parts, first) if parts is not None else _by_value(records, by, per_group, first, seed)
    ids = client_ids([name for name, _, _ in named])
    clients = []
    for name, value, own in named:
        splits = _split(name, own, subsample, validation=validation, test=test, column=split_column, seed=seed)
        if not splits["train"]:
            raise DataError(
                f"client '{shown_name(name)}': none of its {len(own)} records is one to train on (data.split_column "
                f"'{split_column}'); mark some as train, or leave it out"
            )
        group = value or None if groups is None else _group(name, own, groups)
        counts = {
            column: Counter(value for record in splits["train"] if (value := record.columns.get(column, "")).strip())
            for column in counted
        }
        clients.append(Client(ids[name], name, group, _constant_columns(own, texts), **splits, counts=counts))
    return clients


def client_ids(names: Sequence[str]) -> dict[str, str]:
    """Map distinct names to ids that are safe folder names and differ even where case does not count.

    A name that is such an id is kept; any other becomes a slug of it, "-" and 8 hex digits of its sha256, and so do all
    names whose ids would meet. Nothing in an id depends on the order of the names.
    """
    digits = dict.fromkeys(names, 0)
    while True:
        ids = {name: _client_id(name, digits[name]) for name in names}
        meeting: dict[str, list[str]] = {}
        for name, id in ids.items():
            meeting.setdefault(id.lower(), []).append(name)
        clashes = [name for same in meeting.values() if len(same) > 1 for name in same]
        if not clashes:
            return ids
        for name in clashes:
            digits[name] += 8


def _client_id(name: str, digits: int) -> str:
    """Return the name if it may be an id (0 digits), else a slug with that many digits of its hash, 8 or more."""
    if digits == 0 and _ID.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    suffix = hashlib.sha256(name.encode()).hexdigest()[: max(digits, 8)]
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", name).lstrip("-_")[: max(ID_LENGTH - 1 - len(suffix), 0)]
    return f"{slug}-{suffix}" if slug else suffix


def _check_numbers(per_group: int, first: int | None, *, subsample: float, **others: float) -> None:
    """Raise DataError for numbers that no partition can have."""
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
        faults.append(f"split: validation {validation} + test {test}: neither below 0, together below 1")
    if faults:
        raise DataError("data: " + "; ".join(faults))


def known_columns(records: Sequence[Record]) -> list[str]:
    """Return the columns that any record has, in the order of their first appearance."""
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
        hint = ". A client is every value of a column (file: one file per client); with no such column, let a "
        hint += "partitioner form them: data.clients.partitioner: {name: iid, num_partitions: 10}"
    found = (
        f"found: {', '.join(shown_name(name) for name in known[:20])}"
        if known
        else "the data has no columns beside text"
    )
    raise DataError(f"data.{key}: no column '{column}'{nearest(column, known)}; {found}{hint}")


# A client before its splits: its name, its value of `by` (empty: none), its records.
_Named = tuple[str, str, list[Record]]


def _by_value(records: Sequence[Record], by: str, per_group: int, first: int | None, seed: int) -> list[_Named]:
    """One client per value, or `per_group` of them. Raises DataError if one would have no record."""
    held: dict[str, list[Record]] = {}
    for record, value in zip(records, _values(records, by, "clients.by"), strict=True):
        held.setdefault(value, []).append(record)
    for value in list(held)[:first]:  # before anything is dealt: the number may be anything
        if (count := len(held[value])) < per_group:
            raise DataError(
                f"client '{shown_name(f'{value}-{count}')}': no record is left for it: '{shown_name(value)}' has "
                f"{count}; lower data.clients.per_group"
            )
    return [
        (name, value, own) for value in list(held)[:first] for name, own in _deal(value, held[value], per_group, seed)
    ]


def _by_parts(records: Sequence[Record], parts: Sequence[np.ndarray], first: int | None) -> list[_Named]:
    """One client per part. Raises DataError naming an empty one."""
    width = len(str(len(parts) - 1))
    named = [
        (f"client-{number:0{width}d}", "", [records[index] for index in part])
        for number, part in enumerate(parts[:first])
    ]
    for name, _, own in named:
        if not own:
            raise DataError(
                f"client '{name}': the partitioner leaves it no record of {len(records)} "
                "(data.clients.partitioner); ask for fewer partitions, or for larger ones"
            )
    return named


def _values(records: Sequence[Record], column: str, key: str) -> list[str]:
    """Return each record's value of a column. Raises DataError naming the records that have none."""
    values = [record.columns.get(column, "") for record in records]
    missing = [record.source for record, value in zip(records, values, strict=True) if not value.strip()]
    if missing:
        raise DataError(
            f"data.{key}: {len(missing)} of {len(records)} records have no '{column}': {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; fill it in, or take another column"
        )
    return values


def _group(name: str, records: Sequence[Record], column: str) -> str | None:
    """Return the one value of a column in all of a client's records, None if none has any. Raises DataError if more."""
    values = {record.columns.get(column, "").strip() for record in records}
    if len(values) > 1:
        found = f"{len(values)} values" if "" not in values else "a value of some records only"
        raise DataError(
            f"client '{shown_name(name)}': found {found} in '{column}' (data.clients.groups); "
            "a client is in one group: take a column that is constant within each client"
        )
    return values.pop() or None


def _text_columns(records: Sequence[Record], known: Sequence[str]) -> set[str]:
    """Return the columns that repeat the examples' own texts in every record.

    A client of one record would otherwise carry its example among its columns, and from there into run folders.
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
    """Has a column so few values that counting them says something about a client?"""
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
    """Throw a value's records at random over `count` clients; their numbers differ by at most one."""
    if count == 1:
        return [(value, list(records))]
    order = np.random.default_rng([seed, client_key(value), _DEAL]).permutation(len(records))
    parts = np.array_split(order, count)
    return [(f"{value}-{place}", [records[index] for index in sorted(part)]) for place, part in enumerate(parts)]


def _split(
    name: str,
    records: Sequence[Record],
    subsample: float,
    *,
    validation: float,
    test: float,
    column: str | None,
    seed: int,
) -> dict[str, tuple[Record, ...]]:
    """Return the client's train, validation and test records, each in file order."""
    key = client_key(name)
    thinning = np.random.default_rng([seed, key, _SUBSAMPLE])
    if column is not None:
        values = _values(records, column, "split_column")
        odd = [record.source for record, value in zip(records, values, strict=True) if value not in SPLITS]
        if odd:
            raise DataError(
                f"client '{shown_name(name)}': {len(odd)} records have a '{column}' other than {', '.join(SPLITS)} "
                f"(data.split_column): {', '.join(odd[:5])}; rename these values"
            )
        chosen = {split: [index for index, value in enumerate(values) if value == split] for split in SPLITS}
        return {split: tuple(records[index] for index in _thin(chosen[split], subsample, thinning)) for split in SPLITS}
    kept = _thin(range(len(records)), subsample, thinning)
    order = [kept[place] for place in np.random.default_rng([seed, key, _SPLIT]).permutation(len(kept))]
    # the test part is drawn first: changing the validation fraction leaves the test examples as they were
    tested = min(round(test * len(kept)), max(len(kept) - 1, 0))
    validated = min(round(validation * len(kept)), max(len(kept) - 1 - tested, 0))
    parts = {
        "test": order[:tested],
        "validation": order[tested : tested + validated],
        "train": order[tested + validated :],
    }
    return {split: tuple(records[index] for index in sorted(parts[split])) for split in SPLITS}


def _thin(indices: Sequence[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """Keep round(fraction * n) of n indices, at least one if there is one, in order."""
    keep = max(round(fraction * len(indices)), min(len(indices), 1))
    return sorted(indices[place] for place in generator.permutation(len(indices))[:keep])


def shown_name(name: str) -> str:
    """Return a name fit for one line of an error."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= 60 else f"{plain[:57]}..."
