"""MIRA: every client keeps its own adapter; the server pulls the adapters of similar clients together.

    local:   w_{k,R} after R local steps from the client's own stored w_k                                    (6)
    server:  w_k^(t+1) = w_{k,R} - eta lambda sum_{l in N_k} a_kl (w_{k,R} - w_l)      for sampled k          (8)
    others:  w_k^(t+1) = w_k^(t)                                                                            (9)

w stands for the pair (B, A): the step is factor-wise. It is simultaneous: every difference uses the uploads, never a
row already moved. w_l is the upload of a co-sampled neighbour; with `neighbours: stored` a neighbour that is not in the
round takes part with its last stored row. All clients start from one common adapter and each restarts from its own.
eta lambda must keep I - eta lambda L a contraction on every round of the schedule, else the build is refused; where
fewer answer than were sampled, it is lowered for that round to what the smaller subgraph bears without overshoot.

Source: MIRA (arXiv:2410.15524; IEEE Networking Letters 7(3), 2025), equations 3, 6, 8, 9 and Algorithm 1. Normalisation
is ours: `none` is the paper's form; `row` and `symmetric` act on the round's own subgraph, so that eta x lambda is
the pull per round whatever K is. Unlike the public code, the step reaches a client when it returns.
"""

import warnings
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedmira.errors import MethodError
from fedmira.graph import (
    Coupling,
    Graph,
    couple,
    largest_coupling,
    make_graph,
)
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
from fedmira.mixing import mix_rows


class GraphConfig(Settings):
    """Where the similarities a_kl come from."""

    kind: Literal["random", "uniform", "groups", "file"] = "random"  # random: the authors' recipe
    column: str | None = None  # groups: clients with the same value of this data column are joined
    path: str | None = None  # file: CSV with client,neighbour,weight
    seed: int | None = Field(default=None, ge=0)  # random: None = the run's seed

    @model_validator(mode="after")
    def _complete(self) -> "GraphConfig":
        if self.kind == "groups" and not self.column:
            raise ValueError("graph kind 'groups' needs 'column', the data column that names a client's group")
        if self.kind == "file" and not self.path:
            raise ValueError("graph kind 'file' needs 'path', a CSV with client,neighbour,weight")
        return self


class Config(Settings):
    """Settings of MIRA; the paper prints neither eta nor lambda."""

    eta: float = Field(default=1.0, ge=0)  # the server's learning rate, not the client's
    lam: float = Field(default=0.1, ge=0, alias="lambda")  # strength of the regulariser; 0 = local training
    neighbours: Literal["sampled", "stored"] = "sampled"  # sampled: the authors' code
    normalise: Literal["none", "row", "symmetric"] = "row"  # none: the paper's form
    graph: GraphConfig = GraphConfig()


def build(config: Config, cohort: Cohort) -> Method:
    """Return MIRA as a Method.

    Raises MethodError if eta x lambda is unstable on a round of the schedule (with the largest allowed value), or if
    the graph cannot be made from this cohort.
    """
    wanted = config.graph
    graph = make_graph(
        wanted.kind,
        ids=cohort.ids,
        columns=cohort.columns,
        column=wanted.column,
        path=wanted.path,
        seed=cohort.seed if wanted.seed is None else wanted.seed,
    )
    coupling = config.eta * config.lam

    def restrict(ids: Tensor) -> Coupling:
        return couple(graph, ids.numpy(), kind=config.normalise, stored=config.neighbours == "stored")

    checked = {frozenset(ids.tolist()): torch.from_numpy(ids) for ids in cohort.schedule}
    check_stable(coupling, graph, [restrict(ids) for ids in checked.values()], normalised=config.normalise != "none")

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        near, strength = restrict(ids), coupling
        if frozenset(ids.tolist()) not in checked:  # some did not answer: a smaller subgraph may bear less
            limit = largest_coupling(graph, [near])
            strength = min(coupling, limit / 2 if graph.symmetric else limit)
        rows = laplacian_step(returned.rows, near, coupling=strength, stored=state.adapters.rows)
        return Change(ids, rows, notes={"pull_percent": 100 * strength * float(near.degree.mean())})

    return Method(
        name="mira",
        init=start_state,
        send=own_rows,
        merge=merge,
        serve=serve_own,
        personal=True,
        uses_weights=False,
        needs="each",
        graph=graph,
        pull=lambda ids: coupling * torch.from_numpy(restrict(ids).degree),
    )


def check_stable(coupling: float, graph: Graph, rounds: list[Coupling], *, normalised: bool) -> None:
    """Refuse a coupling that makes clients swing apart on some round; warn where they overshoot their neighbours.

    Symmetric graphs: eta lambda lambda_max(L) < 2. Asymmetric graphs: eta lambda max_k degree_k <= 1.
    """
    limit = largest_coupling(graph, rounds)
    if coupling > 0 and (coupling >= limit if graph.symmetric else coupling > limit):
        why = "2 / largest Laplacian eigenvalue" if graph.symmetric else "1 / largest row sum of an asymmetric graph"
        raise MethodError(
            f"mira: eta x lambda = {coupling:.4g} must be below {limit:.4g} for this graph and schedule ({why}), else "
            f"clients swing apart; lower lambda{'' if normalised else ', or use normalise: row'}"
        )
    if graph.symmetric and coupling > limit / 2 * (1 + 1e-9):  # at exactly half, neighbours meet in the middle
        warnings.warn(
            f"mira: eta x lambda = {coupling:.4g} is over half of the stable limit {limit:.4g}: clients overshoot "
            "their neighbours and come back",
            stacklevel=2,
        )


def laplacian_step(rows: Tensor, near: Coupling, *, coupling: float, stored: Tensor) -> Tensor:
    """W_S - c (diag(A~ 1) W_S - A~_SS W_S - A~_SN W_N), all from the rows before the step.

    rows [S, P] uploads in the order of near.ids; stored [K, P] rows on the server, read at near.neighbours only.
    Source: MIRA equation 8.
    """
    within = np.diag(1 - coupling * near.degree) + coupling * near.within
    return mix_rows(within, rows, outside=coupling * near.outside, stored=stored, neighbours=near.neighbours)
