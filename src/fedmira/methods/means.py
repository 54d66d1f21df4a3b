"""Merges that several methods share: means over clients, and no merge at all."""

from __future__ import annotations

from typing import Literal

from fedmira.adapters import Adapters, ranks
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.updates import cut_
from fedmira.errors import MethodError
from fedmira.methods.base import Change, Clock, Cohort, Merge, Message, Send, State


def shares_of(weights: Tensor, by: Literal["examples", "uniform"]) -> Tensor:
    """Shares p_k [S] of a mean over clients: w_k / sum_j w_j, or 1 / S where `by` is uniform.

    weights [S]: examples per client, any positive scale. Raises MethodError if they sum to zero.
    """
    counts = weights if by == "examples" else torch.ones_like(weights)
    total = counts.sum()
    if not bool(total > 0):
        raise MethodError(f"weights of {len(counts)} clients sum to {float(total):g}: need a positive sum")
    return counts / total


def mean_row(rows: Tensor, shares: Tensor) -> Tensor:
    """Average rows [S, P] into one [1, P]: sum_k p_k x_k; shares [S], of sum 1."""
    return shares.to(rows.dtype)[None, :] @ rows


def merge_mean(by: Literal["examples", "uniform"]) -> Merge:
    """Return a merge that replaces the one shared row by the mean of the uploads, number by number."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        return replace_shared(mean_row(returned.rows, shares_of(weights, by)))

    return merge


def replace_shared(row: Tensor) -> Change:
    """Replace the one row that all share by `row` [1, P]."""
    return Change(torch.zeros(1, dtype=torch.int64), row)


def has_mixed_ranks(cohort: Cohort) -> bool:
    """Do clients differ in rank, as far as is known?"""
    return cohort.ranks is not None and ranks.is_mixed(cohort.ranks)


def at_own_ranks(rows: Tensor, ids: Tensor, state: State, cohort: Cohort) -> Adapters:
    """Rows [S, P] as adapters of the clients `ids` [S] with their own ranks and scales, where one row is for all.

    Without ranks in the cohort everyone has those of that row.
    """
    shared = state.adapters
    if cohort.ranks is None or cohort.scale is None:
        alike = torch.zeros_like(ids)
        return Adapters(shared.layout, rows, shared.ranks[alike], shared.scale[alike])
    return Adapters(shared.layout, rows, cohort.ranks[ids], cohort.scale[ids])


def send_cut(cohort: Cohort) -> Send | None:
    """What every client is sent of the one shared row: its first pairs, to its own rank. None where all have one rank.

    B comes at the client's own scale, so that the pairs keep their products.
    """

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        return Message(cut_(at_own_ranks(row.rows.repeat(len(ids), 1), ids, state, cohort), row).rows)

    return send if has_mixed_ranks(cohort) else None


def change_nothing(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
    """Replace no row, whatever came back."""
    return Change(torch.empty(0, dtype=torch.int64), returned.rows[:0])
