"""Untouched: the base without an adapter; no client trains, nothing travels, every score is that of the base.

    w^(t+1) = w^(t) = (B, A) with B = 0,   so W + s B A = W

It is the control that shows what training achieves at all. A round costs a line of the record and an empty checkpoint:
there is no pass through the base, the scores are those of the start. Not from a paper.
"""

from fedmira.methods.base import Cohort, Method, Regime, Settings, no_columns
from fedmira.methods.means import change_nothing


class Config(Settings):
    """The untouched base has no settings."""


def build(config: Config, cohort: Cohort) -> Method:
    """Return the untouched base as a Method."""
    return Method("untouched", change_nothing, travels=no_columns, trained=no_columns, regime=Regime(trainees="nobody"))
