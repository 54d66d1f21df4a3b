"""dFedU: MIRA without a server that computes; clients get their graph neighbours' rows and take the step themselves.

    local:    v_k after R local steps from w_k; k sends it to its neighbours, and to nobody else
    client k: w_k = v_k - eta lambda sum_{l in N_k} a_kl (v_k - v_l)        v_l: the newest row that l has sent

Each local phase is followed by one step, which a client takes when it fetches its neighbours' rows: before its next
local phase, and once more after the last round. Until then it uses v_k, whose validation losses are recorded. A
neighbour that has sent nothing yet is left out; a client that has not trained yet, also one that joins later, takes no
step and starts from the common start. a_kl > 0 is an edge on which l sends to k.

With everybody in every round, uploads and final adapters are those of MIRA, for any graph and normalisation; on a
complete graph with a_kl = 1 and eta lambda = 1 / K everybody gets the mean. With fewer clients in a round this still
holds if each connected part of the graph is in a round as a whole or not at all. Otherwise MIRA pulls a client to the
uploads of its own round (or also to stored rows, after their own step), and dFedU to the newest rows as they were sent.

"No server sees all" means: rows go along edges only, a client is not sent its own row but keeps it, and the server is a
relay, which stores the newest row of each client, forwards it, and computes nothing from it. The fraction that it sends
with a row, eta lambda a_kl, follows from the graph. But rows are not encrypted between clients, so this relay could
read them (docs/limits.md), and a client sees the adapter of each of its neighbours.

Down travels a row for each edge: on a complete graph of 1,000 clients, 999 rows to each. `--dry-run` counts them. The
messages to S clients take S times as many rows of memory as the one with most neighbours has. Clients keep their row.

eta lambda is limited as in MIRA: the step has to contract in each round of the schedule. Where others have trained than
was planned, no client moves further than to the mean of its neighbours. A learned graph is refused: a server would have
to compare adapters. `normalise` row and symmetric are ours, over the neighbours that have sent a row.

Source: FedU and dFedU (arXiv:2102.07148; IEEE TNNLS 35(6), 2024), Dinh et al., whose step MIRA has (arXiv:2410.15524).

Checked against MIRA here (trajectories) and the authors' code (CharlieDinh/FedU_FMTL, users/userFedU.py): there a user
takes the step itself, from the models of all users of the round, one user after another, by lr L_k beta local_epochs /
2 instead of eta lambda. It has no messages and no separate dFedU. The abstract says that dFedU is the decentralised
scheme; the paper's text was not at hand.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmira.adapters import Adapters, Stored
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.graphs.graph import Array
from fedmira.graphs.settings import GraphConfig
from fedmira.graphs.step import check_stable, couple_known, weigh_known
from fedmira.methods.base import (
    Change,
    Client,
    Clock,
    Cohort,
    Facts,
    Memory,
    Message,
    Method,
    Regime,
    Settings,
    State,
    Tools,
)
from fedmira.methods.choosing import graph_of

TUNED = {"lambda": (0.1, 0.3, 0.6)}  # what `fedmira compare` tries


class Config(Settings):
    """Settings of dFedU; they mean what they mean in MIRA."""

    eta: float = Field(default=1.0, ge=0)  # learning rate of the step, not of local training
    lam: float = Field(default=0.1, ge=0, alias="lambda")  # of the regulariser; 0 = local training, no row is forwarded
    normalise: Literal["none", "row", "symmetric"] = "row"  # none: the paper's form
    graph: GraphConfig = GraphConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.graph.kind == "learned":
            raise ValueError(
                "graph kind 'learned' needs a server that compares adapters, and dfedu's only forwards them; use "
                "random, uniform, groups, file or knn, or method mira"
            )
        return self


def build(config: Config, cohort: Cohort) -> Method:
    """Return dFedU as a Method.

    Raises MethodError if eta x lambda is unstable on a round of the schedule (with the largest allowed value), or if
    the graph cannot be made from this cohort.
    """
    coupling, graph, last = config.eta * config.lam, graph_of(config.graph, cohort), len(cohort.schedule)
    planned = np.zeros((last + 1, len(cohort)), dtype=bool)  # who has trained before each round, and at the end
    for number, ids in enumerate(cohort.schedule, 1):
        planned[number:, ids] = True
    steps = [(ids[met[ids]], met) for ids, met in zip(cohort.schedule, planned[:last], strict=True)]
    if config.normalise != "row" or coupling > 1:  # else the step after the last round is to a weighted mean
        steps.append((np.flatnonzero(planned[last]), planned[last]))
    distinct = {(ids.tobytes(), met.tobytes()): (ids, met) for ids, met in steps if len(ids)}
    rounds = [couple_known(graph, ids, met, kind=config.normalise) for ids, met in distinct.values()]
    check_stable(coupling, graph, rounds, normalised=config.normalise != "none", method="dfedu")

    def fractions(state: State, ids: Tensor, clock: Clock) -> Array:
        """By how much each of `ids` is to move towards every client's row [S, K]; 0 where there is no edge."""
        trained = state.tables["trained"].numpy()
        found = coupling * weigh_known(graph, ids.numpy(), trained, kind=config.normalise)
        if not np.array_equal(trained, planned[min(clock.round - 1, last)]):  # was not checked before the run
            found /= np.maximum(1, found.sum(axis=1, keepdims=True))
        return found

    def init(start: Stored, clock: Clock) -> State:
        return State(start, tables={"trained": torch.zeros(len(start), dtype=torch.bool)})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        found, table = fractions(state, ids, clock), state.adapters.rows
        senders = np.argsort(found == 0, axis=1, kind="stable")  # neighbours first, in the order of clients
        scalars, more, absent = {}, {}, {"rows": torch.ones(len(ids), dtype=torch.bool)}
        for place in range(int((found > 0).sum(axis=1).max(initial=0))):
            name, sender = f"neighbour_{place}", senders[:, place]
            scalars[name] = torch.from_numpy(found[np.arange(len(ids)), sender])
            absent[name] = scalars[name] == 0
            more[name] = table[torch.from_numpy(sender)].masked_fill_(absent[name][:, None], 0)
        return Message(table[ids], scalars, more, absent=absent)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        pull = 100 * float(fractions(state, ids, clock).sum(axis=1).mean())  # of the step before this local phase
        trained = torch.ones(len(ids), dtype=torch.bool)
        return Change(ids, returned.rows, tables={"trained": trained}, notes={"pull_percent": pull})

    def rows_down(ids: Tensor) -> Tensor:
        weights = weigh_known(graph, ids.numpy(), planned[last], kind="none")
        return torch.from_numpy((coupling * weights > 0).sum(axis=1))

    return Method(
        "dfedu",
        merge,
        rows_of="each",
        init=init,
        send=send,
        client=Client(begin=step_to_neighbours),
        regime=Regime(tune=("steps", 0)),
        facts=Facts(needs="relay", graph=graph, rows_down=rows_down, uploads="more"),
    )


def step_to_neighbours(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    """Take the Laplacian step from a client's own row, with the fractions that came with its neighbours' rows."""
    own = adapters.rows
    rows = own.clone()
    for name, other in given.more.items():
        rows -= given.scalars[name].to(own)[:, None] * (own - other)  # 0 where it is absent
    return adapters.with_rows(rows), memory
