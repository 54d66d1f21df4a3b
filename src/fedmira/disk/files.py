"""Durable files: written whole or not at all, appended to in whole lines."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmira.errors import StoreError

REMEDY = "what was saved before is intact. Free disk space or choose another output_dir, then 'fedmira resume'"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename, fsync the folder.

    Raises StoreError naming the path and the bytes needed if the disk is full or read-only.
    """
    write_pieces(path, [data], len(data))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int) -> None:
    """Write a file atomically, a piece at a time. Raises as write_atomic does."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(f"cannot write '{path}' ({size_bytes} bytes): {error.strerror}; {REMEDY}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
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
    except ValueError as error:
        raise StoreError(f"'{path}' is damaged: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append whole lines and make them durable. Raises StoreError naming the path and the bytes needed."""
    data = "".join(line + "\n" for line in lines).encode()
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot append to '{path}' ({len(data)} bytes): {error.strerror}; {REMEDY}") from error
