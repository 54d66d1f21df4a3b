"""MIRA: every client keeps its own adapter; the server pulls the adapters of similar clients together.

    local:   w_{k,R} after R local steps from the client's own stored w_k                                    (6)
    server:  w_k^(t+1) = w_{k,R} - eta lambda sum_{l in N_k} a_kl (w_{k,R} - w_l)      for sampled k          (8)
    others:  w_k^(t+1) = w_k^(t)                                                                            (9)

w stands for the pair (B, A): the step is factor-wise. It is simultaneous: every difference uses the uploads, never a
row already moved. w_l is the upload of a co-sampled neighbour; with `neighbours: stored` a neighbour that is not in the
round takes part with its last stored row. All clients start from one common adapter and each restarts from its own.
eta lambda must keep I - eta lambda L a contraction on every round of the schedule, else the build is refused; where
fewer answer than were sampled, or the graph is learned, it is lowered for that round to what the round's own subgraph
bears without overshoot.

Ours, beyond the paper: `normalise` row and symmetric act on the round's own subgraph, so that eta x lambda is the pull
per round whatever K is. `solver: exact` takes the minimiser itself, for any coupling c = eta lambda:

    W = argmin 1/2 ||W - V||^2 + c/2 tr(W^T L W), that is (I + c L_SS) W_S = V_S + c A_SN W_N

`space: product` does the same to the updates s B A instead of their factors, and returns to each client's rank by a
truncated SVD (adapters/lowrank.py): nothing depends on how an update is factored. `clip: tau` shortens every difference
w_k - w_l to the length tau at most. Graphs can be learned from the adapters (graphs/learned.py). `accept` lets a client
refuse a reply that worsens its validation loss. `reply: lost` replays a defect of the public code, in which what the
server decided never reached the client it was for; it is there to measure what published figures may have been.

Source: MIRA (arXiv:2410.15524; IEEE Networking Letters 7(3), 2025), equations 3, 6, 8, 9 and Algorithm 1.

Checked against the public code (Ahmed-Khaled-Saleh/mira, servers/server_mira.py): the random graph, differences of
uploads alone, factor by factor, among the co-sampled, and the reply that is saved where nobody looks for it. The code
of its parent FedU (CharlieDinh/FedU_FMTL) moves one client after another, by lr L_k beta local_epochs / 2 in the place
of eta lambda; against FedU's printed step nothing was checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.lowrank import mix_products
from fedmira.adapters.mixing import mix_rows
from fedmira.errors import MethodError
from fedmira.graphs.graph import Coupling, Graph, couple, largest_coupling, make_graph
from fedmira.graphs.learned import LEAST_SKETCH, LearnedGraph, knn_graph, shuffled
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
    own_rows,
    serve_own,
)

# The keys of `graph` that go with each kind; the others are refused there.
KEYS = {
    "random": {"seed", "shuffled"},
    "uniform": {"shuffled"},
    "groups": {"column", "shuffled"},
    "file": {"path", "shuffled"},
    "knn": {"features", "column", "measure", "degree", "shuffled"},
    "learned": {"of", "measure", "scope", "every", "degree", "sketch", "shuffled"},
}


class GraphConfig(Settings):
    """Where the similarities a_kl come from."""

    kind: Literal["random", "uniform", "groups", "file", "knn", "learned"] = "random"  # random: the authors' recipe
    column: str | None = None  # groups: clients with the same value are joined; knn: whose values are counted
    path: str | None = None  # file: CSV with client,neighbour,weight
    seed: int | None = Field(default=None, ge=0)  # random: None = the run's seed
    features: Literal["embedding", "histogram"] = "embedding"  # knn: what the base makes of prompts, or counted values
    of: Literal["adapters", "updates"] = "adapters"  # learned: all that was learned, or the last round's part of it
    measure: Literal["cosine", "distance"] = "cosine"  # knn, learned
    scope: Literal["whole", "layer"] = "whole"  # learned: one similarity of all layers together, or their mean
    every: int = Field(default=1, ge=1)  # learned: rounds between two looks at the same client
    degree: int = Field(default=10, ge=1)  # knn, learned: the most neighbours of a client
    sketch: int = Field(default=LEAST_SKETCH, ge=LEAST_SKETCH)  # learned: numbers kept of each client
    shuffled: bool = False  # the same graph with its clients permuted: a control

    @model_validator(mode="after")
    def _complete(self) -> GraphConfig:
        if self.kind == "groups" and not self.column:
            raise ValueError("graph kind 'groups' needs 'column', the data column that names a client's group")
        if self.kind == "file" and not self.path:
            raise ValueError("graph kind 'file' needs 'path', a CSV with client,neighbour,weight")
        if self.kind == "knn" and (self.features == "histogram") != (self.column is not None):
            raise ValueError("graph kind 'knn' needs 'column' with 'features: histogram', and only there")
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        given = {name for name in self.model_fields_set - {"kind"} if getattr(self, name) != usual[name]}
        if strange := sorted(given - KEYS[self.kind]):
            raise ValueError(
                f"graph kind '{self.kind}' has no {', '.join(strange)}; it takes {sorted(KEYS[self.kind])}"
            )
        return self


class AcceptConfig(Settings):
    """When a client keeps what the server replies."""

    tolerance: float = Field(default=0.0, ge=0)  # nats by which its own validation loss may worsen


class Config(Settings):
    """Settings of MIRA; the paper prints neither eta nor lambda."""

    eta: float = Field(default=1.0, ge=0)  # the server's learning rate, not the client's
    lam: float = Field(default=0.1, ge=0, alias="lambda")  # strength of the regulariser; 0 = local training
    neighbours: Literal["sampled", "stored"] = "sampled"  # sampled: the authors' code
    normalise: Literal["none", "row", "symmetric"] = "row"  # none: the paper's form
    space: Literal["factors", "product"] = "factors"  # factors: the paper's form
    solver: Literal["explicit", "exact"] = "explicit"  # explicit: the paper's form
    clip: float | None = Field(default=None, gt=0)  # the most that any neighbour's difference may be long
    accept: AcceptConfig | None = None
    reply: Literal["used", "lost"] = "used"  # lost: as in the authors' public code, for comparison with its figures
    graph: GraphConfig = GraphConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.clip is not None and self.solver == "exact":
            raise ValueError("clip bounds a neighbour's influence in one explicit step; it needs solver: explicit")
        if self.accept is not None and self.reply == "lost":
            raise ValueError("accept asks a client about a reply that 'reply: lost' never lets it see")
        return self


def build(config: Config, cohort: Cohort) -> Method:
    """Return MIRA as a Method.

    Raises MethodError if eta x lambda is unstable on a round of the schedule (with the largest allowed value), or if
    the graph cannot be made from this cohort.
    """
    coupling, explicit = config.eta * config.lam, config.solver == "explicit"
    learned = learn_graph(config, cohort) if config.graph.kind == "learned" else None
    graph = None if learned is not None else given_graph(config.graph, cohort)

    def restrict(some: Graph, ids: Tensor) -> Coupling:
        return couple(some, ids.numpy(), kind=config.normalise, stored=config.neighbours == "stored")

    checked = {frozenset(ids.tolist()): torch.from_numpy(ids) for ids in cohort.schedule}
    if graph is not None and explicit:
        rounds = [restrict(graph, ids) for ids in checked.values()]
        check_stable(coupling, graph, rounds, normalised=config.normalise != "none")
    if config.reply == "lost":
        warnings.warn("mira: reply: lost replays a defect of the public code; it is no way to train", stacklevel=2)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        some, strength = graph, coupling
        notes: dict[str, float] = {}
        tables: Mapping[str, Tensor] = {}
        if learned is not None:
            server = (state.adapters, state.shared, state.tables)
            some, tables, notes = learned.look(*server, ids, returned.rows, clock.round)
        assert some is not None
        near = restrict(some, ids)
        if explicit and (learned is not None or frozenset(ids.tolist()) not in checked):
            limit = largest_coupling(some, [near])  # nobody could check this subgraph before; it may bear less
            strength = min(coupling, limit / 2 if some.symmetric else limit)
        uploads = state.adapters.take(ids, rows=returned.rows)
        if config.clip is not None:
            near, clipped = shorten(near, uploads, state.adapters, config.clip, products=config.space == "product")
            notes["clipped_percent"] = 100 * clipped
        within, outside = transfer(near, strength, exact=not explicit)
        if config.space == "product":
            rows = mix_products(within, uploads, outside, state.adapters.take(torch.from_numpy(near.neighbours)))
        else:
            stored = state.adapters.rows
            rows = mix_rows(within, returned.rows, outside=outside, stored=stored, neighbours=near.neighbours)
        notes["pull_percent"] = 100 * float((1 - np.diag(within)).mean())
        return Change(ids, rows, tables=tables, notes=notes)

    def pull(ids: Tensor) -> Tensor:
        assert graph is not None
        within, _ = transfer(restrict(graph, ids), coupling, exact=not explicit)
        return torch.from_numpy(1 - np.diag(within))

    def start(adapters: Adapters, clock: Clock) -> State:
        return State(adapters, *learned.begin(adapters)) if learned is not None else State(adapters)

    method = Method(
        name="mira",
        init=start,
        send=own_rows,
        merge=merge,
        serve=serve_own,
        personal=True,
        uses_weights=False,
        accept=None if config.accept is None else config.accept.tolerance,
        needs="each",
        compare="products" if config.space == "product" else "factors",
        graph=graph,
        learned=None if learned is None else lambda state: learned.whole(state.tables),
        pull=None if graph is None else pull,
    )
    if config.reply == "lost":
        return replace(method, begin=from_own_upload, finish=keep_upload, private=own_start)
    return method


def given_graph(wanted: GraphConfig, cohort: Cohort) -> Graph:
    """Make a graph that is known before training."""
    if wanted.kind == "knn":
        column = wanted.column if wanted.features == "histogram" else None
        note = f"{wanted.degree} nearest by {f'the values of {column}' if column else 'embeddings of prompts'}"
        found = knn_graph(cohort.profile(column), measure=wanted.measure, degree=wanted.degree, note=note)
    else:
        found = make_graph(
            wanted.kind,
            ids=cohort.ids,
            columns=cohort.columns,
            column=wanted.column,
            path=wanted.path,
            seed=cohort.seed if wanted.seed is None else wanted.seed,
        )
    return shuffled(found, cohort.seed) if wanted.shuffled else found


def learn_graph(config: Config, cohort: Cohort) -> LearnedGraph:
    """What is to be learned, as a value; nothing is known yet."""
    wanted = config.graph
    return LearnedGraph(
        of=wanted.of,
        measure=wanted.measure,
        by_module=wanted.scope == "layer",
        every=wanted.every,
        degree=wanted.degree,
        size=wanted.sketch,
        products=config.space == "product",
        stored=config.neighbours == "stored",
        shuffled=wanted.shuffled,
        seed=cohort.seed,
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
            f"clients swing apart; lower lambda{'' if normalised else ', or use normalise: row'}, or use solver: exact"
        )
    if graph.symmetric and coupling > limit / 2 * (1 + 1e-9):  # at exactly half, neighbours meet in the middle
        warnings.warn(
            f"mira: eta x lambda = {coupling:.4g} is over half of the stable limit {limit:.4g}: clients overshoot "
            "their neighbours and come back",
            stacklevel=2,
        )


def transfer(near: Coupling, coupling: float, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """The step as weights of rows [S, S] and [S, N]: W_S <- within V_S + outside W_N; rows of both sum to 1 together.

    explicit: I - c L_SS and c A~_SN (equation 8); exact: (I + c L_SS)^-1 and c (I + c L_SS)^-1 A~_SN.
    """
    laplacian = np.diag(near.degree) - near.within
    if not exact:
        return np.eye(len(laplacian)) - coupling * laplacian, coupling * near.outside
    inverse = np.linalg.inv(np.eye(len(laplacian)) + coupling * laplacian)
    return inverse, coupling * inverse @ near.outside


def shorten(
    near: Coupling, uploads: Adapters, stored: Adapters, tau: float, *, products: bool
) -> tuple[Coupling, float]:
    """Weigh each neighbour by min(1, tau / ||w_k - w_l||), so that its pull is at most a_kl tau; and the share so cut.

    The norm is that of the difference of rows, taken directly, or of the updates s B A with `products`.
    """
    within, outside = near.within.copy(), near.outside.copy()
    apart: Callable[[Adapters, Adapters], float] = product_distance if products else row_distance
    cut = total = 0
    for k in range(len(near.ids)):
        own = uploads.take(torch.tensor([k]))
        for weights, others, ids in ((within, uploads, None), (outside, stored, near.neighbours)):
            for place in np.flatnonzero(weights[k]).tolist():
                other = others.take(torch.tensor([place if ids is None else int(ids[place])]))
                length = apart(own, other)
                total += 1
                if length > tau:
                    weights[k, place] *= tau / length
                    cut += 1
    return Coupling(near.ids, within, near.neighbours, outside), cut / max(1, total)


def row_distance(one: Adapters, other: Adapters) -> float:
    return float(torch.linalg.vector_norm(one.rows - other.rows, dtype=torch.float64))


def product_distance(one: Adapters, other: Adapters) -> float:
    """||s B A - s' B' A'|| over all modules: the norm of [s B, -s' B'] [A; A'] through its small Gram matrices."""
    total = 0.0
    for part in one.layout.parts:
        for place, (first, second) in enumerate(part.pairs()):
            signed = ((one, one.scale_of(place)), (other, -other.scale_of(place)))
            left = torch.cat([scale * side.leaf(second)[0].double() for side, scale in signed], dim=1)
            right = torch.cat([one.leaf(first)[0].double(), other.leaf(first)[0].double()])
            total += float(((left.T @ left) * (right @ right.T)).sum())
    return max(total, 0.0) ** 0.5


def own_start(adapters: Adapters) -> Memory:
    """What a client starts from where no reply reaches it: the common start, as it was first sent."""
    return {"upload": adapters.rows.clone()}


def from_own_upload(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    """Begin from what this client uploaded last, whatever the server made of it (the defect)."""
    return adapters.with_rows(memory["upload"].clone()), memory


def keep_upload(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
    return Message(adapters.rows), {**memory, "upload": adapters.rows.clone()}
