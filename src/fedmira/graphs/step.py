"""The graph-Laplacian step of one round: which clients pull which, how far, and up to which coupling it is stable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedmira.adapters import Adapters, Stored
from fedmira.adapters.lazy import Tensor, np, sparse, torch
from fedmira.adapters.lowrank import mix_products
from fedmira.adapters.mixing import mix_rows
from fedmira.errors import MethodError
from fedmira.graphs.graph import Array, Graph

_DENSE = 1024  # subgraphs up to this size get exact dense eigenvalues


def normalise(weights: Array, kind: str, *, columns: Array | None = None) -> Array:
    """Return A~ of dense similarities [S, N]; a client without neighbours keeps a row of zeros.

    columns: degrees of the column clients [N], needed by "symmetric" where the rows are only some of the clients.
    """
    if kind == "none":
        return weights
    degrees = weights.sum(axis=1)
    if kind == "row":
        return weights * _inverse(degrees)[:, None]
    return weights * _inverse(np.sqrt(degrees))[:, None] * _inverse(np.sqrt(degrees if columns is None else columns))


def _inverse(values: Array) -> Array:
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def laplacian(weights: Array, degree: Array | None = None) -> Array:
    """L = diag(degree) - A~ of normalised similarities [S, S]; degree: A~ 1 if None."""
    return np.diag(weights.sum(axis=1) if degree is None else degree) - weights


class Coupling(NamedTuple):
    """The pull of one round: A~ is within [S, S] and outside [S, N]; neighbours [N]: stored clients joined to ids."""

    ids: Array
    within: Array
    neighbours: Array
    outside: Array

    @property
    def degree(self) -> Array:
        """A~ 1 [S]: c x degree is the fraction by which a client moves towards its neighbours' mean."""
        return self.within.sum(axis=1) + self.outside.sum(axis=1)

    @property
    def laplacian(self) -> Array:
        """L_SS = diag(A~ 1) - A~_SS, the operator that the round applies to the sampled clients."""
        return laplacian(self.within, self.degree)


def couple(graph: Graph, ids: Array, *, kind: str, stored: bool) -> Coupling:
    """Restrict the graph to a round, then normalise: among the sampled clients only, or with all stored neighbours.

    stored=False: A~ on ids x ids. stored=True: rows of ids against all their neighbours, normalised together.
    """
    if not stored:
        return Coupling(ids, normalise(graph.subgraph(ids), kind), np.empty(0, dtype=np.int64), np.empty((len(ids), 0)))
    others = graph.neighbours(ids)
    everyone = np.concatenate([ids, others])
    size = len(ids)
    degrees = graph.degrees(everyone) if kind == "symmetric" else None
    whole = normalise(graph.subgraph(ids, everyone), kind, columns=degrees)
    return Coupling(ids, whole[:, :size], others, whole[:, size:])


def weigh_known(graph: Graph, ids: Array, known: Array, *, kind: str) -> Array:
    """Return A~ [S, K] of clients `ids` to all, normalised over those that are known; 0 where one of two is not.

    known: bool [K]. A row depends on who is known, and not on the other clients of `ids`.
    """
    near = graph.subgraph(ids, np.arange(graph.clients)) * known * known[ids, None]
    degrees = np.zeros(graph.clients)
    if kind == "symmetric" and known.any():
        degrees[known] = graph.degrees(np.flatnonzero(known))
    return normalise(near, kind, columns=degrees)


def couple_known(graph: Graph, ids: Array, known: Array, *, kind: str) -> Coupling:
    """Restrict the graph to a step that clients `ids` take at the same time, among all that are known (bool [K])."""
    weights, others = weigh_known(graph, ids, known, kind=kind), np.setdiff1d(np.flatnonzero(known), ids)
    return Coupling(ids, weights[:, ids], others, weights[:, others])


def largest_eigenvalue(coupling: Coupling) -> float:
    """The largest eigenvalue of L_SS.

    Row normalisation is similar to a symmetric matrix where A is symmetric, so eigenvalues are real there; elsewhere
    the largest modulus is returned.
    """
    operator = coupling.laplacian
    if len(operator) > _DENSE and np.allclose(operator, operator.T):
        from scipy.sparse.linalg import eigsh

        return float(eigsh(sparse.csr_array(operator), k=1, return_eigenvectors=False)[0])
    if np.array_equal(operator, operator.T):
        return float(np.linalg.eigvalsh(operator)[-1])
    return float(np.abs(np.linalg.eigvals(operator)).max())


def largest_coupling(graph: Graph, couplings: Sequence[Coupling]) -> float:
    """The coupling c below which every round of the schedule contracts.

    Symmetric graphs: c x lambda_max(L_SS) < 2 over all rounds. Asymmetric graphs: c x max row sum <= 1, so that a round
    stays a weighted mean. Infinite when no round joins anybody.
    """
    if graph.symmetric:
        worst = max((largest_eigenvalue(coupling) for coupling in couplings), default=0.0)
        return 2 / worst if worst > 0 else float("inf")
    worst = max((float(coupling.degree.max(initial=0.0)) for coupling in couplings), default=0.0)
    return 1 / worst if worst > 0 else float("inf")


def stable_coupling(coupling: float, graph: Graph, near: Coupling) -> float:
    """Lower a coupling so that no client of this round overshoots: to half of the stable limit if A is symmetric."""
    limit = largest_coupling(graph, [near])
    return min(coupling, limit / 2 if graph.symmetric else limit)


def check_stable(coupling: float, graph: Graph, rounds: Sequence[Coupling], *, normalised: bool, method: str) -> None:
    """Refuse a coupling that makes clients diverge in a round; warn where they overshoot their neighbours.

    Symmetric graphs: eta lambda lambda_max(L) < 2. Asymmetric graphs: eta lambda max_k degree_k <= 1.
    """
    limit = largest_coupling(graph, rounds)
    if coupling > 0 and (coupling >= limit if graph.symmetric else coupling > limit):
        why = "2 / largest Laplacian eigenvalue" if graph.symmetric else "1 / largest row sum of an asymmetric graph"
        raise MethodError(
            f"{method}: eta x lambda = {coupling:.4g} must be below {limit:.4g} for this graph and schedule ({why}), "
            "else clients swing apart; "
            f"lower lambda{'' if normalised else ', or use normalise: row'}, or use solver: exact"
        )
    if graph.symmetric and coupling > limit / 2 * (1 + 1e-9):  # at exactly half, neighbours meet in the middle
        warnings.warn(
            f"{method}: eta x lambda = {coupling:.4g} is over half of the stable limit {limit:.4g}: clients overshoot "
            "their neighbours and come back",
            stacklevel=2,
        )


def transfer(near: Coupling, coupling: float, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """The step as weights of rows [S, S] and [S, N]: W_S <- within V_S + outside W_N; rows of both sum to 1 together.

    explicit: I - c L_SS and c A~_SN (equation 8); exact: (I + c L_SS)^-1 and c (I + c L_SS)^-1 A~_SN. A client without
    neighbours has the weight 1 of its row and 0 of all others, exactly.
    """
    if not exact:
        return np.eye(len(near.within)) - coupling * near.laplacian, coupling * near.outside
    inverse = _invert(near, coupling)
    return inverse, coupling * inverse @ near.outside


def extend(graph: Graph, stored: Stored, ids: Array, known: Array, *, products: bool) -> Tensor:
    """Rows [n, P] of clients `ids` [n] that the others are to predict: w_k = sum_l a_kl w_l / sum_l a_kl, l in known.

    The harmonic extension: with all others held, it minimises the regulariser sum a_kl |w_k - w_l|^2 (Zhu, Ghahramani
    and Lafferty 2003, equation 2). products: of the updates s B A. Without a neighbour in known [m] a row stays.
    """
    near = np.intersect1d(graph.neighbours(ids), known)
    shares = normalise(graph.subgraph(ids, near), "row")
    own = stored.take(torch.from_numpy(ids))
    alone = np.diag((shares.sum(axis=1) == 0).astype(np.float64))
    if products:
        return mix_products(alone, own, shares, stored.take(torch.from_numpy(near)))
    return mix_rows(alone, own.rows, outside=shares, stored=stored.rows, neighbours=near)


def _invert(near: Coupling, coupling: float) -> np.ndarray:
    """(I + c L_SS)^-1, inverted apart for each connected part of the round's graph.

    As a whole it would have weights of 1e-20 where there is no path, and a client far from everybody would be mixed.
    """
    from scipy.sparse.csgraph import connected_components

    operator = np.eye(len(near.within)) + coupling * near.laplacian
    joined = near.within != 0
    inverse = np.zeros_like(operator)
    _, parts = connected_components(sparse.csr_array(joined), directed=False)
    for part in np.flatnonzero(np.bincount(parts) > 1):
        members = np.flatnonzero(parts == part)
        block = np.ix_(members, members)
        inverse[block] = np.linalg.inv(operator[block])
    alone = np.flatnonzero(~joined.any(axis=1))  # in an asymmetric graph others may still take from it
    inverse[alone] = 0.0
    inverse[alone, alone] = 1 / operator[alone, alone]
    return inverse


def shorten(near: Coupling, uploads: Adapters, stored: Stored, tau: float, *, products: bool) -> tuple[Coupling, float]:
    """Scale each weight by min(1, tau / ||w_k - w_l||), so that a pull is at most a_kl tau; and the share shortened.

    The norm is that of the difference of rows, computed directly, or of the updates s B A with `products`.
    """
    within, outside = near.within.copy(), near.outside.copy()
    distance: Callable[[Adapters, Adapters], float] = product_distance if products else row_distance
    cut = total = 0
    for k in range(len(near.ids)):
        upload = uploads.take(torch.tensor([k]))
        for weights, others, ids in ((within, uploads, None), (outside, stored, near.neighbours)):
            for column in np.flatnonzero(weights[k]).tolist():
                neighbour = others.take(torch.tensor([column if ids is None else int(ids[column])]))
                length = distance(upload, neighbour)
                total += 1
                if length > tau:
                    weights[k, column] *= tau / length
                    cut += 1
    return Coupling(near.ids, within, near.neighbours, outside), cut / max(1, total)


def row_distance(first: Adapters, second: Adapters) -> float:
    return float(torch.linalg.vector_norm(first.rows - second.rows, dtype=torch.float64))


def product_distance(first: Adapters, second: Adapters) -> float:
    """||s B A - s' B' A'|| over all modules: the norm of [s B, -s' B'] [A; A'] through its small Gram matrices."""
    total = 0.0
    for part in first.layout.parts:
        for index, (a, b) in enumerate(part.pairs()):
            signed = ((first, first.scale_of(index)), (second, -second.scale_of(index)))
            left = torch.cat([scale * side.leaf(b)[0].double() for side, scale in signed], dim=1)
            right = torch.cat([first.leaf(a)[0].double(), second.leaf(a)[0].double()])
            total += float(((left.T @ left) * (right @ right.T)).sum())
    return max(total, 0.0) ** 0.5
