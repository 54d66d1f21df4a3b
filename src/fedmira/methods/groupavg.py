"""GroupAvg: FedAvg inside known groups; one adapter for each group, and groups exchange nothing.

    w_g^(t+1) = sum_k p_k w_k^(t) over sampled k of group g,   p_k = n_k / sum_j n_j   (examples)   or equal   (uniform)
    w_g^(t+1) = w_g^(t)   where no client of group g answered

w is the pair (B, A), averaged factor by factor as in FedAvg. A group is the value of a data column, as in MIRA's graph
of kind `groups`: with all clients sampled, groups of n clients each and uniform weights it is MIRA (normalise: none)
with coupling eta lambda = 1/n. It is the control for MIRA with known groups: is a pull better than a mean? With one
group it is FedAvg, with groups of one client it is local training.

Sources: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1, in each group; IFCA (arXiv:2006.04088) finds the groups.

Not checked against the text or code of IFCA, whose rules are not used here.
"""

from __future__ import annotations

from typing import Literal

from fedmira.adapters.lazy import Tensor, torch
from fedmira.errors import MethodError
from fedmira.graphs.graph import group_graph, groups_by
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State


class Config(Settings):
    """Settings of GroupAvg."""

    column: str | None = None  # its value names a client's group; null = all are one group, which is FedAvg
    weights: Literal["examples", "uniform"] = "examples"  # of the means; FedIT weights by training examples


def build(config: Config, cohort: Cohort) -> Method:
    """Return GroupAvg as a Method. Raises MethodError if a client has no single value in the column."""
    names = [""] * len(cohort)
    if config.column is not None:
        names = groups_by(config.column, cohort.ids, cohort.columns, names=cohort.names, what="groupavg: column")
    known = sorted(set(names))  # by name, so that rows do not depend on the clients' order
    group = torch.tensor([known.index(name) for name in names])  # [K]

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = weights if config.weights == "examples" else torch.ones_like(weights)
        present, rows = group_means(returned.rows, shares, group[ids], count=len(known))
        return Change(present, rows, notes={"groups": len(present)})

    graph = None if config.column is None else group_graph(names)
    return Method("groupavg", merge, rows_of=group, facts=Facts(weighs=config.weights == "examples", graph=graph))


def group_means(rows: Tensor, weights: Tensor, group: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Average rows [S, P] within each group; return the groups [n] with a positive weight, and their rows [n, P].

    weights [S]: examples per client, any positive scale; group [S]: the group of each upload, of `count` groups.
    Raises MethodError if the weights sum to zero.
    """
    totals = torch.zeros(count, dtype=weights.dtype).index_add_(0, group, weights)
    present = (totals > 0).nonzero().flatten()
    if not len(present):
        raise MethodError(f"weights of {len(weights)} clients sum to {float(weights.sum()):g}: need a positive sum")
    shares = (group[None, :] == present[:, None]) * weights / totals[present][:, None]
    return present, shares.to(rows.dtype) @ rows
