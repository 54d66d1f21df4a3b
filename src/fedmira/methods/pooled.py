"""Pooled: one adapter, trained on the data of all clients in one place; a bound for shared adapters, not federated.

    w^(t+1) = w_n^(t),  w_(i+1) = w_i - step on a batch b_i drawn from D_1 u ... u D_K,  i = 0 .. n - 1

It gives up what federation is for: the texts of all clients are in one place, including those of clients that are not
in the round. Use it to measure what separate data cost a shared adapter, never where data may not be shared. It is a
bound for shared adapters only: where clients contradict each other, training alone can do better.

A round takes as many optimizer steps n as the round's clients would take together, each on as many examples, so that
compute and examples are those of a federated round. But the steps follow one another, whereas clients step in parallel:
at the same learning rate the pool moves further in a round. Batches are cut from a new permutation of all data in each
round, so a client counts by its examples. The pool has a separate random stream and separate optimizer moments.
Not from a paper.
"""

from pydantic import Field

from fedmira.methods.base import Cohort, Method, Regime, Settings, no_columns
from fedmira.methods.means import change_nothing


class Config(Settings):
    """Settings of pooled training."""

    steps: int | None = Field(
        default=None, ge=1
    )  # per round, of batch_size examples each; null = as many as its clients would take


def build(config: Config, cohort: Cohort) -> Method:
    """Return pooled training as a Method: one client has all data, and keeps the adapter that it trains."""
    regime = Regime(trainees="pool", pool_steps=config.steps)
    return Method("pooled", change_nothing, travels=no_columns, regime=regime)
