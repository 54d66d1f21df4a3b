"""MIRA with clients that poison: what reaches the merge from them is one direction, longer than it should be.

Found by its dotted path, as any method of a user. The first `attackers` clients train like the others, and lie.
"""

from dataclasses import replace

import torch

from fedmira.adapters import norms
from fedmira.engine.gate import MAX_NORM
from fedmira.methods import build as build_method
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, Settings, State


class Config(Settings):
    """Settings of the attack."""

    attackers: int = 0  # clients that poison; 0 = none
    factor: float = 1.0  # norm of their rows, in means of the others'
    clip: float | None = None  # of MIRA
    auto: bool = False  # MIRA with lambda: auto


def build(config: Config, cohort: Cohort) -> Method:
    """Return MIRA under attack."""
    settings = {"lambda": "auto"} if config.auto else {"lambda": 0.5, "graph": {"kind": "uniform"}, "clip": config.clip}
    mira = build_method("mira", settings, cohort)

    def merge(state: State, ids: torch.Tensor, returned: Message, weights: torch.Tensor, clock: Clock) -> Change:
        liars = ids < config.attackers
        direction = torch.randn(returned.rows.shape[1], generator=torch.Generator().manual_seed(0))
        length = config.factor * norms(returned.rows[~liars]).mean()
        lie = direction / direction.norm() * length.float().clamp(max=MAX_NORM / 10)  # the gate refuses what is longer
        rows = torch.where(liars[:, None], lie[None], returned.rows)
        return mira.merge(state, ids, Message(rows, returned.scalars, returned.more), weights, clock)

    return replace(mira, merge=merge)
