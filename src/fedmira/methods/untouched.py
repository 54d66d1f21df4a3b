"""Untouched: the base alone; nobody trains, nothing travels, every score is that of the base without an adapter.

    w^(t+1) = w^(t) = (B, A) with B = 0,   so W + s B A = W

The control that tells what training brings at all. A round of it costs a line of the record and an empty checkpoint: no
pass through the base is made, the scores are those of the start. Not from a paper.
"""

from __future__ import annotations

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, torch
from fedmira.methods.base import (
    Change,
    Clock,
    Cohort,
    Memory,
    Message,
    Method,
    Settings,
    State,
    Tools,
    one_row,
    serve_one,
    start_state,
)


class Config(Settings):
    """The untouched base has no settings."""


def build(config: Config, cohort: Cohort) -> Method:
    """Return the untouched base as a Method."""
    return Method(
        name="untouched",
        init=start_state,
        send=one_row,
        merge=change_nothing,
        serve=serve_one,
        personal=False,
        uses_weights=False,
        step=stand_still,
        exchanges=False,
        trains="nobody",
    )


def stand_still(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    return adapters, memory


def change_nothing(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
    """Replace no row, whatever came back."""
    return Change(torch.empty(0, dtype=torch.int64), returned.rows[:0])
