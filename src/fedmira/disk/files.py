"""Durable and private files: written whole or not at all, appended to in whole lines, readable by their owner only.

What a run writes may hold examples, rows of clients and adapters that give texts away: files get mode 0600, folders
0700, and a umask can take more away. No name is predictable while a file is written, and no link is followed.
"""

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmira.errors import StoreError

REMEDY = "what was saved before is intact. Free disk space or choose another output_dir, then 'fedmira resume'"
FOLDER_MODE = 0o700
FILE_MODE = 0o600
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# Of a file or folder that is being written. Version 0.1.0 wrote no random letters.
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(?:\.[a-z0-9_]{8})?\.tmp", re.DOTALL)


def write_atomic(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename, fsync the folder.

    shared: readable by whoever the umask allows, and not by its owner only. A link at `path` is replaced, not followed.
    Raises StoreError naming the path and the bytes needed if the disk is full or read-only.
    """
    write_pieces(path, [data], len(data), shared=shared)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int, *, shared: bool = False) -> None:
    """Write a file atomically, a piece at a time. Raises as write_atomic does."""
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
                del piece  # else it would be in memory while the next one is made
            if shared:
                temporary.chmod(0o666 & ~_umask())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write '{path}' ({size_bytes} bytes): {error.strerror}; {REMEDY}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def temporary_of(name: str) -> str | None:
    """Return the name that a temporary file or folder was to get; None if `name` is not that of a temporary one."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None


def remove_temporaries(folder: Path) -> None:
    """Remove the files that a crash left half-written in `folder`; nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        if temporary_of(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for their owner only. One that exists keeps its mode."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file to a new one, which its owner may read and write as far as that of the source.

    Raises OSError if `target` exists, StoreError if `source` is a link or not a file.
    """
    try:
        handle = os.open(source, os.O_RDONLY | NO_LINK)
    except OSError as error:
        if source.is_symlink():
            raise StoreError(f"{describe_link(source)}: only files are copied; replace it by a copy") from None
        raise StoreError(f"cannot read '{source}': {error.strerror}") from None
    with os.fdopen(handle, "rb") as original:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise StoreError(f"'{source}' is not a file: only files are copied")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
        with os.fdopen(os.open(target, flags, facts.st_mode & FILE_MODE), "wb") as copy:
            shutil.copyfileobj(original, copy)


def describe_link(path: Path) -> str:
    """Say where a link leads."""
    return f"'{path}' is a link to '{os.readlink(path)}'"


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    if os.name == "nt":  # there a folder cannot be opened, and the system writes its table by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder. Raises StoreError if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        runs = sorted(str(run.parent) for run in path.parent.glob("*/seed-*/run.json"))
        hint = f", but a study; its runs are {', '.join(runs[:6])}{', ...' if len(runs) > 6 else ''}" if runs else ""
        raise StoreError(f"'{path}' is missing: '{path.parent}' is not a FedMira run folder{hint}") from None
    except OSError as error:
        raise StoreError(f"'{path}' cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StoreError(f"'{path}' is damaged: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append whole lines and make them durable. Raises StoreError naming the path and the bytes needed."""
    data = "".join(line + "\n" for line in lines).encode()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, FILE_MODE)
        with os.fdopen(handle, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot append to '{path}' ({len(data)} bytes): {error.strerror}; {REMEDY}") from error
