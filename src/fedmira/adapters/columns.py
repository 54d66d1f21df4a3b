"""Columns of a row: which of them travel, which are trained; packed for the wire, laid over a row, counted in bytes.

Columns are a bool tensor [P] over a layout. Letters: S clients, P numbers of a row, Q columns that are True.
Source: the masks of optax (transforms/_masking.py) over leaves; here over numbers of a flat row.
"""

from __future__ import annotations

from typing import Literal

from fedmira.adapters import ALIGN, Layout
from fedmira.adapters.lazy import Tensor, torch


def every_column(layout: Layout) -> Tensor:
    """Return all columns, bool [P]."""
    return torch.ones(layout.size, dtype=torch.bool)


def factor_columns(layout: Layout, factor: Literal["A", "B"]) -> Tensor:
    """Return the columns of every A or of every B of the low-rank pairs, bool [P]."""
    columns = torch.zeros(layout.size, dtype=torch.bool)
    for part in layout.parts:
        for leaf in part.leaves:
            columns[leaf.start : leaf.stop] = leaf.factor == factor
    return columns


def pack(rows: Tensor, columns: Tensor) -> Tensor:
    """Return these columns of rows [S, P] as [S, Q]; the rows themselves where that is all of them."""
    return rows if bool(columns.all()) else rows[:, columns.to(rows.device)]


def lay_over(rows: Tensor, columns: Tensor, packed: Tensor) -> Tensor:
    """Return rows [S, P] with `packed` [S, Q] in these columns; `packed` itself where that is all of them."""
    if bool(columns.all()):
        return packed
    whole = rows.clone()
    whole[:, columns.to(rows.device)] = packed
    return whole


def count_columns(layout: Layout, columns: Tensor, ranks: Tensor) -> Tensor:
    """Return how many numbers [S] a client of these ranks sends of these columns, each part padded to ALIGN.

    A client has no number beyond its rank. ranks [S] or [S, modules]. For all columns this is Layout.sizes.
    """
    if bool(columns.all()):
        return layout.sizes(ranks)
    if not len(ranks) or not bool(columns.any()):
        return torch.zeros(len(ranks), dtype=torch.int64)
    distinct, kinds = torch.unique(ranks, dim=0, return_inverse=True)
    present = layout.rank_mask(distinct) & columns
    counts = torch.zeros(len(distinct), dtype=torch.int64)
    for part in layout.parts:
        counts += -(-present[:, part.start : part.stop].sum(dim=1) // ALIGN) * ALIGN
    return counts[kinds]
