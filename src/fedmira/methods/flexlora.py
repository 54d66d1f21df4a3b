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

from collections.abc import Iterator
from typing import Literal

from fedmira.adapters import Adapters, Leaf, Part
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.lowrank import decompose_sum, factors
from fedmira.methods.base import Change, Clock, Cohort, Facts, Message, Method, Settings, State
from fedmira.methods.means import at_own_ranks, has_mixed_ranks, replace_shared, shares_of

BATCH = 2**24  # numbers in the stacked factors of one decomposition


class Config(Settings):
    """Settings of FlexLoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # examples: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return FlexLoRA as a Method."""

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        return Message(cut_(at_own_ranks(row.rows.repeat(len(ids), 1), ids, state, cohort), row).rows)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        uploads = at_own_ranks(returned.rows, ids, state, cohort)
        return replace_shared(mean_update(uploads, shares_of(weights, config.weights), row))

    return Method(
        "flexlora",
        merge,
        send=send if has_mixed_ranks(cohort) else None,
        facts=Facts(needs="each", weighs=config.weights == "examples", compare="products"),
    )


def mean_update(uploads: Adapters, weights: Tensor, shared: Adapters) -> Tensor:
    """Return the row [1, P] whose updates are sum_k w_k s_k B_k A_k, each cut to the rank of its module.

    uploads [S]; weights [S], of sum 1; shared [1]: the row that it replaces, for its scale.
    """
    row = torch.zeros_like(shared.rows)
    for part in uploads.layout.parts:
        for ranks, modules in _batches(part, uploads):
            index, first, _ = modules[0]
            decomposition = decompose_sum(
                [torch.stack([uploads.leaf(b)[k, :, :r] for _, _, b in modules]) for k, r in enumerate(ranks)],
                [torch.stack([uploads.leaf(a)[k, :r] for _, a, _ in modules]) for k, r in enumerate(ranks)],
                weights * uploads.scale_of(index),
            )
            left, right = factors(decomposition, first.shape[0], float(shared.scale_of(index)[0]), dtype=row.dtype)
            for (_, a, b), factor_b, factor_a in zip(modules, left, right, strict=True):
                row[0, a.start : a.stop] = factor_a.flatten()
                row[0, b.start : b.stop] = factor_b.flatten()
    return row


def _batches(part: Part, uploads: Adapters) -> Iterator[tuple[tuple[int, ...], list[tuple[int, Leaf, Leaf]]]]:
    """Yield the ranks [S] of the clients, and modules of one shape in which they have these ranks, each with its index.

    Modules are decomposed together if the sum of ranks is below their width; else the dense sum is formed, one by one.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[int, Leaf, Leaf]]] = {}
    for index, (first, second) in enumerate(part.pairs()):
        ranks = tuple(uploads.ranks_of(index).tolist())
        alike.setdefault((first.shape, second.shape, ranks), []).append((index, first, second))
    for ((_, inputs), (outputs, _), ranks), modules in alike.items():
        total = sum(ranks)
        together = max(1, BATCH // (total * (inputs + outputs))) if total < min(inputs, outputs) else 1
        for start in range(0, len(modules), together):
            yield ranks, modules[start : start + together]


def cut_(adapters: Adapters, shared: Adapters) -> Adapters:
    """Cut, in place, copies [S, P] of the shared row [1, P] to the rank of each client, and to its scale.

    B_k = B[:, :r_k] (alpha / r) / (alpha / r_k),   A_k = A[:r_k]
    """
    if bool((adapters.scale != shared.scale).any()):
        for part in adapters.layout.parts:
            for index, (_, second) in enumerate(part.pairs()):
                ratio = shared.scale_of(index) / adapters.scale_of(index)  # [S]
                adapters.leaf(second).mul_(ratio[:, None, None])
    return adapters.mask_()
