"""Linear combinations of rows, read once from memory and mixed in the cache.

A product [S, S] @ [S, P] with S of 8 to 64 and P in millions is bound by memory more than by arithmetic. The columns
are cut into strips that fit a core's cache, and as many threads as torch is set to take turns. Strips depend on the
shapes alone, so the number of threads does not change the bits.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from fedmira.errors import ShapeError

_ONE_CORE = 2**19  # multiplications up to which OpenBLAS stays on one core: it must not start threads inside ours
_NARROWEST = 64  # columns; where one core's share is narrower, arithmetic dominates and BLAS threads do it better
_CACHED = 2**18  # gathered numbers at a time: 1 MB in float32
_TURN = 2**15  # columns that a thread takes at a time; strips are powers of two, so they start where pages start


def mix_rows(
    within: np.ndarray,
    rows: Tensor,
    *,
    outside: np.ndarray | None = None,
    stored: Tensor | None = None,
    neighbours: np.ndarray | None = None,
) -> Tensor:
    """out = within @ rows + outside @ stored[neighbours], in the dtype of `rows`.

    within [S, S]; rows [S, P]; outside [S, N], mostly zeros; stored [K, P] is read at `neighbours` [N] only, strip by
    strip, so that it may be memory-mapped. Every argument stays as it is; the result lies in new memory.
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
    own = rows.numpy()
    out = np.empty((count, columns), dtype=own.dtype)  # numpy asks for large pages: fewer faults at the first touch
    weights = within.astype(own.dtype)
    pull = sparse.csr_array(outside.astype(own.dtype)) if gathered and outside is not None else None
    held = own if stored is None else stored.numpy()
    share = _ONE_CORE // max(count, 1) ** 2
    wide = share < _NARROWEST
    width = _TURN if wide else _power(share)
    gather = max(_power(_CACHED // max(gathered, 1)), _NARROWEST)

    def turn(first: int) -> None:
        last = min(first + _TURN, columns)
        for start in range(first, last, width):
            stop = min(start + width, last)
            np.matmul(weights, own[:, start:stop], out=out[:, start:stop])
        if pull is not None:
            for start in range(first, last, gather):
                stop = min(start + gather, last)
                out[:, start:stop] += pull @ held[neighbours, start:stop]

    turns = range(0, columns, _TURN)
    workers = 1 if wide else min(torch.get_num_threads(), len(turns))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(turn, turns))
    else:
        for first in turns:
            turn(first)
    return torch.from_numpy(out)


def _power(limit: int) -> int:
    """The largest power of two not above `limit` (at least 1) and not above a turn."""
    return min(1 << (max(limit, 1).bit_length() - 1), _TURN)
