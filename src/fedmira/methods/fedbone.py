"""FedBone: one part shared, one private; the server projects conflicting updates off each other before their mean.

    y = W x + s B_k A_k x + s B A x            private part k, shared part w = (B, A)
    d_k = u_k - w                              u_k: what client k returned of the shared part, w: as it was sent
    c_k = exp(a cos(d_k, h)) / sum_j p_j exp(a cos(d_j, h))       h: what the last round added to w; a: `attention`
    g_k = d_k, then for all other clients j in random order:      g_k = g_k - min(0, g_k . d_j) / ||d_j||^2 d_j
    server:  h = sum_k p_k c_k g_k,   w = w + h,   p_k = 1 / |S|   (uniform)   or n_k / sum_{j in S} n_j   (examples)

Two updates conflict if their inner product is negative; each then loses its component along the other. Without conflict
and with a = 0 it is FedAvg of the shared part; two exactly opposite updates leave that part as it is. With attention,
updates that point where the last round went count more, at a = 1 by a factor of e^2 at most. It changes lengths alone,
so it does not matter whether it comes before or after the projections. In the first round h = 0 and all c_k = 1.

The result depends on the order of the projections. Each client has a separate order, drawn from the run's seed and the
round over the clients sorted by id, so that it does not matter how clients are listed or who answers first. With
`weights: examples` a client without examples is in no projection. `conflict_percent` in the record of a round is the
share of pairs in conflict.

Where ranks differ, w is cut to each client's rank, and a client's update is 0 in the pairs that it does not have.
`by: module` applies all this to each module by itself, attention included. `private: false` leaves the private part
out: the projection alone, with one adapter for all.

In the paper the shared part is a general model that only the server has: clients send it embeddings, keep their task
heads, and the server has gradients. Here a round's update is used instead of a gradient, and a private adapter on the
same modules instead of a head; both parts take the steps of the client's loss together, as in PFTT.

Sources: FedBone, Chen et al. 2023 (arXiv:2306.17465), GPAggregation; the projection is that of PCGrad, Yu et al. 2020
(arXiv:2001.06782).

Checked against an implementation by others (gabriel1ns/FedBone-clustered-robotics, federated/gp_aggregation.py: cosines
to the last aggregate, softmax over clients times their number, projections off the others' unprojected updates over all
numbers together, in the clients' order, a mean by examples; with its order and equal weights the results are the same),
others' notes on the paper's formulas (conflict, projection, attention before it), the abstract, and PCGrad's authors'
code (tianheyu927/PCGrad, PCGrad_tf.py: the projection, over all variables together). Neither the paper's text nor code
of its authors was at hand: the form of attention is that implementation's, the random order is from memory PCGrad's,
and the weights of the mean are open.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedmira.adapters import Layout, Stored
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.adapters.parts import SHARED, own_and_shared, part_columns
from fedmira.adapters.updates import rescale_
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State, all_columns
from fedmira.methods.means import at_own_ranks, has_mixed_ranks, send_cut, shares_of

STREAM = 0x466564426F6E65  # of the orders, apart from what else is drawn from the run's seed


class Config(Settings):
    """Settings of FedBone."""

    private: bool = True  # does each client have a private adapter beside the shared one? false: one adapter for all
    attention: float = Field(default=1.0, ge=0)  # a: weight of updates that point where the last round went; 0 = none
    by: Literal["adapter", "module"] = "adapter"  # what conflicts: whole updates (others' code), or each module's
    weights: Literal["uniform", "examples"] = "uniform"  # of the mean; the paper's are not known


def build(config: Config, cohort: Cohort) -> Method:
    """Return FedBone as a Method."""
    mixed = has_mixed_ranks(cohort)

    def init(start: Stored, clock: Clock) -> State:
        return State(start, {"h": torch.zeros(1, start.layout.size, dtype=start.rows.dtype)})

    def travels(layout: Layout, clock: Clock) -> Tensor:
        return part_columns(layout, SHARED)

    def updates_of(rows: Tensor, ids: Tensor, state: State) -> Tensor:
        """d_k [n, P] of rows as they came, at the scale of the shared row and 0 beyond each client's rank."""
        uploads = at_own_ranks(rows, ids, state, cohort)
        if mixed:
            uploads = rescale_(uploads.with_rows(rows.clone()), state.adapters.scale[:1])
        return uploads.with_rows(uploads.rows - state.adapters.rows[torch.zeros(1, dtype=torch.int64)]).mask_().rows

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        shares = shares_of(weights, config.weights)
        present = (shares > 0).nonzero().flatten().tolist()
        order = torch.tensor(sorted(present, key=lambda place: cohort.ids[int(ids[place])]))
        updates, shares = updates_of(returned.rows[order], ids[order], state), shares[order].double()
        spans = module_spans(state.adapters.layout)
        products = inner_products(torch.cat([updates, state.shared["h"]]), spans)  # [M, n + 1, n + 1]
        if config.by == "adapter":
            products = products.sum(dim=0, keepdim=True)
        among, conflicts = products[:, :-1, :-1], products[:, :-1, :-1] < 0
        stream = np.random.default_rng([cohort.seed, clock.round, STREAM])
        orders = torch.from_numpy(stream.permuted(np.tile(np.arange(len(order)), (len(order), 1)), axis=1))
        counts = (attend(products, shares, config.attention)[:, None] @ project(among, orders))[:, 0]  # [M, n]
        h = torch.zeros_like(state.shared["h"])
        for span, count in zip(spans, counts.expand(len(spans), -1), strict=True):
            h[0, span] = count.to(h.dtype) @ updates[:, span]
        pairs = max(1, len(conflicts) * len(order) * (len(order) - 1))
        first = torch.zeros(1, dtype=torch.int64)
        notes = {"conflict_percent": 100 * float(conflicts.sum()) / pairs}
        return Change(first, state.adapters.rows[first] + h, {"h": h}, notes=notes)

    return Method(
        "fedbone",
        merge,
        init=init,
        send=send_cut(cohort),
        layout=own_and_shared if config.private else None,
        travels=travels if config.private else all_columns,
        facts=Facts(needs="each", weighs=config.weights == "examples"),
    )


def module_spans(layout: Layout) -> list[slice]:
    """Columns of each module of the part that is shared, the last one: its A and B, which are side by side."""
    return [slice(first.start, second.stop) for first, second in layout.parts[-1].pairs()]


def inner_products(rows: Tensor, spans: list[slice]) -> Tensor:
    """Return the inner products of rows [n, P] with each other in each span, [M, n, n] in float64."""
    blocks = (rows[:, span].double() for span in spans)
    return torch.stack([block @ block.T for block in blocks])


def attend(products: Tensor, shares: Tensor, attention: float) -> Tensor:
    """Return p_k c_k [M, n] from the products [M, n + 1, n + 1] of updates and, last, h; shares p [n]. It sums to 1."""
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    cosines = products[:, :-1, -1] / (lengths[:, :-1] * lengths[:, -1:])
    weighed = shares * torch.exp(attention * cosines.nan_to_num(nan=0.0))
    return weighed / weighed.sum(dim=1, keepdim=True)


def project(products: Tensor, orders: Tensor) -> Tensor:
    """Return C [M, n, n] with g_k = sum_j C_kj d_j, for all k and modules at once.

    products [M, n, n]: d_k . d_j; orders [n, n]: row k has the clients that k meets, itself too, one after another.
    """
    clients = torch.arange(len(orders))
    combined = torch.eye(len(orders), dtype=products.dtype).repeat(len(products), 1, 1)
    squares = products.diagonal(dim1=1, dim2=2)  # [M, n]
    for others in orders.T:  # [n]
        inner = (combined * products[:, others]).sum(dim=2)  # g_k . d_j [M, n]
        against = (inner < 0) & (others != clients)
        combined[:, clients, others] -= torch.where(against, inner / squares[:, others], 0.0)
    return combined
