"""raFLoRA: FlexLoRA, but each pair of factors is averaged over the clients whose rank reaches it.

    DeltaW = sum_i sum_{k in S: r_k >= i} p_ki (alpha / r_k) b_ki a_ki^T       p_ki = n_k / sum_{j in S: r_j >= i} n_j
    U diag(s) V^T = DeltaW                              singular values descending, one decomposition per module
    to a client of rank r:   B = U_r diag(s_r) / (alpha / r),   A = V_r^T

b_ki and a_ki are the i-th column of B_k and the i-th row of A_k, i from 1. FlexLoRA divides every pair by the examples
of all clients: in each round what is beyond the lowest rank shrinks to the share of those who can hold it (rank
collapse). The paper averages partitions, from one rank of the federation to the next; within one of them the same
clients have all pairs, so that these sums are the same. With one rank for all it is FlexLoRA, bit for bit. As there,
singular values go into B, alpha is the same for every rank, and what is beyond r is dropped.

Where no client of a round has a pair the formula has nothing for it: with `missing: kept`, which is ours, the server's
own pair stays in the sum; with `dropped` it is lost until somebody learns it anew. It matters with few clients of high
rank and partial participation.

Source: raFLoRA (arXiv:2602.13486), Wu, Hu, Min and Wang 2026.

Checked against the abstract (partitions by rank, each weighted by the clients that contribute to it). The formula is
that of a third party's code, which cites the paper's Algorithm 1 and equation 8; the paper's text was out of reach, and
no code of the authors' was found. That code splits singular values between both factors, and drops what is missing.
"""

from __future__ import annotations

from typing import Literal

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.updates import mean_update
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State
from fedmira.methods.means import at_own_ranks, has_mixed_ranks, replace_shared, send_cut, shares_of


class Config(Settings):
    """Settings of raFLoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # n_k; uniform: 1 for every client
    missing: Literal["kept", "dropped"] = "kept"  # pairs that no client of a round has; dropped: the formula alone


def build(config: Config, cohort: Cohort) -> Method:
    """Return raFLoRA as a Method."""
    mixed = has_mixed_ranks(cohort)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        uploads, shares = at_own_ranks(returned.rows, ids, state, cohort), shares_of(weights, config.weights)
        if mixed:
            uploads = by_pair(uploads, shares, row if config.missing == "kept" else None)
            shares = torch.ones(len(uploads), dtype=shares.dtype)
        return replace_shared(mean_update(uploads, shares, row))

    facts = Facts(needs="each", weighs=config.weights == "examples", compare="products")
    return Method("raflora", merge, send=send_cut(cohort), facts=facts)


def by_pair(uploads: Adapters, shares: Tensor, shared: Adapters | None) -> Adapters:
    """Weigh each pair of the uploads [S] by its client's share among those that have it, so that their sum is the mean.

    shares [S], of sum 1. shared [1]: what stands in for a pair that nobody has, as one upload more; None: nothing.
    """
    weighed = uploads.with_rows(uploads.rows.clone())
    rest = None if shared is None else shared.with_rows(shared.rows.clone())
    lacking = False
    for part in uploads.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            place = torch.arange(first.shape[0])
            has = (place < uploads.ranks_of(index)[:, None]) * shares[:, None]  # [S, r]
            total = has.sum(dim=0)
            nobody = total == 0
            lacking = lacking or bool(nobody.any())
            weighed.leaf(second).mul_((has / torch.where(nobody, 1.0, total))[:, None, :].to(weighed.rows))
            if rest is not None:
                rest.leaf(second).mul_(nobody.to(rest.rows))
    if rest is None or not lacking:
        return weighed
    ranks, scale = torch.cat([weighed.ranks, rest.ranks]), torch.cat([weighed.scale, rest.scale])
    return Adapters(weighed.layout, torch.cat([weighed.rows, rest.rows]), ranks, scale)
