"""Linear combinations of rows, read once from memory and mixed in the cache.

A product [S, S] @ [S, P] with S of 8 to 64 and P in millions is bound by memory as much as by arithmetic. The columns
are cut into strips that fit a core's cache, and as many threads as torch is set to take turns. Among hundreds of rows
most weights are 0, and only the others are multiplied. Where numba is installed, large rows of few neighbours each are
mixed by a compiled loop (mixing_compiled.py). Strips depend on shapes and weights alone, so the number of threads does
not change the bits. The answer is written to memory of an earlier one that nobody uses any more, where there is such:
the system would have to zero new pages first, which costs more than the mixing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedmira.adapters import RowTable
from fedmira.adapters.lazy import Tensor, np, sparse, torch
from fedmira.adapters.mixing_compiled import ALIGN, TILE, addresses, find_loop
from fedmira.errors import ShapeError

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

_STRIP = 2**13  # columns of one product
_SPARSE = 0.1  # of weights that are not 0, up to which a sparse product is faster than one of all of them
_CACHED = 2**18  # gathered numbers at a time: 1 MB in float32
_TURN = 2**15  # columns that a thread takes at a time; strips are powers of two, so they start where pages start
_FEW = 64  # rows that one is mixed of, on average, up to which the compiled loop is faster
_WORTH = 2**26  # bytes of rows from which on it is worth a second to compile it
_LENT = 2**30  # bytes; larger answers are not kept for the next one


def mix_rows(
    within: np.ndarray,
    rows: Tensor,
    *,
    outside: np.ndarray | None = None,
    stored: Tensor | RowTable | None = None,
    neighbours: np.ndarray | None = None,
) -> Tensor:
    """out = within @ rows + outside @ stored[neighbours], in the dtype of `rows`.

    within [S, S]; rows [S, P]; outside [S, N], mostly zeros; stored [K, P] is read at `neighbours` [N] only, strip by
    strip, so that it may be memory-mapped. Every argument stays as it is; the result shares no memory with anything
    in use.
    Raises ShapeError if the shapes do not fit.
    """
    count, columns = rows.shape
    gathered = 0 if neighbours is None else len(neighbours)
    if within.shape != (count, count) or (gathered and (outside is None or outside.shape != (count, gathered))):
        found = within.shape if outside is None else (within.shape, outside.shape)
        raise ShapeError(
            f"mixing weights {found}: need [{count}, {count}] for {count} rows and [{count}, {gathered}] for "
            f"{gathered} stored neighbours"
        )
    places = np.asarray([] if neighbours is None else neighbours, dtype=np.int64)
    if gathered and stored is not None:
        known, width = stored.shape
        if width != columns or places.min() < 0 or places.max() >= known:
            raise ShapeError(
                f"mixing stored rows [{known}, {width}], neighbours {places.min()} to {places.max()}: need rows of "
                f"{columns} and neighbours from 0 to {known - 1}"
            )
    own = rows.numpy()
    out = _memory().lend(own.shape, own.dtype)
    weights = within.astype(own.dtype)
    pull = outside.astype(own.dtype) if gathered and outside is not None else np.empty((count, 0), own.dtype)
    held = own if stored is None else stored.numpy()  # an array, or the columns of a store
    plain = _plain(weights, own, pull, held, places, out)
    tiles = _tiles(weights, own, pull, held, places, out)

    def turn(first: int) -> None:
        last = min(first + _TURN, columns)
        if tiles is not None:
            tiles(first, last - last % TILE)
            first = last - last % TILE
        plain(first, last)

    turns = range(0, columns, _TURN)
    from concurrent.futures import ThreadPoolExecutor  # here, as threadpoolctl below: checking settings needs neither

    workers = max(1, min(torch.get_num_threads(), len(turns)))
    with _blas().limit(limits=1), ThreadPoolExecutor(workers) as pool:  # BLAS must not start threads inside ours
        list(pool.map(turn, turns))
    return torch.from_numpy(out)


Mix = Callable[[int, int], None]  # mixes the columns from the first to the second


def _plain(
    within: np.ndarray, own: np.ndarray, outside: np.ndarray, held: Any, places: np.ndarray, out: np.ndarray
) -> Mix:
    """out = within @ own + outside @ held[places] by BLAS, or by a sparse product."""
    count, gathered = outside.shape
    weights: np.ndarray | sparse.csr_array = within
    strip = _STRIP
    if np.count_nonzero(within) < _SPARSE * within.size:
        weights = sparse.csr_array(within)
        strip = _power(_CACHED // count)
    pull = sparse.csr_array(outside)
    gather = _power(_CACHED // max(gathered, 1))

    def turn(first: int, last: int) -> None:
        for start in range(first, last, strip):
            stop = min(start + strip, last)
            if isinstance(weights, np.ndarray):
                np.matmul(weights, own[:, start:stop], out=out[:, start:stop])
            else:
                out[:, start:stop] = weights @ own[:, start:stop]
        if gathered:
            for start in range(first, last, gather):
                stop = min(start + gather, last)
                out[:, start:stop] += pull @ held[places, start:stop]

    return turn


def _tiles(
    within: np.ndarray, own: np.ndarray, outside: np.ndarray, held: Any, places: np.ndarray, out: np.ndarray
) -> Mix | None:
    """The same by a compiled loop, for whole tiles of columns; None where that cannot be, or is not worth it."""
    few = np.count_nonzero(within) + np.count_nonzero(outside) <= _FEW * len(within)
    if not few or own.nbytes < _WORTH or out.strides[0] % ALIGN:
        return None
    rows = [addresses(own, np.arange(len(own)))]
    if len(places):
        rows.append(_stored_addresses(held, places))
    found = [some for some in rows if some is not None]
    loop = find_loop() if len(found) == len(rows) else None
    if loop is None:
        return None
    begins = np.concatenate(found)
    every = sparse.csr_array(np.concatenate([within, outside], axis=1))
    starts, sources, weights = every.indptr.astype(np.int64), begins[every.indices], every.data
    return lambda first, last: loop(starts, sources, weights, out.ctypes.data, out.strides[0], first, last)


def _stored_addresses(held: Any, ids: np.ndarray) -> np.ndarray | None:
    """Return where the stored rows `ids` [n] begin in memory: in an array, or in a table of rows written and not."""
    if isinstance(held, np.ndarray):
        return addresses(held, ids)
    if not hasattr(held, "kinds"):
        return None
    begun, written = addresses(held.start, held.kinds[ids]), addresses(held.table, ids)
    return None if begun is None or written is None else np.where(held.written[ids], written, begun)


class _Memory:
    """One stretch of memory for one answer at a time; it is free again when the array lent from it is gone."""

    def __init__(self) -> None:
        self.kept = np.empty(0, dtype=np.uint8)
        self.lent: weakref.ref[Any] | None = None

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array with any content, in new memory while the last one is still in use."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size > _LENT:
            return _aligned(size).view(dtype).reshape(shape)
        held = self.lent is not None and self.lent() is not None
        if held or size > len(self.kept):
            self.kept = _aligned(size)
        array = self.kept[:size].view(dtype).reshape(shape)
        self.lent = weakref.ref(array)
        return array


def _aligned(size: int) -> np.ndarray:
    """Return `size` bytes, aligned as a tile has to be."""
    memory = np.empty(size + ALIGN, dtype=np.uint8)  # numpy asks for large pages
    start = -memory.ctypes.data % ALIGN
    return memory[start : start + size]


@functools.cache
def _memory() -> _Memory:
    """The one that all results share."""
    return _Memory()


def forget() -> None:
    """Give the memory that is kept for the next answer back: for who waits long between two."""
    _memory.cache_clear()


@functools.cache
def _blas() -> ThreadpoolController:
    """Look once at which libraries are loaded: it reads every one's name."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _power(limit: int) -> int:
    """The largest power of two not above `limit` (at least 1) and not above a turn."""
    return min(1 << (max(limit, 1).bit_length() - 1), _TURN)
