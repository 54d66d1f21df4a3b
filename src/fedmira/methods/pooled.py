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

from pydantic import Field

from fedmira.methods.base import Cohort, Method, Regime, Settings, change_nothing, no_columns


class Config(Settings):
    """Settings of pooled training."""

    steps: int | None = Field(default=None, ge=1)  # a round, of batch_size examples each; null = as its clients would


def build(config: Config, cohort: Cohort) -> Method:
    """Return pooled training as a Method: one client has all data, and keeps what it trains."""
    regime = Regime(trainees="pool", pool_steps=config.steps)
    return Method("pooled", change_nothing, travels=no_columns, regime=regime)
