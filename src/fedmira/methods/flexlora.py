"""FlexLoRA: one update for clients of any rank, the mean of their updates, cut to the rank of each client.

    DeltaW = sum_{k in S} p_k (alpha / r_k) B_k A_k     p_k = n_k / sum_{j in S} n_j  (examples)  or  1 / |S|  (uniform)
    U diag(s) V^T = DeltaW                              singular values descending, one decomposition per module
    to a client of rank r:   B = U_r diag(s_r) / (alpha / r),   A = V_r^T

It is the mean of the products, whereas FedAvg multiplies the means of the factors. The server stores it at the largest
rank r of the federation; the cut to a smaller r_k is its first r_k pairs, with B times (alpha / r) / (alpha / r_k).
Everything beyond r is dropped in every round, as in the paper. The decomposition is exact, from the stacked factors
where that is cheaper (adapters/lowrank.py). A client with more rank than the sum gets B = 0 and rows of A orthonormal
to the others for the missing pairs, and continues to learn there.

As in the public code all singular values go into B, and alpha is the same for every rank. `weights: uniform` is ours.

Source: FlexLoRA (arXiv:2402.11505, NeurIPS 2024), section 3.

Checked against the public code (alibaba/FederatedScope, branch FlexLoRA, fed_utils/model_aggregation.py and
adaptive_peft.py): weights by examples, alpha / r on each product, all singular values in B and divided by alpha / r.
"""

from __future__ import annotations

from typing import Literal

from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.updates import mean_update
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State
from fedmira.methods.means import at_own_ranks, replace_shared, send_cut, shares_of


class Config(Settings):
    """Settings of FlexLoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # examples: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return FlexLoRA as a Method."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        uploads = at_own_ranks(returned.rows, ids, state, cohort)
        return replace_shared(mean_update(uploads, shares_of(weights, config.weights), row))

    return Method(
        "flexlora",
        merge,
        send=send_cut(cohort),
        facts=Facts(needs="each", weighs=config.weights == "examples", compare="products"),
    )
