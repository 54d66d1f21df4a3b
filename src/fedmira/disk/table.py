"""Rows of all clients, in RAM if all of them together are small, else in a memory-mapped file.

Only rows that differ from the common start take memory, so that ten thousand clients need no more than a hundred.
"""

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from fedmira.errors import ShapeError

RAM_BYTES = 1 << 30  # above this size the rows of all clients are memory-mapped
BLOCK_BYTES = 4 << 20  # of rows, written to a file at once


class Table:
    """One row per client, [K, ...], of which only those that were written take room.

    table[ids] copies the rows of `ids` [n] in that order, write(ids, values) replaces them; a row that was never
    written reads as its start. Nothing reads all rows at once: every other operation of a tensor is refused.
    """

    def __init__(
        self, start: Tensor, kinds: Tensor, folder: Path | None = None, *, ram_bytes: int | None = None
    ) -> None:
        """Start with row k = start[kinds[k]]. start [R, ...]; kinds [K] int64.

        folder: where files for the rows are created if all rows exceed ram_bytes (None: RAM_BYTES); None = always in
        RAM. The files have no names: they disappear with the process, even after a crash. Raises OSError if they cannot
        be created.
        """
        self.start, self.kinds = start, kinds
        self.shape = torch.Size((len(kinds), *start.shape[1:]))
        self.ndim, self.dtype = len(self.shape), start.dtype
        self.row_bytes = math.prod(start.shape[1:]) * start.element_size()
        self.written = torch.zeros(len(kinds), dtype=torch.bool)
        size = len(kinds) * self.row_bytes
        self._file = None
        if folder is None or size <= (RAM_BYTES if ram_bytes is None else ram_bytes):
            self._table = torch.empty(self.shape, dtype=self.dtype)  # unwritten pages take no memory
        else:
            self.start = stacked([start], folder)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the rows exist
            weakref.finalize(self, self._file.close)
            self._file.truncate(size)  # sparse: unwritten rows take no disk space
            mapping = mmap.mmap(self._file.fileno(), size)
            self._table = torch.frombuffer(mapping, dtype=self.dtype).view(self.shape)

    @property
    def mapped(self) -> bool:
        """Whether the rows are in a file."""
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

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Replace the rows `ids` [n]. Raises OSError if the file cannot take them."""
        _check_ids(ids)
        if self._file is None:
            self._table[ids] = values
        else:  # not through the map: there a full disk kills the process (SIGBUS), here it is an OSError
            for k, row in zip(ids.tolist(), values.to(self.dtype), strict=True):
                _write_at(self._file.fileno(), bytes_of(row), k * self.row_bytes)
        self.written[ids] = True

    def mean(self) -> Tensor:
        """Return the mean of all rows [1, ...], added up in float64 a block at a time."""
        return mean_of(self)

    def numpy(self) -> "TableArrays":
        """Read the rows as numpy does, by client and columns: numpy()[ids, start:stop]."""
        return TableArrays(self.start.numpy(), self.kinds.numpy(), self.written.numpy(), self._table.numpy())

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"rows of all clients have no '{name}': {ASK}")


ASK = "there may be too many to be read at once; take rows[ids], ids [n] a tensor of client positions"


def _check_ids(ids: object) -> None:
    """Raise ShapeError unless `ids` is an integer tensor [n]."""
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        index = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(f"rows of all clients, indexed by {index}: {ASK}")


@dataclass(frozen=True, eq=False)
class TableArrays:
    """Rows [K, P], read by several threads at once; arrays that the table owns."""

    start: np.ndarray
    kinds: np.ndarray
    written: np.ndarray
    table: np.ndarray

    def __getitem__(self, at: tuple[np.ndarray, slice]) -> np.ndarray:
        """Copy the columns `at[1]` of the rows `at[0]` [n], in this order."""
        ids, columns = at
        known = self.written[ids]
        if known.all():
            return self.table[ids, columns]
        part = self.start[self.kinds[ids], columns]
        part[known] = self.table[ids[known], columns]
        return part


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def bytes_of(tensor: Tensor) -> memoryview:
    """View a tensor's bytes, in row-major order."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def in_file(pieces: Iterable[bytes | memoryview], folder: Path) -> mmap.mmap:
    """Return bytes, at least one, in a file of `folder` without a name: pages that the system can take back.

    Raises OSError if the file cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        return mmap.mmap(file.fileno(), 0)


def stacked(values: Sequence[Tensor], folder: Path) -> Tensor:
    """Return torch.cat(values), each [n, ...] of one dtype, in a file of `folder` where it is larger than a block."""
    if sum(value.nbytes for value in values) <= BLOCK_BYTES:
        return torch.cat(list(values))
    data = in_file(map(bytes_of, values), folder)
    return torch.frombuffer(data, dtype=values[0].dtype).view(-1, *values[0].shape[1:])


class RowSource(Protocol):
    """Rows [K, ...] that are read by client."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, ids: Tensor) -> Tensor: ...


def mean_of(source: Tensor | RowSource) -> Tensor:
    """Return the mean of all rows [1, ...] of a source, added up in float64 a block at a time."""
    everyone = torch.arange(source.shape[0])
    total = sum(block.double().sum(dim=0, keepdim=True) for block in Picked(source, everyone).blocks())
    return (torch.as_tensor(total) / len(everyone)).to(source.dtype)


@dataclass(frozen=True, eq=False)
class Overlay:
    """Rows of a source [K, ...] as they will be once the rows `ids` [n] are replaced by `values` [n, ...]."""

    source: Tensor | RowSource
    ids: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Tensor) -> Tensor:
        place = {int(k): n for n, k in enumerate(self.ids)}
        changed = [(n, place[int(k)]) for n, k in enumerate(ids) if int(k) in place]
        if len(changed) == len(ids):  # a copy of each row less
            return self.values[torch.tensor([source for _, source in changed], dtype=torch.int64)].to(self.dtype)
        rows = self.source[ids]
        if changed:
            targets, sources = torch.tensor(changed).T
            rows = rows.clone() if isinstance(self.source, Tensor) else rows
            rows[targets] = self.values[sources].to(rows.dtype)
        return rows

    def mean(self) -> Tensor:
        """Return the mean of all rows [1, ...], added up in float64 a block at a time."""
        return mean_of(self)

    def numpy(self) -> "_OverlayArrays":
        """Read the rows as numpy does, by client and columns: numpy()[ids, start:stop]."""
        return _OverlayArrays(self)


@dataclass(frozen=True, eq=False)
class _OverlayArrays:
    """An overlay, read as numpy reads rows."""

    overlay: Overlay

    def __getitem__(self, at: tuple[np.ndarray, slice]) -> np.ndarray:
        ids, columns = at
        return self.overlay[torch.from_numpy(ids)].numpy()[:, columns]


@dataclass(frozen=True, eq=False)
class Picked:
    """Rows `ids` [n] of a source [K, ...], to be written to a file a block at a time."""

    source: Tensor | RowSource
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
