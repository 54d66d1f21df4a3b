"""Local: every client trains alone, on the same schedule and steps as the others.

    w_k^(t+1) = w_{k,R}^(t)  for sampled k;   w_k^(t+1) = w_k^(t)  otherwise

The yardstick that every federated method has to beat; MIRA with lambda = 0 (arXiv:2410.15524, after equation 3).
"""

from __future__ import annotations

from fedmira.adapters.lazy import Tensor
from fedmira.methods.base import (
    Change,
    Clock,
    Cohort,
    Message,
    Method,
    Settings,
    State,
    own_rows,
    serve_own,
    start_state,
)


class Config(Settings):
    """Local training has no settings of its own."""


def build(config: Config, cohort: Cohort) -> Method:
    """Return local training as a Method."""
    return Method(
        name="local",
        init=start_state,
        send=own_rows,
        merge=keep_uploads,
        serve=serve_own,
        personal=True,
        uses_weights=False,
        needs="each",
        exchanges=False,
    )


def keep_uploads(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
    """Replace each sampled client's row by what it returned."""
    return Change(ids, returned.rows)
