"""Rows of all clients, and durable files: checkpoints as a chain of what changed, and the way back from a damaged one.

Rows take room once they differ from the common start: in RAM while all of them together would be small, else in a
memory-mapped file, so that ten thousand clients need as much memory as a hundred.

A checkpoint is a folder `round-000012` with safetensors files and, written last, manifest.json with their sha256. A
folder without a manifest never counts. "full" holds the whole state; "delta" holds what one round changed, so the cost
of a checkpoint follows the change and not the number of clients. A full one is written once the deltas since the last
would outweigh it. Going back means: the newest full one that is intact, then its deltas up to the first damaged one.
"""

import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedmira.compiled import addresses
from fedmira.errors import ShapeError, StoreError

log = logging.getLogger(__name__)

SCHEMA = 1
REMEDY = "what was saved before is intact. Make room or choose another output_dir, then 'fedmira resume'"
RAM_BYTES = 1 << 30  # rows of all clients that are more than this together are memory-mapped
BLOCK_BYTES = 4 << 20  # of rows, on their way into a file
# safetensors' names: https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Rows:
    """One row per client, [K, ...], of which only those that were written take room; read by client, as a tensor is.

    rows[ids] copies the rows of `ids` [n] in that order, rows[ids] = values replaces them; a row that was never written
    reads as its start. Nothing reads all rows at once: every other operation of a tensor is refused.
    """

    def __init__(self, start: Tensor, kinds: Tensor, folder: Path | None = None) -> None:
        """Begin with row k = start[kinds[k]]. start [R, ...]; kinds [K] int64.

        folder: where a file for the rows may be made if they could come to more than RAM_BYTES; None keeps them in RAM.
        The file has no name: it is gone when the process is, however that ends. Raises OSError if it cannot be made.
        """
        self.start, self.kinds = start, kinds
        self.shape = torch.Size((len(kinds), *start.shape[1:]))
        self.ndim, self.dtype = len(self.shape), start.dtype
        self.row_bytes = math.prod(start.shape[1:]) * start.element_size()
        self.written = torch.zeros(len(kinds), dtype=torch.bool)
        size = len(kinds) * self.row_bytes
        self._file = None
        if folder is None or size <= RAM_BYTES:
            self._table = torch.empty(self.shape, dtype=self.dtype)  # pages that nobody writes take no memory
        else:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long-lived as the rows
            self._file.truncate(size)  # a hole: rows that nobody writes take no disk
            whole = mmap.mmap(self._file.fileno(), size)
            self._table = torch.frombuffer(whole, dtype=self.dtype).view(self.shape)

    @property
    def mapped(self) -> bool:
        """Do the rows lie in a file?"""
        return self._file is not None

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, ids: Tensor) -> Tensor:
        _check_ids(ids)
        known = self.written[ids]
        if bool(known.all()):
            return self._table[ids]
        rows = self.start[self.kinds[ids]]
        rows[known] = self._table[ids[known]]
        return rows

    def __setitem__(self, ids: Tensor, values: Tensor) -> None:
        _check_ids(ids)
        if self._file is None:
            self._table[ids] = values
        else:  # not through the map: there a full disk is a signal that kills, here it is an OSError
            for k, row in zip(ids.tolist(), values.to(self.dtype), strict=True):
                _write_at(self._file.fileno(), _bytes_of(row), k * self.row_bytes)
        self.written[ids] = True

    def numpy(self) -> "Columns":
        """Read the rows as numpy does, by client and columns: numpy()[ids, start:stop]."""
        return Columns(self.start.numpy(), self.kinds.numpy(), self.written.numpy(), self._table.numpy())

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"rows of all clients have no '{name}': {ASK}")


ASK = "there may be too many to be read at once; take rows[ids], ids [n] a tensor of client positions"


def _check_ids(ids: object) -> None:
    """Raise ShapeError unless clients are asked for one by one."""
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(f"rows of all clients, asked for by {found}: {ASK}")


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows [K, P], read by several threads at once; arrays that the rows own."""

    start: np.ndarray
    kinds: np.ndarray
    written: np.ndarray
    table: np.ndarray

    def __getitem__(self, at: tuple[np.ndarray, slice]) -> np.ndarray:
        """Copy the columns `at[1]` of the rows `at[0]` [n], in that order."""
        ids, columns = at
        known = self.written[ids]
        if known.all():
            return self.table[ids, columns]
        part = self.start[self.kinds[ids], columns]
        part[known] = self.table[ids[known], columns]
        return part

    def addresses(self, ids: np.ndarray) -> np.ndarray | None:
        """Return where the rows `ids` [n] begin in memory, None where that cannot be said (compiled.addresses)."""
        begun, written = addresses(self.start, self.kinds[ids]), addresses(self.table, ids)
        return None if begun is None or written is None else np.where(self.written[ids], written, begun)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def _bytes_of(tensor: Tensor) -> memoryview:
    """View a tensor's bytes, in row-major order."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Picked:
    """Rows `ids` [n] of a source [K, ...], to be copied a block at a time on their way into a file."""

    source: Tensor | Rows
    ids: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.ids), *self.source.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows in order, about BLOCK_BYTES at a time."""
        count = max(1, BLOCK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for begin in range(0, len(self.ids), count):
            yield self.source[self.ids[begin : begin + count]]


Tensors = Mapping[str, Tensor | Picked]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One intact checkpoint. files: file name (without ending) -> its tensors."""

    round: int
    full: bool
    files: Mapping[str, Mapping[str, Tensor]]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename, fsync the folder.

    Raises StoreError naming the path and the bytes needed if the disk is full or read-only.
    """
    _write_pieces(path, [data], len(data))


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int) -> None:
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


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write a safetensors file without a copy of it in memory; return its entry in the manifest: sha256, bytes."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # every tensor is aligned
    described: dict[str, Any] = {}
    end = 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        described[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + end
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little") + header
        for name in names:
            value = tensors[name]
            for block in value.blocks() if isinstance(value, Picked) else [value]:
                yield _bytes_of(block)

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces():
            digest.update(piece)
            yield piece

    _write_pieces(path, hashed(), size)
    return {"sha256": digest.hexdigest(), "bytes": size}


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, round_number: int, files: Mapping[str, Tensors], *, full: bool) -> int:
    """Write one checkpoint under `folder`, manifest last; return its size in bytes.

    A left-over folder of the same round (a crash before its manifest, or a damaged one) is replaced.
    """
    place = folder / f"round-{round_number:06d}"
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    listed = {name: _write_tensors(place / f"{name}.safetensors", tensors) for name, tensors in files.items()}
    manifest = {"schema": SCHEMA, "round": round_number, "full": full, "files": listed}
    manifest["sha256"] = _manifest_hash(manifest)
    write_atomic(place / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(folder)
    return sum(int(entry["bytes"]) for entry in listed.values())


def load_chain(folder: Path) -> list[Checkpoint]:
    """Return the chain to the newest round that can be rebuilt: a full checkpoint, then deltas in order; [] if none.

    A damaged checkpoint is reported by a warning and everything after it is left out, so that the round before it is
    used. Raises StoreError if there are checkpoints but no intact full one.
    """
    numbers = checkpoint_rounds(folder)
    loaded: dict[int, Checkpoint | None] = {}

    def get(number: int) -> Checkpoint | None:
        if number not in loaded:
            loaded[number] = _load(folder / f"round-{number:06d}")
        return loaded[number]

    best: list[Checkpoint] = []
    for start in reversed(range(len(numbers))):
        first = get(numbers[start])
        if first is None or not first.full:
            continue
        chain = [first]
        for number in numbers[start + 1 :]:
            following = get(number)
            if following is None or following.round != chain[-1].round + 1:
                break
            chain.append(following)
        if not best or chain[-1].round > best[-1].round:
            best = chain
        if best[-1].round == numbers[-1] or all(get(number) for number in numbers[start:]):
            break
    if numbers and not best:
        raise StoreError(f"no intact checkpoint in '{folder}': {len(numbers)} found, all damaged; start the run anew")
    if best and best[-1].round < numbers[-1]:
        log.warning("going back to round %d: a later checkpoint in '%s' is damaged", best[-1].round, folder)
    return best


def checkpoint_rounds(folder: Path) -> list[int]:
    """List the rounds that have a manifest, ascending."""
    names = [path.parent.name.removeprefix("round-") for path in folder.glob("round-*/manifest.json")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def prune(folder: Path, keep_from: int, keep_to: int | None = None) -> None:
    """Remove checkpoints before round `keep_from` and, if given, after round `keep_to`.

    Newest first and each one's manifest first, so that a crash leaves none half-readable and no gap below another.
    """
    for number in reversed(checkpoint_rounds(folder)):
        if number < keep_from or (keep_to is not None and number > keep_to):
            place = folder / f"round-{number:06d}"
            (place / "manifest.json").unlink()
            shutil.rmtree(place)


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over everything in a manifest but its own hash: a flipped bit in a round's number must not pass."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _load(place: Path) -> Checkpoint | None:
    """Read and verify one checkpoint; None, with a warning, if anything about it is wrong."""
    try:
        manifest = json.loads((place / "manifest.json").read_bytes())
        if manifest["sha256"] != _manifest_hash(manifest) or place.name != f"round-{manifest['round']:06d}":
            raise StoreError("manifest.json does not match its sha256")
        if manifest["schema"] != SCHEMA:
            raise StoreError(f"schema {manifest['schema']}, this version reads {SCHEMA}")
        files = {}
        for name, entry in manifest["files"].items():
            path = place / f"{name}.safetensors"
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise StoreError(f"{path.name} does not match its sha256")
            files[name] = load_file(path)
        return Checkpoint(int(manifest["round"]), bool(manifest["full"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, StoreError) as error:
        log.warning("checkpoint '%s' is damaged (%s): it is not used", place, error)
        return None


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder. Raises StoreError if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        runs = sorted(str(run.parent) for run in path.parent.glob("*/seed-*/run.json"))
        hint = f", but a study; its runs are {', '.join(runs[:6])}{', ...' if len(runs) > 6 else ''}" if runs else ""
        raise StoreError(f"'{path}' is missing: '{path.parent}' is no FedMira run folder{hint}") from None
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
