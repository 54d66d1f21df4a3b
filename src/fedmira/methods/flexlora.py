"""FlexLoRA: one update for clients of any rank, the mean of what they learned, cut to each one's own rank.

    DeltaW = sum_{k in S} p_k (alpha / r_k) B_k A_k     p_k = n_k / sum_{j in S} n_j  (examples)  or  1 / |S|  (uniform)
    U diag(s) V^T = DeltaW                              singular values descending, one decomposition for each module
    to a client of rank r:   B = U_r diag(s_r) / (alpha / r),   A = V_r^T

It is the mean of the products, where FedAvg multiplies the means of the factors. The server keeps it at the largest
rank r of the federation, which holds every smaller one: the first r_k pairs, with B times (alpha / r) / (alpha / r_k),
are the cut to rank r_k. What lies beyond r is dropped in every round, as in the paper. The decomposition is exact, from
the stacked factors where that is cheaper (adapters/lowrank.py). A client with more rank than the sum gets B = 0 and
rows of A orthonormal to the others in what is missing, and goes on learning there.

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
from fedmira.methods.base import (
    Change,
    Clock,
    Cohort,
    Facts,
    Message,
    Method,
    Settings,
    State,
    replace_shared,
    shares_of,
)

BATCH = 2**24  # numbers of stacked factors that are decomposed at once


class Config(Settings):
    """Settings of FlexLoRA."""

    weights: Literal["examples", "uniform"] = "examples"  # examples: the paper


def build(config: Config, cohort: Cohort) -> Method:
    """Return FlexLoRA as a Method."""

    def of_clients(rows: Tensor, ids: Tensor, state: State) -> Adapters:
        """Rows [S, P] as adapters of the clients `ids` [S], with their own ranks and scale."""
        shared = state.adapters
        if cohort.ranks is None or cohort.scale is None:
            alike = torch.zeros_like(ids)
            return Adapters(shared.layout, rows, shared.ranks[alike], shared.scale[alike])
        return Adapters(shared.layout, rows, cohort.ranks[ids], cohort.scale[ids])

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        return Message(cut_(of_clients(row.rows.repeat(len(ids), 1), ids, state), row).rows)

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        row = state.adapters.take(torch.zeros(1, dtype=torch.int64))
        uploads = of_clients(returned.rows, ids, state)
        return replace_shared(mean_update(uploads, shares_of(weights, config.weights), row))

    mixed = cohort.ranks is not None and bool((cohort.ranks != cohort.ranks[:1]).any())
    return Method(
        "flexlora",
        merge,
        send=send if mixed else None,
        facts=Facts(needs="each", weighs=config.weights == "examples", compare="products"),
    )


def mean_update(uploads: Adapters, weights: Tensor, shared: Adapters) -> Tensor:
    """Return the row [1, P] whose updates are sum_k w_k s_k B_k A_k, each cut to the rank its module has room for.

    uploads [S]; weights [S], of sum 1; shared [1]: what the row takes the place of, for its scale.
    """
    row = torch.zeros_like(shared.rows)
    for part in uploads.layout.parts:
        for ranks, modules in _batches(part, uploads):
            place, first, _ = modules[0]
            found = decompose_sum(
                [torch.stack([uploads.leaf(b)[k, :, :r] for _, _, b in modules]) for k, r in enumerate(ranks)],
                [torch.stack([uploads.leaf(a)[k, :r] for _, a, _ in modules]) for k, r in enumerate(ranks)],
                weights * uploads.scale_of(place),
            )
            left, right = factors(found, first.shape[0], float(shared.scale_of(place)[0]), dtype=row.dtype)
            for (_, a, b), own_b, own_a in zip(modules, left, right, strict=True):
                row[0, a.start : a.stop] = own_a.flatten()
                row[0, b.start : b.stop] = own_b.flatten()
    return row


def _batches(part: Part, uploads: Adapters) -> Iterator[tuple[tuple[int, ...], list[tuple[int, Leaf, Leaf]]]]:
    """Yield modules of equal shape in which every client has the same rank, and these ranks [S]; each with its place.

    They are decomposed together while the sum of ranks is below the width of the module: beyond, the dense sum is made.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[int, Leaf, Leaf]]] = {}
    for place, (first, second) in enumerate(part.pairs()):
        ranks = tuple(uploads.ranks_of(place).tolist())
        alike.setdefault((first.shape, second.shape, ranks), []).append((place, first, second))
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
            for place, (_, second) in enumerate(part.pairs()):
                ratio = shared.scale_of(place) / adapters.scale_of(place)  # [S]
                adapters.leaf(second).mul_(ratio[:, None, None])
    return adapters.mask_()
