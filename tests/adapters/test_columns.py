"""Columns of a row: packed for the wire, laid over a row, and counted as a client of each rank has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from fedmira.adapters import ALIGN, Layout, lora_layout, prompt_layout
from fedmira.adapters.columns import count_columns, every_column, factor_columns, lay_over, pack

TWO = lora_layout([("q", 3, 2), ("v", 2, 2)], 2)  # A [2, 3], B [2, 2], A [2, 2], B [2, 2]: 6 + 4 + 4 + 4
PROMPT = prompt_layout(3, 2, 2)
UNEVEN = lora_layout([("attn", 3, 2), ("mlp", 2, 2)], (1, 3))


def rows(count: int, layout: Layout = TWO) -> Tensor:
    return torch.arange(1.0, 1 + count * layout.size).view(count, layout.size)


def test_the_factors_of_a_row_share_nothing_and_leave_only_what_aligns() -> None:
    first, second = factor_columns(TWO, "A"), factor_columns(TWO, "B")
    assert first.nonzero().flatten().tolist() == [*range(6), *range(10, 14)]
    assert second.nonzero().flatten().tolist() == [*range(6, 10), *range(14, 18)]
    assert bool(every_column(TWO).all())
    assert every_column(TWO).shape == (TWO.size,)


def test_an_encoder_has_no_low_rank_factors() -> None:
    assert not factor_columns(PROMPT, "A").any()
    assert not factor_columns(PROMPT, "B").any()


def test_columns_are_packed_in_their_order() -> None:
    columns = torch.zeros(TWO.size, dtype=torch.bool)
    columns[[1, 4, 17]] = True
    assert pack(rows(2), columns).tolist() == [[2, 5, 18], [34, 37, 50]]
    assert pack(rows(2), ~every_column(TWO)).shape == (2, 0)


def test_packing_every_column_copies_nothing() -> None:
    whole = rows(3)
    assert pack(whole, every_column(TWO)) is whole
    assert lay_over(whole, every_column(TWO), whole) is whole


def test_what_is_laid_over_a_row_takes_its_columns_and_no_others() -> None:
    own, sent = rows(2), -rows(2)
    columns = factor_columns(TWO, "A")
    found = lay_over(own, columns, pack(sent, columns))
    assert torch.equal(found, torch.where(columns, sent, own))
    assert torch.equal(own, rows(2))  # it is only read
    assert torch.equal(lay_over(own, ~every_column(TWO), pack(sent, ~every_column(TWO))), own)


@settings(max_examples=50, deadline=None)
@given(some.lists(some.booleans(), min_size=TWO.size, max_size=TWO.size), some.integers(0, 4))
def test_packing_and_laying_over_are_each_others_inverse(chosen: list[bool], count: int) -> None:
    columns, own, sent = torch.tensor(chosen), rows(count), -rows(count)
    packed = pack(sent, columns)
    assert packed.shape == (count, int(columns.sum()))
    whole = lay_over(own, columns, packed)
    assert torch.equal(pack(whole, columns), packed)
    assert torch.equal(pack(whole, ~columns), pack(own, ~columns))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (TWO, [1, 2, 2]),
        (UNEVEN, [[1, 1], [1, 3], [1, 2]]),
        (PROMPT, [0, 0]),
        (lora_layout([("m", 100, 90), ("n", 7, 5)], 9), [9, 1, 4]),
    ],
)
def test_all_columns_are_as_many_numbers_as_the_layout_has_for_a_rank(
    layout: Layout, ranks: list[int] | list[list[int]]
) -> None:
    """Counted one by one as well, since all of them take a shorter way."""
    own = torch.tensor(ranks)
    found = count_columns(layout, every_column(layout), own)
    assert torch.equal(found, layout.sizes(own))
    spare = every_column(layout)
    spare[layout.gaps[0]] = False  # of no client: as many numbers, and no longer all columns
    assert torch.equal(count_columns(layout, spare, own), layout.sizes(own))


def test_columns_beyond_a_rank_are_not_counted() -> None:
    """A of 100 x 90: a client of rank r sends 100 r numbers of A and 90 r of B, in sixteens."""
    layout = lora_layout([("m", 100, 90)], 3)
    ranks = torch.tensor([1, 3, 2, 1])
    first, second = (count_columns(layout, factor_columns(layout, factor), ranks) for factor in ("A", "B"))
    assert first.tolist() == [112, 304, 208, 112]
    assert second.tolist() == [96, 272, 192, 96]
    assert bool((first % ALIGN == 0).all())


def test_modules_of_a_client_count_by_their_own_ranks() -> None:
    layout = lora_layout([("attn", 100, 90), ("mlp", 50, 40)], (2, 3))
    found = count_columns(layout, factor_columns(layout, "A"), torch.tensor([[1, 3], [2, 1]]))
    assert found.tolist() == [256, 256]  # 100 + 150, 200 + 50


def test_nothing_is_counted_where_nobody_sends_or_nothing_is_sent() -> None:
    assert count_columns(TWO, every_column(TWO), torch.empty(0, dtype=torch.int64)).tolist() == []
    assert count_columns(TWO, ~every_column(TWO), torch.tensor([1, 2])).tolist() == [0, 0]
    assert count_columns(TWO, factor_columns(TWO, "A"), torch.empty(0, dtype=torch.int64)).tolist() == []
