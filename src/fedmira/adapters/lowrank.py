"""Sums of low-rank products, factored again without ever forming the d x v matrix.

    sum_k w_k B_k A_k = [w_1 B_1 .. w_n B_n] [A_1; ..; A_n] = B A          B [d, R], A [R, v], R = sum of ranks
    B = Q_B R_B,  A^T = Q_A R_A                                            (QR)
    R_B R_A^T = U S V^T                                                    (R x R)
    sum = (Q_B U) S (Q_A V)^T                                              the singular value decomposition of the sum

The cost is O((d + v) R^2). Where R is not below min(d, v) the QR no longer makes the matrix smaller: the dense sum of
the modules, [d, v] each, is then decomposed, which does not cost more; pass one module at a time.
Letters: d outputs, v inputs, r rank, R sum of ranks.

Source: FlexLoRA (arXiv:2402.11505), the server's redistribution by SVD, section 3; the route through QR is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmira.adapters import Adapters
from fedmira.adapters.lazy import Tensor, np, torch
from fedmira.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Decomposition:
    """left [..., d, n], values [..., n] descending, right [..., n, v]: the sum is left diag(values) right, in float64.

    n = min(R, d, v). Columns of left and rows of right are orthonormal; those beyond the true rank are arbitrary but
    still orthonormal. In each direction the entry of `right` of largest modulus is positive.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def decompose_sum(lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Tensor) -> Decomposition:
    """The singular value decomposition of sum_k w_k B_k A_k.

    lefts: B_k [..., d, r_k]; rights: A_k [..., r_k, v]; weights [n], any sign; leading axes (modules) are a batch.
    Computed in float64 without gradient.
    Raises ShapeError if factors do not fit each other, or there are none.
    """
    _check(lefts, rights, weights)
    with torch.no_grad():
        scaled = [float(weight) * left.double() for weight, left in zip(weights, lefts, strict=True)]
        left, right = torch.cat(scaled, dim=-1), torch.cat([right.double() for right in rights], dim=-2)
        if left.shape[-1] >= min(left.shape[-2], right.shape[-1]):
            u, values, v = torch.linalg.svd(left @ right, full_matrices=False)
        else:
            q_left, r_left = torch.linalg.qr(left)
            q_right, r_right = torch.linalg.qr(right.mT)
            u, values, v = torch.linalg.svd(r_left @ r_right.mT)
            u, v = q_left @ u, v @ q_right.mT
        largest = v.gather(-1, v.abs().argmax(dim=-1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)  # [..., n, 1]
        return Decomposition(u * sign.mT, values, v * sign)


def factors(found: Decomposition, rank: int, scale: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B [..., d, r] and A [..., r, v] with scale x B A = the sum cut to its `rank` largest directions.

    B = U_r diag(S_r) / scale, A = V_r^T. Directions that the sum does not have, by rounding or because rank is over
    the sum of ranks, get B = 0 and rows of A orthonormal to the others, so that they can train; beyond v there is no
    further direction, and the rows of A are 0.
    Raises ShapeError if the rank is below 1 or the scale is not above 0.
    Source: FlexLoRA (arXiv:2402.11505); its public code puts all singular values into B.
    """
    if rank < 1 or not scale > 0:
        raise ShapeError(f"rank {rank} and scale {scale:g}: need rank >= 1 and scale > 0 (alpha / rank)")
    kept_rank = min(rank, found.values.shape[-1])
    values, right = found.values[..., :kept_rank], found.right[..., :kept_rank, :]
    noise = max(found.left.shape[-2], found.right.shape[-1]) * torch.finfo(torch.float64).eps
    real = values > noise * found.values[..., :1]
    left = found.left[..., :kept_rank] * (values * real / scale)[..., None, :]
    missing = rank - kept_rank
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.cat([right, _more_rows(right, missing)], dim=-2)
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()


def mix_products(within: np.ndarray, own: Adapters, outside: np.ndarray, others: Adapters) -> Tensor:
    """Rows [S, P] whose updates are s_k B_k A_k <- sum_l within_kl s_l B_l A_l + sum_l outside_kl s_l B_l A_l.

    within [S, S], outside [S, N]; own [S] and others [N] adapters of one layout. Each sum is cut to its client's rank
    by its singular value decomposition (`factors`), module by module. A client that takes nothing from anybody keeps
    its row as it is.
    """
    rows = own.rows.clone()
    weights = np.concatenate([within, outside], axis=1)
    sides = (own, others) if len(others) else (own,)
    taken = [np.flatnonzero(row) for row in weights]
    moved = [k for k, some in enumerate(taken) if some.tolist() != [k] or weights[k, k] != 1]
    for part in own.layout.parts:
        for index, (first, second) in enumerate(part.pairs()):
            a, b = (torch.cat([side.leaf(leaf) for side in sides]) for leaf in (first, second))
            scales = torch.cat([side.scale_of(index) for side in sides]).double()
            rank, scale = own.ranks_of(index), own.scale_of(index)
            for k in moved:
                sources = torch.from_numpy(taken[k])
                found = decompose_sum(
                    list(b[sources]), list(a[sources]), torch.from_numpy(weights[k, taken[k]]) * scales[sources]
                )
                left, right = factors(found, int(rank[k]), float(scale[k]), dtype=rows.dtype)
                rows[k, first.start : first.stop] = _padded(right, first.shape).flatten()
                rows[k, second.start : second.stop] = _padded(left, second.shape).flatten()
    return rows


def _padded(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fill a factor of a lower rank up with zeros."""
    return torch.nn.functional.pad(factor, (0, shape[1] - factor.shape[1], 0, shape[0] - factor.shape[0]))


def _more_rows(rows: Tensor, count: int) -> Tensor:
    """`count` rows orthonormal to each other and to the orthonormal `rows` [..., n, v]; zeros once v are reached."""
    held, width = rows.shape[-2:]
    new = min(count, width - held)
    if not new:
        return rows.new_zeros(*rows.shape[:-2], count, width)
    stream = torch.Generator().manual_seed(0)  # the same directions for the same shape, on every machine
    draw = (
        torch.randn(new, width, generator=stream, dtype=torch.float64).to(rows.device).expand(*rows.shape[:-2], -1, -1)
    )
    basis, _ = torch.linalg.qr(torch.cat([rows, draw], dim=-2).mT)
    return torch.nn.functional.pad(basis[..., held:].mT, (0, 0, 0, count - new))


def _check(lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Tensor) -> None:
    if not lefts or not len(lefts) == len(rights) == len(weights):
        found = f"{len(lefts)} left factors, {len(rights)} right factors, {len(weights)} weights"
        raise ShapeError(f"{found}: need one of each per client, and at least one client")
    outputs, inputs = lefts[0].shape[-2], rights[0].shape[-1]
    for left, right in zip(lefts, rights, strict=True):
        if left.shape[-1] != right.shape[-2] or (left.shape[-2], right.shape[-1]) != (outputs, inputs):
            raise ShapeError(
                f"factors {tuple(left.shape)} and {tuple(right.shape)} do not make a {outputs} x {inputs} update "
                "as the first client's do: need [.., d, r_k] and [.., r_k, v]"
            )
