"""Rows mixed by a compiled loop, where numba is installed (`pip install "fedmira[fast]"`).

    out_i[c] = sum_n weight_in row_in[c]          over the rows n that row i is mixed of

BLAS multiplies all pairs of rows and first copies them into another order; a product of a few neighbours is bound
by memory. Here a tile of columns stays in registers while the neighbours are added up, and goes past the cache to
memory: what is written is not read before. Numba's own loops do neither, so a tile is written in LLVM's language.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from fedmira.adapters.lazy import np

LANE = 16  # float32 of a vector; on processors with shorter ones LLVM takes several
TILE = 8 * LANE  # columns
STRIP = 8 * TILE  # columns of one row after another: long enough for the processor to fetch ahead
ALIGN = 4 * LANE  # bytes: where tiles of the answer have to start

log = logging.getLogger(__name__)

Loop: TypeAlias = "Callable[[np.ndarray, np.ndarray, np.ndarray, int, int, int, int], None]"


def addresses(rows: np.ndarray, ids: np.ndarray) -> np.ndarray | None:
    """Return where the rows `ids` [n] begin in memory; None if they are not float32, one number after another."""
    if rows.dtype != np.float32 or rows.strides[1] != rows.itemsize:
        return None
    return rows.ctypes.data + ids.astype(np.int64) * rows.strides[0]


@functools.cache
def find_loop() -> Loop | None:
    """Return loop(starts, sources, weights, out, pitch, first, last), compiled; None without a numba that works.

    Row i of the answer, at address out + i pitch, is mixed of the rows at addresses sources[starts[i]:starts[i + 1]]
    with these weights, from column `first` to `last`, whole tiles of both. It reads and writes what it is pointed at:
    the caller holds the arrays. Other threads may run meanwhile.
    """
    try:
        return _compile()
    except ImportError as error:  # not installed, or not made for this numpy
        log.debug("merges are not compiled: %s", error)
    except Exception as error:  # one that is installed but broken must not end a round that BLAS can end
        log.warning("merges are not compiled: %s: %s", type(error).__name__, error)
    return None


def _compile() -> Loop:
    """Compile, and try it on one tile: numba may be told to compile nothing, or wrongly."""
    import numba

    tile = _make_tile()

    def loop(
        starts: np.ndarray, sources: np.ndarray, weights: np.ndarray, out: int, pitch: int, first: int, last: int
    ) -> None:
        for strip in range(first, last, STRIP):
            for row in range(len(starts) - 1):
                begin, end = starts[row], starts[row + 1]
                for column in range(strip, min(strip + STRIP, last), TILE):
                    tile(sources.ctypes.data, weights.ctypes.data, begin, end, column, out + row * pitch)

    signature = "void(int64[::1], int64[::1], float32[::1], int64, int64, int64, int64)"
    compiled: Loop = numba.njit(signature, nogil=True)(loop)
    row, memory = np.arange(TILE, dtype=np.float32), np.empty(TILE + LANE, dtype=np.float32)
    out = memory[-memory.ctypes.data % ALIGN // memory.itemsize :][:TILE]
    starts, sources = np.array([0, 1]), np.array([row.ctypes.data])
    compiled(starts, sources, np.array([0.5], dtype=np.float32), out.ctypes.data, out.nbytes, 0, TILE)
    if not np.array_equal(out, row / 2):
        raise RuntimeError("the loop that numba made gives wrong sums")
    return compiled


def _make_tile() -> Any:
    """Return tile(sources, weights, start, stop, column, out): one tile of a row, the sum over start <= n < stop."""
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    word, number = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(number, LANE)
    splat = ir.Constant(ir.VectorType(ir.IntType(32), LANE), [0] * LANE)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        sources, weights, start, stop, column, out = given

        def size(bytes: int) -> Any:
            return ir.Constant(word, bytes)

        def place(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        column = builder.mul(column, size(4))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANE)) for _ in range(TILE // LANE)]
        with cgutils.for_range_slice(builder, start, stop, size(1), inc=True) as (n, _):
            row = builder.add(builder.load(place(sources, builder.mul(n, size(8)), word)), column)
            weight = builder.load(place(weights, builder.mul(n, size(4)), number))
            alone = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
            weight = builder.shuffle_vector(alone, ir.Constant(vector, ir.Undefined), splat)
            for part, held in enumerate(sums):
                value = builder.load(place(row, size(4 * LANE * part), vector), align=4)
                product = builder.fmul(weight, value, flags=["contract"])
                builder.store(builder.fadd(builder.load(held), product, flags=["contract"]), held)
        past_the_cache = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for part, held in enumerate(sums):
            target = place(builder.add(out, column), size(4 * LANE * part), vector)
            builder.store(builder.load(held), target, align=ALIGN).set_metadata("nontemporal", past_the_cache)
        return context.get_dummy_value()

    @intrinsic
    def tile(context, sources, weights, start, stop, column, out):  # type: ignore[no-untyped-def]
        return types.void(sources, weights, start, stop, column, out), generate

    return tile
