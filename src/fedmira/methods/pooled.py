"""Pooled: one adapter, trained on all clients' data in one place; the bound of a shared adapter, not federated at all.

    w^(t+1) = w_n^(t),  w_(i+1) = w_i - step on a batch b_i drawn from D_1 u ... u D_K,  i = 0 .. n - 1

It breaks what federation is for: every client's texts lie together, those of clients that are not in the round
included. Take it to see what keeping data apart costs a shared adapter, never where they may not be shared. It bounds
shared adapters alone: where clients contradict each other, training alone can do better.

A round takes as many optimizer steps n as the round's clients would take together, each on as many examples, so that
both compute and examples are those of a federated round. The steps follow each other, though, where clients step
side by side: at the same learning rate the pool gets further in a round. Batches are cut from a new permutation of all
data in each round, so a client counts by its examples. The pool has a stream and optimizer moments of its own.
Not from a paper.
"""

from __future__ import annotations

from pydantic import Field

from fedmira.adapters.lazy import Tensor, torch
from fedmira.methods.base import (
    Change,
    Clock,
    Cohort,
    Message,
    Method,
    Settings,
    State,
    one_row,
    serve_one,
    start_state,
)


class Config(Settings):
    """Settings of pooled training."""

    steps: int | None = Field(default=None, ge=1)  # a round, of batch_size examples each; null = as its clients would


def build(config: Config, cohort: Cohort) -> Method:
    """Return pooled training as a Method; the engine makes one client of all."""
    return Method(
        name="pooled",
        init=start_state,
        send=one_row,
        merge=take_row,
        serve=serve_one,
        personal=False,
        uses_weights=False,
        exchanges=False,
        trains="pool",
        pool_steps=config.steps,
    )


def take_row(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
    """Replace the one row by what the pool returned, rows [1, P]; of several rows by their mean."""
    return Change(torch.zeros(1, dtype=torch.int64), returned.rows.mean(dim=0, keepdim=True))
