"""Mixed rows against the plain product, over the limits of strips and turns."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmira.adapters import mixing
from fedmira.adapters import mixing_compiled as compiled_loop
from fedmira.adapters.mixing import mix_rows
from fedmira.adapters.mixing_compiled import find_loop
from fedmira.disk import table
from fedmira.errors import ShapeError


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def grid(counts: Sequence[int], columns: Sequence[int]) -> list[Any]:
    """Every number of rows with every length; the most rows of the greatest length are slow."""
    most = (max(counts), max(columns))
    pairs = itertools.product(counts, columns)
    return [pytest.param(*pair, marks=pytest.mark.slow) if pair == most else pair for pair in pairs]


@pytest.fixture
def threads() -> Iterator[None]:
    """Let torch use two threads, so that turns run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "columns"), grid((1, 3, 8, 32, 100), (1, 16, 8192, 32768, 32769, 100_003)))
@pytest.mark.usefixtures("threads")
def test_rows_are_mixed_as_by_one_product_whatever_their_number_and_length(count: int, columns: int) -> None:
    rows, within = draw(count, columns), draw(count, count).numpy()
    torch.testing.assert_close(mix_rows(within, rows), torch.from_numpy(within) @ rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [1, 32769, pytest.param(100_003, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("threads")
def test_rows_with_few_neighbours_each_are_mixed_likewise(columns: int) -> None:
    """Of 100 rows each meets itself and the next five: 6 % of the weights."""
    rows, within = draw(100, columns), np.zeros((100, 100))
    for row in range(100):
        within[row, (row + np.arange(6)) % 100] = draw(6 + row)[:6]
    found = mix_rows(within, rows, outside=np.ones((100, 1)), stored=rows, neighbours=np.array([3]))
    torch.testing.assert_close(found, torch.from_numpy(within) @ rows + rows[3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("neighbours", [[5], [0, 7, 3], list(range(12, 5012))])
@pytest.mark.usefixtures("threads")
def test_stored_neighbours_are_added(neighbours: list[int]) -> None:
    columns = 40_001 if len(neighbours) < 10 else 300
    rows, stored = draw(4, columns), draw(max(neighbours) + 1, columns)
    within, outside = draw(4, 4).numpy(), draw(4, len(neighbours)).numpy()
    outside[outside < 0] = 0
    outside[2] = 0
    found = mix_rows(within, rows, outside=outside, stored=stored, neighbours=np.array(neighbours))
    expected = torch.from_numpy(within) @ rows + torch.from_numpy(outside) @ stored[neighbours]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_stored_rows_that_are_no_neighbours_are_not_read() -> None:
    stored = torch.full((4, 40_000), torch.nan)
    stored[2] = 10
    found = mix_rows(
        np.array([[0.5]]),
        torch.full((1, 40_000), 4.0),
        outside=np.array([[0.25]]),
        stored=stored,
        neighbours=np.array([2]),
    )
    assert torch.equal(found, torch.full((1, 40_000), 4.5))


def test_the_number_of_threads_does_not_change_the_bits() -> None:
    rows, within = draw(8, 100_003, dtype=torch.float32), draw(8, 8).numpy()
    stored, outside = draw(5, 100_003, dtype=torch.float32), draw(8, 2).numpy()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(mix_rows(within, rows, outside=outside, stored=stored, neighbours=np.array([1, 4])))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_float32_rows_are_as_near_to_the_exact_answer_as_one_product() -> None:
    rows, within = draw(32, 50_000, dtype=torch.float32), draw(32, 32).numpy()
    exact = torch.from_numpy(within) @ rows.double()
    plain = (torch.from_numpy(within).float() @ rows - exact).abs().max()
    found = mix_rows(within, rows)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * plain


def test_inputs_stay_and_the_answer_is_new_memory() -> None:
    rows, stored = draw(2, 50), draw(3, 50)
    kept, held = rows.clone(), stored.clone()
    mix_rows(np.eye(2), rows, outside=np.ones((2, 1)), stored=stored, neighbours=np.array([2])).zero_()
    assert torch.equal(rows, kept)
    assert torch.equal(stored, held)


def test_weights_that_do_not_fit_are_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 3\): need \[2, 2\] for 2 rows"):
        mix_rows(np.eye(3), draw(2, 5))
    with pytest.raises(ShapeError, match=r"\[2, 1\] for 1 stored"):
        mix_rows(np.eye(2), draw(2, 5), outside=np.ones((2, 3)), stored=draw(4, 5), neighbours=np.array([2]))


@pytest.mark.parametrize(("columns", "neighbour"), [(4, 1), (6, 1), (5, 4), (5, -1)])
def test_stored_rows_that_do_not_fit_are_refused(columns: int, neighbour: int) -> None:
    given = {"outside": np.ones((2, 1)), "stored": draw(4, columns), "neighbours": np.array([neighbour])}
    with pytest.raises(ShapeError, match=rf"\[4, {columns}\], neighbours {neighbour} to .*need rows of 5 .*0 to 3"):
        mix_rows(np.eye(2), draw(2, 5), **given)


def test_an_answer_stays_while_it_is_held_and_its_memory_serves_the_next_one() -> None:
    rows = draw(3, 70_000)
    first = mix_rows(np.eye(3), rows)
    part = first[1:]
    second = mix_rows(2 * np.eye(3), rows)
    assert torch.equal(first, rows)
    assert torch.equal(second, 2 * rows)
    del first, second
    third = mix_rows(3 * np.eye(3), rows)
    assert torch.equal(part, rows[1:])
    place = third.data_ptr()
    del third
    assert mix_rows(np.eye(3), rows).data_ptr() == place


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let rows of any size be mixed by the compiled loop; return the columns that were."""
    pytest.importorskip("numba")
    real, asked = mixing.find_loop(), []
    assert real is not None

    def seen(*given: Any) -> None:
        asked.append(given[-2:])
        real(*given)

    monkeypatch.setattr(mixing, "_WORTH", 0)
    monkeypatch.setattr(mixing, "find_loop", lambda: seen)
    return asked


@pytest.mark.parametrize(("count", "columns"), grid((1, 3, 32, 100), (128, 144, 32768, 32768 + 48, 100_000)))
@pytest.mark.usefixtures("threads")
def test_the_compiled_loop_gives_the_plain_product(count: int, columns: int, compiled: list[tuple[int, int]]) -> None:
    rows, within = draw(count, columns, dtype=torch.float32), np.zeros((count, count))
    for row in range(count):
        within[row, (row + np.arange(min(count, 6))) % count] = draw(6 + row)[: min(count, 6)]
    stored, neighbours = draw(9, columns, dtype=torch.float32), np.array([7, 0, 3])
    outside = draw(count, 3).numpy()
    outside[outside < 0] = 0
    found = mix_rows(within, rows, outside=outside, stored=stored, neighbours=neighbours)
    exact = torch.from_numpy(within) @ rows.double() + torch.from_numpy(outside) @ stored[neighbours].double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert sum(last - first for first, last in compiled) == columns - columns % 128
    assert torch.equal(found, mix_rows(within, rows, outside=outside, stored=stored, neighbours=neighbours))


def test_the_compiled_loop_reads_neighbours_alone(compiled: list[tuple[int, int]]) -> None:
    rows = torch.stack([torch.full((256,), 2.0), torch.full((256,), torch.nan)])
    found = mix_rows(np.diag([0.5, 1.0]), rows)
    assert torch.equal(found[0], torch.ones(256))
    assert found[1].isnan().all()
    assert compiled == [(0, 256)]


@pytest.mark.parametrize(
    ("count", "columns", "dtype"), [(2, 260, torch.float32), (2, 256, torch.float64), (100, 256, torch.float32)]
)
def test_rows_that_tiles_do_not_fit_are_mixed_the_other_way(
    count: int, columns: int, dtype: torch.dtype, compiled: list[tuple[int, int]]
) -> None:
    """Rows that do not start where vectors do, other numbers, or all of a hundred rows mixed with all."""
    rows, within = draw(count, columns, dtype=dtype), draw(count, count).numpy()
    torch.testing.assert_close(
        mix_rows(within, rows).double(), torch.from_numpy(within) @ rows.double(), rtol=1e-4, atol=1e-4
    )
    assert compiled == []


@pytest.mark.parametrize("mapped", [False, True])
def test_the_compiled_loop_reads_stored_rows_where_they_lie(
    mapped: bool, compiled: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were written, in memory or in a file, and rows that are still as they began."""
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    held = table.Table(draw(2, 256, dtype=torch.float32), torch.tensor([0, 1, 0, 1, 1]), tmp_path if mapped else None)
    held.write(torch.tensor([0, 3]), draw(2, 256, dtype=torch.float32))
    assert held.mapped == mapped
    rows = draw(4, 256, dtype=torch.float32)
    neighbours = np.array([4, 3, 0, 2], dtype=np.int32)  # as sparse graphs have them
    within, outside = draw(4, 4).numpy(), draw(4, 4).numpy()
    exact = torch.from_numpy(within) @ rows.double()
    for some in (neighbours, neighbours[:0]):
        wanted = exact + torch.from_numpy(outside[:, : len(some)]) @ held[torch.from_numpy(some)].double()
        found = mix_rows(within, rows, outside=outside[:, : len(some)], stored=held, neighbours=some)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert compiled == [(0, 256)] * 2


@pytest.mark.usefixtures("compiled")
def test_rows_that_are_views_of_others_are_mixed_as_they_are() -> None:
    """Rows further apart than they are long, the same row more than once, and rows whose numbers are not neighbours."""
    wide, within = draw(3, 512, dtype=torch.float32), draw(3, 3).numpy()
    for rows in (wide[:, 128:384], wide[:1].expand(3, -1), wide[:, ::2]):
        exact = torch.from_numpy(within) @ rows.double()
        torch.testing.assert_close(mix_rows(within, rows).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("broken", "told"), [(None, False), (RuntimeError("no such symbol"), True)])
def test_without_a_numba_that_works_nothing_is_compiled(
    broken: Exception | None, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken is None:
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(compiled_loop, "_compile", Mock(side_effect=broken))
    assert find_loop.__wrapped__() is None
    assert ("no such symbol" in caplog.text) == told
