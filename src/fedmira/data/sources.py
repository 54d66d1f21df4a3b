"""Find what `data.path` is (a file, a folder, a folder saved by `datasets`, a data set on the hub), and its tables."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from fedmira.data import hub
from fedmira.data.rows import DOCUMENT_GIB, BadRow, Fault, Item, Place, read_document, read_lines, too_large
from fedmira.data.splits import COLUMN, file_names, file_words
from fedmira.data.tables import read_csv, read_parquet, read_saved, saved_splits
from fedmira.data.text_form import TextForm, check_form, find_delimiter, in_utf8
from fedmira.errors import DataError, nearest

KINDS = (  # the first kind that a folder has is read
    (".json", ".jsonl", ".json.gz", ".jsonl.gz"),
    (".parquet",),
    (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
)
EXTENSIONS = tuple(ending for kind in KINDS for ending in kind)

# A name with one of these endings is a file, even if the hub has a data set of that name.
_FILE_NAME = re.compile(
    r".*\.(jsonl?|ndjson|parquet|csv|tsv|txt|text|md|xml|html?|ya?ml|toml|py|ipynb|arrow|feather|orc|avro|xlsx?|ods|pdf"
    r"|docx?|sqlite3?|db|sql|pkl|pickle|pt|bin|np[yz]|h5|hdf5|safetensors|zip|tar|t?gz|bz2|xz|zst|7z|rar|lz4)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Table:
    """One file, or one split."""

    name: str  # for errors
    read: Callable[[], Iterator[Item]]
    columns: Mapping[str, str] = field(default_factory=dict)  # added to rows that have no such column


@dataclass(frozen=True)
class Source:
    """All tables of a path, in reading order."""

    tables: tuple[Table, ...]
    others: tuple[Table, ...] = ()  # files beside them that may be data, but of another kind
    splits: tuple[str, ...] = ()  # names of its own splits, where it has any: values of the column `split`


@contextmanager
def open_source(
    path: str | Path, *, subset: str | None, revision: str | None, form: TextForm | None = None
) -> Iterator[Source]:
    """Give the tables of a path; those of the hub are in a temporary folder until the end.

    form: how text files are written; None = in UTF-8, with the separators of their extensions.
    Raises DataError: the path does not exist, nothing in it can be read, or the hub refuses it.
    """
    local_path = Path(path)
    try:
        exists = local_path.exists()
    except OSError as error:
        raise _unreadable(local_path, error) from None
    if not exists and _may_be_on_hub(str(path)):
        _check_no_text(form, str(path))
        with hub.fetched(str(path), subset=subset, revision=revision) as folder:
            yield _saved_source(_saved_tables(folder, str(path)))
        return
    form = form or TextForm()
    for key, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise DataError(
                f"data.{key} '{value}': only a data set on the hub has one; data.path '{path}' is not on the hub"
            )
    if local_path.is_dir() and (tables := _saved_tables(local_path, local_path.resolve().name)):
        _check_no_text(form, str(path))
        yield _saved_source(tables)
    elif local_path.is_dir():
        yield _folder(local_path, form)
    else:
        yield Source((_file_table(_find_file(local_path), form),))


def _check_no_text(form: TextForm | None, path: str) -> None:
    """Raise DataError for settings about text files where a data set has none."""
    for key in ("encoding", "delimiter"):
        if form is not None and getattr(form, key) is not None:
            raise DataError(f"data.{key}: data.path '{path}' is not a text file and has none; remove it")


def _may_be_on_hub(path: str) -> bool:
    """Is this name, which is not a local path, one on the hub rather than a misspelt path?"""
    return hub.is_name(path) and not _FILE_NAME.fullmatch(path) and not Path(path).parent.exists()


def _find_file(path: Path) -> Path:
    """Return the path if it is a file that can be read. Raises DataError."""
    if not path.exists():
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "; '~' is not expanded, write the path in full" if str(path).startswith("~") else ""
        hint = hint or ("; a data set on the hub is named owner/name" if path.name == str(path) else "")
        raise DataError(
            f"data.path '{path}': no such file or folder{nearest(path.name, near)}{hint}; current folder: {Path.cwd()}"
        )
    if not path.is_file() or not _extension(path):
        raise DataError(
            f"data.path '{path}': reads {', '.join(EXTENSIONS)} files, a folder of them, a folder saved by `datasets`, "
            "or a data set on the hub (owner/name)"
        )
    return path


def _folder(path: Path, form: TextForm) -> Source:
    """Return a folder's files of one kind, ordered by name. Raises DataError if there are none, or two share a name.

    Files that are named as splits get a column `split`.
    """
    try:
        folders = sorted(file for file in path.iterdir() if file.is_dir() and not file.name.startswith("."))
        known = _files(path)
        below = [] if known else _files_below(folders)
    except OSError as error:
        raise _unreadable(path, error) from None
    known = known or below
    files = next((same for kind in KINDS if (same := [file for file in known if _extension(file) in kind])), [])
    if not files:
        unread = f"; its {len(folders)} folders are not read: name one of them" if folders else ""
        raise DataError(f"data.path '{path}': the folder holds no {', '.join(EXTENSIONS)} file{unread}")
    named_data = [folder.name for folder in folders] == ["data"]
    root = path / "data" if below and named_data else path
    names = {file: file.relative_to(root).as_posix() for file in known}
    stems = [names[file].removesuffix(_ending(file)) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(f"data.path '{path}': more than one file is named '{twice[0]}'; keep one of them")
    by_split = bool(below) and not named_data
    words = file_words([file.parent.name if by_split else _stem(file) for file in files])
    if by_split:  # a client's files have one name in all splits
        stems = [_stem(file) for file in files]
    stems = file_names(stems, words)
    return Source(
        tuple(
            _file_table(file, form, {"file": stem} if word is None else {"file": stem, COLUMN: word}, name=names[file])
            for file, stem, word in zip(files, stems, words, strict=True)
        ),
        tuple(_file_table(file, TextForm(), {"file": _stem(file)}) for file in known if file not in files),
        tuple(dict.fromkeys(word for word in words if word)),
    )


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, ordered by name."""
    inside = sorted(folder.iterdir(), key=lambda file: file.name)
    return [file for file in inside if file.is_file() and _extension(file) and not file.name.startswith(".")]


def _files_below(folders: Sequence[Path]) -> list[Path]:
    """Return the files of a folder's only sub-folder `data`, or of sub-folders that are all named as splits.

    The hub has data sets in the first form; in the second each sub-folder is a split and has a file. Else none.
    """
    inside = [_files(folder) for folder in folders]
    layout = [folder.name for folder in folders] == ["data"] or all(file_words([folder.name for folder in folders]))
    return [file for files in inside for file in files] if layout and all(inside) else []


def _saved_tables(folder: Path, name: str) -> tuple[Table, ...]:
    """Return the splits of a folder saved by `datasets`, () for another folder. Raises DataError if damaged."""

    def table(path: Path, name: str, columns: Mapping[str, str]) -> Table:
        return Table(name, lambda: read_saved(path, Place(name, path.name, 1, False, "row")), columns)

    try:
        splits = saved_splits(folder)
    except BadRow as bad:
        raise DataError(f"data.path '{name}': {bad}") from None
    if splits is None:
        return ()
    if not splits:
        return (table(folder, name, {}),)
    return tuple(table(folder / split, f"{name}/{split}", {COLUMN: split}) for split in splits)


def _saved_source(tables: tuple[Table, ...]) -> Source:
    return Source(tables, splits=tuple(table.columns[COLUMN] for table in tables if COLUMN in table.columns))


def _extension(path: Path) -> str:
    return next((ending for ending in EXTENSIONS if path.name.lower().endswith(ending)), "")


def _stem(path: Path) -> str:
    return path.name.removesuffix(_ending(path))


def _ending(path: Path) -> str:
    """Return a file's extension as it is written."""
    return path.name[-len(_extension(path)) :]


def _file_table(
    file: Path, form: TextForm, columns: Mapping[str, str] | None = None, *, name: str | None = None
) -> Table:
    return Table(name or file.name, lambda: read_file(file, form=form, name=name), columns or {})


def read_file(file: Path, *, form: TextForm | None = None, name: str | None = None) -> Iterator[Item]:
    """Yield each row of a file with its place, or a Fault.

    form: how text is written, None = in UTF-8; name: for errors, None = the file's.
    Raises DataError if the file cannot be opened, or is not of this form.
    """
    form = form or TextForm()
    ending = _extension(file)
    check_form(file, ending.removesuffix(".gz"), form)
    start = Place(name or file.name, _stem(file), 1, False)
    try:
        if ending == ".json" and file.stat().st_size > DOCUMENT_GIB << 30:
            yield too_large(start)
            return
        with gzip.open(file, "rb") if ending.endswith(".gz") else file.open("rb") as handle:
            stream, kind = cast(BinaryIO, handle), ending.removesuffix(".gz")
            if kind == ".parquet":
                yield from read_parquet(stream, start)
                return
            with in_utf8(stream, file, form=form, table=kind in (".csv", ".tsv")) as text:
                yield from _read_text(text, kind, start, file=file, form=form)
    except UnicodeDecodeError as error:
        yield Fault(start.file, f"is not in {error.encoding}; check data.encoding", stops=True)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield Fault(start.file, "damaged, or not a gzip file; copy it again, or drop the '.gz'", stops=True)
    except OSError as error:
        raise _unreadable(file, error) from None


def _read_text(stream: BinaryIO, ending: str, start: Place, *, file: Path, form: TextForm) -> Iterator[Item]:
    if ending in (".csv", ".tsv"):
        usual = "\t" if ending == ".tsv" else ","
        return read_csv(stream, start, delimiter=find_delimiter(file, usual=usual, form=form))
    return read_lines(stream, start) if ending == ".jsonl" else read_document(stream, start)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"data: cannot read '{path}': {error.strerror or error}")
