"""Local: every client trains alone, with the schedule and steps of the other methods.

    w_k^(t+1) = w_{k,R}^(t)  for sampled k;   w_k^(t+1) = w_k^(t)  otherwise

Nothing travels: each client keeps its adapter, and the server sees none. It is the baseline that every federated method
has to beat, and MIRA with lambda = 0 (arXiv:2410.15524, after equation 3).
"""

from fedmira.methods.base import Cohort, Facts, Method, Settings, no_columns
from fedmira.methods.means import change_nothing


class Config(Settings):
    """Local training has no settings."""


def build(config: Config, cohort: Cohort) -> Method:
    """Return local training as a Method."""
    return Method("local", change_nothing, rows_of="each", travels=no_columns, facts=Facts(needs="each"))
