"""MIRA: every client keeps its own adapter; the server pulls the adapters of similar clients together.

    local:   w_{k,R} after R local steps from the client's own stored w_k                                    (6)
    server:  w_k^(t+1) = w_{k,R} - eta lambda sum_{l in N_k} a_kl (w_{k,R} - w_l)      for sampled k          (8)
    others:  w_k^(t+1) = w_k^(t)                                                                            (9)

w is the pair (B, A): the step is factor-wise. It is simultaneous: every difference uses the uploads, never a row that
was already moved. w_l is the upload of a co-sampled neighbour; with `neighbours: stored` a neighbour that is not in the
round takes part with its last stored row. All clients start from one common adapter, and each continues from its own.
A client that joins later starts from its neighbours' mean, or, where the graph is learned, from the common adapter.
I - eta lambda L must be a contraction on every round of the schedule, else the build is refused; where fewer clients
answer than were sampled, or the graph is learned, eta lambda is lowered for that round so that no client overshoots.

Our additions to the paper: `normalise` row and symmetric act on the subgraph of the round, so that eta x lambda is the
pull per round for any K. `solver: exact` computes the minimiser itself, for any coupling c = eta lambda:

    W = argmin 1/2 ||W - V||^2 + c/2 tr(W^T L W), that is (I + c L_SS) W_S = V_S + c A_SN W_N

`space: product` applies the step to the updates s B A instead of their factors, and returns to each client's rank by a
truncated SVD (adapters/lowrank.py): the result does not depend on how an update is factored. `clip: tau` shortens every
difference w_k - w_l to the length tau at most. Graphs can be learned from the adapters (graphs/learned.py). `accept`
lets a client refuse a reply that worsens its validation loss. `reply: lost` reproduces a defect of the public code, in
which the server's result never reached its client, to estimate how published figures may have been obtained.

With `lambda: auto` each client chooses pull and graph itself when it fetches its adapter, by its own validation loss:
w_k <- (1 - alpha) w_k + alpha sum_l a~_kl w_l, which is (8) with eta lambda sum_l a_kl = alpha. Uploads are stored as
they are, (1 + graphs) P numbers travel down, and after the last round everybody chooses once more (choosing.py).

Source: MIRA (arXiv:2410.15524; IEEE Networking Letters 7(3), 2025), equations 3, 6, 8, 9 and Algorithm 1.

Checked against the public code (Ahmed-Khaled-Saleh/mira, servers/server_mira.py): the random graph, differences of
uploads only, factor by factor, among the co-sampled, and the reply that is saved where its client never reads it. The
code of its parent FedU (CharlieDinh/FedU_FMTL) moves one client after another, by lr L_k beta local_epochs / 2 instead
of eta lambda; FedU's printed step was not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from fedmira.adapters import Stored
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.lowrank import mix_products
from fedmira.adapters.mixing import mix_rows
from fedmira.graphs.graph import Graph
from fedmira.graphs.settings import GraphConfig, learn_graph
from fedmira.graphs.step import Coupling, check_stable, couple, extend, shorten, stable_coupling, transfer
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Regime, Settings, State
from fedmira.methods.choosing import ChoiceConfig, Strength, build_auto, check_auto, graph_of
from fedmira.methods.wrappers import accepting, lost_reply

TUNED = {"lambda": (0.1, 0.3, 0.6)}  # what `fedmira compare` tries


class AcceptConfig(Settings):
    """When a client accepts the server's reply."""

    tolerance: float = Field(default=0.0, ge=0)  # nats by which its validation loss may worsen


class Config(Settings):
    """Settings of MIRA; the paper prints neither eta nor lambda."""

    eta: float = Field(default=1.0, ge=0)  # the server's learning rate, not the client's
    lam: Strength = Field(default=0.1, alias="lambda")  # of the regulariser; 0 = local training; auto: clients choose
    choice: ChoiceConfig | None = None  # lambda auto: from what, and how
    neighbours: Literal["sampled", "stored"] = "sampled"  # sampled: the authors' code
    normalise: Literal["none", "row", "symmetric"] = "row"  # none: the paper's form
    space: Literal["factors", "product"] = "factors"  # factors: the paper's form
    solver: Literal["explicit", "exact"] = "explicit"  # explicit: the paper's form
    clip: float | None = Field(default=None, gt=0)  # longest difference from a neighbour
    accept: AcceptConfig | None = None
    reply: Literal["used", "lost"] = "used"  # lost: as in the authors' public code, for comparison with its figures
    graph: GraphConfig = GraphConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.clip is not None and self.solver == "exact":
            raise ValueError("clip bounds a neighbour's influence in one explicit step; it needs solver: explicit")
        if self.accept is not None and self.reply == "lost":
            raise ValueError("accept asks a client about a reply that 'reply: lost' never lets it see")
        check_auto(self)
        return self


def build(config: Config, cohort: Cohort) -> Method:
    """Return MIRA as a Method.

    Raises MethodError if eta x lambda is unstable on a round of the schedule (with the largest allowed value), or if
    the graph cannot be made from this cohort.
    """
    if config.lam == "auto":
        return build_auto(config.graph, config.choice or ChoiceConfig(), cohort)
    coupling, explicit = config.eta * config.lam, config.solver == "explicit"
    products, stored = config.space == "product", config.neighbours == "stored"
    is_learned, seed = config.graph.kind == "learned", cohort.seed
    learned = learn_graph(config.graph, products=products, stored=stored, seed=seed) if is_learned else None
    graph = None if is_learned else graph_of(config.graph, cohort)

    def restrict(whole: Graph, ids: Tensor) -> Coupling:
        return couple(whole, ids.numpy(), kind=config.normalise, stored=stored)

    checked = {frozenset(ids.tolist()): torch.from_numpy(ids) for ids in cohort.schedule}
    if graph is not None and explicit:
        rounds = [restrict(graph, ids) for ids in checked.values()]
        check_stable(coupling, graph, rounds, normalised=config.normalise != "none", method="mira")

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        joined, strength = graph, coupling
        notes: dict[str, float] = {}
        tables: Mapping[str, Tensor] = {}
        if learned is not None:
            server = (state.adapters, state.shared, state.tables)
            joined, tables, notes = learned.look(*server, ids, returned.rows, clock.round)
        assert joined is not None
        near = restrict(joined, ids)
        if explicit and (learned is not None or frozenset(ids.tolist()) not in checked):
            strength = stable_coupling(coupling, joined, near)  # this subgraph was not checked before the run
        uploads = state.adapters.take(ids, rows=returned.rows)
        if config.clip is not None:
            near, clipped = shorten(near, uploads, state.adapters, config.clip, products=products)
            notes["clipped_percent"] = 100 * clipped
        within, outside = transfer(near, strength, exact=not explicit)
        if products:
            rows = mix_products(within, uploads, outside, state.adapters.take(torch.from_numpy(near.neighbours)))
        else:
            table = state.adapters.rows
            rows = mix_rows(within, returned.rows, outside=outside, stored=table, neighbours=near.neighbours)
        notes["pull_percent"] = 100 * float((1 - np.diag(within)).mean())
        return Change(ids, rows, tables=tables, notes=notes)

    def pull(ids: Tensor) -> Tensor:
        assert graph is not None
        within, _ = transfer(restrict(graph, ids), coupling, exact=not explicit)
        return torch.from_numpy(1 - np.diag(within))

    def start(start: Stored, clock: Clock) -> State:
        return State(start) if learned is None else State(start, *learned.begin(start))

    def first_rows(state: State, ids: Tensor, known: Tensor) -> Tensor:
        assert graph is not None
        return extend(graph, state.adapters, ids.numpy(), known.numpy(), products=products)

    facts = Facts(
        needs="each",
        compare="products" if products else "factors",
        graph=graph,
        learned=None if learned is None else lambda state: learned.whole(state.tables),
        pull=None if graph is None else pull,
    )
    regime = Regime(first_rows=None if graph is None else first_rows)
    method = Method("mira", merge, rows_of="each", init=start, regime=regime, facts=facts)
    if config.reply == "lost":
        return lost_reply(method)
    return method if config.accept is None else accepting(method, tolerance=config.accept.tolerance)
