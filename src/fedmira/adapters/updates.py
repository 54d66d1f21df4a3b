"""Updates s B A of many clients as rows: their mean, factored again; the same at another scale; cut to each rank.

Letters: S clients, P numbers of a row, r rank, s scale (alpha / r).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedmira.adapters import Adapters, Leaf, Part
from fedmira.adapters.lazy import Tensor, torch
from fedmira.adapters.lowrank import decompose_sum, factors

BATCH = 2**24  # numbers in the stacked factors of one decomposition


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


def rescale_(adapters: Adapters, scale: Tensor) -> Adapters:
    """Give the same updates at another scale: B_k <- B_k s_k / s'_k, in place. scale s': [S] or [1], as in Adapters."""
    if bool((adapters.scale != scale).any()):
        other = replace(adapters, scale=scale.expand_as(adapters.scale))
        for part in adapters.layout.parts:
            for index, (_, second) in enumerate(part.pairs()):
                ratio = adapters.scale_of(index) / other.scale_of(index)  # [S]
                adapters.leaf(second).mul_(ratio[:, None, None])
    return replace(adapters, scale=scale.expand_as(adapters.scale))


def cut_(adapters: Adapters, shared: Adapters) -> Adapters:
    """Cut, in place, copies [S, P] of the shared row [1, P] to the rank of each client, and to its scale.

    B_k = B[:, :r_k] (alpha / r) / (alpha / r_k),   A_k = A[:r_k]
    """
    copies = replace(adapters, scale=shared.scale.expand_as(adapters.scale))
    return rescale_(copies, adapters.scale).mask_()


def update_norms(adapters: Adapters) -> Tensor:
    """Return the Frobenius norm of every client's update over all modules, (sum_m ||s_k B_k A_k||^2)^0.5 [S], float64.

    ||B A||^2 = sum of (B^T B) * (A A^T), r x r each: no d x v matrix is formed.
    """
    total = torch.zeros(len(adapters), dtype=torch.float64)
    for part in adapters.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            a, b = adapters.leaf(first).double(), adapters.leaf(second).double()
            squares = ((b.mT @ b) * (a @ a.mT)).sum(dim=(1, 2))
            total += squares.clamp(min=0) * adapters.scale_of(index).double() ** 2
    return total.sqrt()
