"""Similarity graphs from vectors of the clients: of their data before training, of their adapters during it.

A *profile* is one vector per client; similarities of profiles make a kNN graph. Adapters are too long to be stored for
that: each is summarised by a *sketch* of a few hundred numbers, which is linear in the adapter; products of sketches
equal those of the adapters on average:

    s(x)_j = sum_{i: h(i) = j} e_i x_i,   h(i) in 1..m and e_i = +-1 at random
    E <s(x), s(y)> = <x, y>,   variance <= (|x|^2 |y|^2 + <x, y>^2) / m

    similarity    cosine: max(0, <x, y> / |x| |y|)    distance: exp(-|x - y|^2 / median over pairs of |x - y|^2)

Differences are computed directly, in float64. The sketch is the count sketch of Charikar, Chen and Farach-Colton
(2002), used as a random projection (Weinberger et al. 2009, arXiv:0902.2206).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

from fedmira.adapters import Adapters, Layout, Stored
from fedmira.adapters.lazy import Tensor, np, sparse, torch
from fedmira.errors import MethodError
from fedmira.graphs.graph import Graph

Array: TypeAlias = "np.ndarray"
LEAST_SKETCH = 256  # numbers of a client's sketch, all its parts together
_COLUMNS = 2**18  # of rows that are multiplied in float64 at once
_BLOCK = 512  # clients compared with all others at once
_SAMPLE = 1024  # clients whose distances set the scale of a graph over all


@dataclass(frozen=True)
class Sketcher:
    """Summarise rows: `size` numbers for each of the stretches (start, stop) of a row."""

    stretches: tuple[tuple[int, int], ...]
    size: int
    seed: int

    @cached_property
    def _maps(self) -> list[sparse.csr_array]:
        """One [size, stop - start] matrix of +-1 per stretch, a single entry in each column."""
        stream = np.random.default_rng([self.seed, self.size])
        maps = []
        for start, stop in self.stretches:
            count = stop - start
            buckets = stream.integers(self.size, size=count)
            signs = stream.integers(2, size=count).astype(np.float32) * 2 - 1
            maps.append(sparse.csr_array((signs, (buckets, np.arange(count))), shape=(self.size, count)))
        return maps

    def sketch(self, rows: Tensor) -> Tensor:
        """Return the sketches [n, stretches, size] of rows [n, P]."""
        sketches = np.empty((len(rows), len(self.stretches), self.size))
        for sketch, row in zip(sketches, rows.numpy(), strict=True):
            for part, (start, stop), projection in zip(sketch, self.stretches, self._maps, strict=True):
                part[:] = projection @ row[start:stop]
        return torch.from_numpy(sketches)


def stretches_of(layout: Layout, *, by_module: bool) -> tuple[tuple[int, int], ...]:
    """The stretches of a row that are compared: the whole row, or each module's pair of factors separately."""
    if not by_module:
        return ((0, layout.size),)
    return tuple((first.start, second.stop) for part in layout.parts for first, second in part.pairs())


def share_of(size: int, parts: int) -> int:
    """Numbers for each of the parts that share a sketch of `size`; at least 32: shorter ones say little."""
    return max(32, -(-size // parts))


class ProductSketcher(NamedTuple):
    """Summarise the updates s B A, independent of their factors: for each module G (s B A) H, G and H random.

    G [m, d] and H [v, m] have entries of variance 1 / m, m^2 >= size: products of sketches are on average those of the
    updates. whole: modules are added up into one sketch, whose products are those of all modules together.
    """

    layout: Layout
    size: int
    whole: bool
    seed: int

    def sketch(self, adapters: Adapters) -> Tensor:
        """Return the sketches [n, modules or 1, m^2] of adapters [n]."""
        width = math.isqrt(self.size - 1) + 1
        stream = torch.Generator().manual_seed(self.seed)
        parts = []
        for part in self.layout.parts:
            for index, (a, b) in enumerate(part.pairs()):
                left = torch.randn(width, b.shape[0], generator=stream, dtype=torch.float64) / width**0.5
                right = torch.randn(a.shape[1], width, generator=stream, dtype=torch.float64) / width**0.5
                scaled = adapters.scale_of(index)[:, None, None].double() * (left @ adapters.leaf(b).double())
                parts.append((scaled @ (adapters.leaf(a).double() @ right)).flatten(1))
        sketches = torch.stack(parts, dim=1)
        return sketches.sum(dim=1, keepdim=True) if self.whole else sketches


def cosine(x: Array, y: Array) -> Array:
    """max(0, cos) [n, N] of vectors [n, L, m] and [N, L, m], the mean over L; 0 where a vector is zero."""
    units = []
    for side in (x, y):
        values = np.asarray(side, dtype=np.float64)
        lengths = np.linalg.norm(values, axis=-1, keepdims=True)
        units.append(np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0))
    parts = x.shape[1]
    return np.maximum(np.einsum("nlm,klm->nk", *units, optimize=True) / parts, 0.0)


def squared_distances(x: Array, y: Array) -> Array:
    """|x_i - y_j|^2 [n, N] of rows [n, m] and [N, m], without the cancellation of |x|^2 + |y|^2 - 2 <x, y>."""
    from scipy.spatial.distance import cdist  # tenths of a second

    return np.asarray(cdist(x, y, "sqeuclidean"))


def closeness(x: Array, y: Array, scales: Array | None = None) -> Array:
    """exp(-|x - y|^2 / scale) [n, N] of vectors [n, L, m] and [N, L, m], the mean over L.

    scales [L]; None: the median of |x - y|^2 over all pairs that differ. Where all are equal, every closeness is 1.
    """
    total = np.zeros((len(x), len(y)))
    for part in range(x.shape[1]):
        squares = squared_distances(x[:, part], y[:, part])
        total += _kernel(squares, _median(squares) if scales is None else scales[part])
    return total / x.shape[1]


def _kernel(squares: Array, scale: float) -> Array:
    return np.exp(-squares / scale) if scale else 1.0 * (squares == 0)


def _median(squares: Array) -> float:
    apart = squares[squares > 0]
    return float(np.median(apart)) if len(apart) else 0.0


def compare(x: Array, y: Array, measure: str) -> Array:
    """Similarities [n, N] of profiles or sketches [n, L, m] and [N, L, m] by a measure of the config."""
    return cosine(x, y) if measure == "cosine" else closeness(x, y)


def exact_similarities(rows: Tensor, stretches: Sequence[tuple[int, int]], measure: str) -> Array:
    """The similarities [n, n] that sketches of these rows [n, P] estimate, from products in float64.

    |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> after the rows' mean is subtracted.
    """
    total = np.zeros((len(rows), len(rows)))
    for start, stop in stretches:
        mean = rows[:, start:stop].double().mean(dim=0) if measure == "distance" else None
        product = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for first in range(start, stop, _COLUMNS):
            last = min(first + _COLUMNS, stop)
            block = rows[:, first:last].double()
            block = block if mean is None else block - mean[first - start : last - start]
            product += block @ block.T
        squares = product.diagonal().numpy()
        if mean is None:
            lengths = np.sqrt(np.outer(squares, squares))
            total += np.divide(product.numpy(), lengths, out=np.zeros_like(total), where=lengths > 0)
        else:
            gaps = np.maximum(squares[:, None] + squares[None, :] - 2 * product.numpy(), 0.0)
            np.fill_diagonal(gaps, 0.0)
            total += _kernel(gaps, _median(gaps))
    return np.maximum(total / len(stretches), 0.0)


def agreement(first: Array, second: Array) -> float | None:
    """Pearson's correlation of two symmetric matrices of similarities over their pairs; None if one does not vary."""
    upper = np.triu_indices(len(first), 1)
    x, y = first[upper], second[upper]
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


Pairs = dict[tuple[int, int], float]  # (smaller, larger client) -> similarity


def _largest(values: Array, count: int) -> Array:
    """Mark the `count` largest of each row of values [n, N]; among equals the earlier ones."""
    count = min(count, values.shape[1])
    least = -np.partition(-values, count - 1, axis=1)[:, count - 1, None]
    above, equal = values > least, values == least
    return above | (equal & (np.cumsum(equal, axis=1) <= count - above.sum(axis=1, keepdims=True)))


def nearest_pairs(similarities: Array, rows: Array, columns: Array, *, degree: int) -> Pairs:
    """List each client of `rows` [n] with its `degree` most similar among `columns` [N]; similarities [n, N].

    No client is paired with itself, or with a client of similarity 0. Among equals the earlier column comes first.
    """
    pairs: Pairs = {}
    to_others = np.where(rows[:, None] == columns[None, :], 0.0, similarities)
    for row, column in zip(*np.nonzero(_largest(to_others, degree) & (to_others > 0)), strict=True):
        client, other = int(rows[row]), int(columns[column])
        pairs[min(client, other), max(client, other)] = float(to_others[row, column])
    return pairs


def join(pairs: Pairs, *, clients: int, degree: int) -> sparse.csr_array:
    """Join pairs symmetrically [K, K], the most similar first, while both have fewer than `degree` neighbours."""
    room: dict[int, int] = {}
    entries: list[tuple[int, int, float]] = []
    for (client, other), value in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        if room.get(client, degree) > 0 and room.get(other, degree) > 0:
            room[client], room[other] = room.get(client, degree) - 1, room.get(other, degree) - 1
            entries += [(client, other, value), (other, client, value)]
    if not entries:
        return sparse.csr_array((clients, clients), dtype=np.float64)
    rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
    joined = sparse.coo_array((values, (rows, columns)), shape=(clients, clients))
    return sparse.csr_array(joined)


def knn_graph(profiles: Array, *, measure: str, degree: int, note: str) -> Graph:
    """Join every client to the `degree` most similar ones by profile [K, d], symmetrically.

    Cosines are those of profiles minus their mean over clients: mean embeddings of texts all point in a similar
    direction. Raises MethodError if profiles are not finite, or all are the same.
    """
    if not np.isfinite(profiles).all():
        raise MethodError("graph knn: profiles of the data are not finite")
    values = np.asarray(profiles, dtype=np.float64)
    if measure == "cosine":
        values = values - values.mean(axis=0)
    if not (values != values[0]).any():
        raise MethodError(
            "graph knn: all clients have the same profile, so none is more similar to one than to another"
        )
    return Graph(_join_all(values[:, None], np.arange(len(values)), len(values), measure, degree), "knn", note)


def _join_all(profiles: Array, ids: Array, clients: int, measure: str, degree: int) -> sparse.csr_array:
    """Join the clients `ids` [n] by their profiles [n, L, m], some rows at a time; the scale is that of a sample."""
    scales = None
    if measure == "distance":
        sample = profiles[:: max(1, len(profiles) // _SAMPLE)]
        parts = range(sample.shape[1])
        scales = np.array([_median(squared_distances(sample[:, part], sample[:, part])) for part in parts])
    pairs: Pairs = {}
    for start in range(0, len(ids), _BLOCK):
        block = profiles[start : start + _BLOCK]
        similar = cosine(block, profiles) if scales is None else closeness(block, profiles, scales)
        pairs |= nearest_pairs(similar, ids[start : start + _BLOCK], ids, degree=degree)
    return join(pairs, clients=clients, degree=degree)


def shuffled(graph: Graph, seed: int) -> Graph:
    """The same graph with its clients permuted: a control of whether it matters which clients are joined."""
    if not isinstance(graph.weights, sparse.csr_array):
        raise MethodError(
            f"graph {graph.kind} over {graph.clients} clients is not stored as a list of pairs, and cannot be shuffled"
        )
    order = np.random.default_rng([seed, graph.clients]).permutation(graph.clients)
    return Graph(sparse.csr_array(graph.weights[order][:, order]), graph.kind, f"{graph.note}, shuffled".lstrip(", "))


@dataclass(frozen=True)
class LearnedGraph:
    """A task graph that is computed from what clients have learned, by a sketch of each.

    of: adapters (minus the common start) or updates (minus what the client was sent); centred: minus their mean over
    the clients that are compared; products: compare s B A instead of factors; stored: sampled clients are joined to
    all that ever took part, not only to each other. A client is sketched when it is first seen, and in those of its
    rounds for which round - 1 is divisible by `every`.
    """

    of: str
    measure: str
    by_module: bool
    centred: bool
    every: int
    degree: int
    size: int
    products: bool
    stored: bool
    shuffled: bool
    seed: int

    def begin(self, adapters: Stored) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is shared and the tables of all clients at the start: no client is known, so none is joined."""
        first = torch.zeros(1, dtype=torch.int64)
        parts = self._sketch(adapters.take(first)).shape[1:]
        clients = len(adapters.ranks)
        shared = {} if self.products or self.of == "updates" else {"start": common_row(adapters)}
        return shared, {"sketch": torch.zeros(clients, *parts), "seen": torch.zeros(clients, dtype=torch.int64)}

    def look(
        self,
        adapters: Stored,
        shared: Mapping[str, Tensor],
        tables: Mapping[str, Tensor],
        ids: Tensor,
        rows: Tensor,
        number: int,
    ) -> tuple[Graph, dict[str, Tensor], dict[str, float]]:
        """Return the graph of round `number`, the tables' new rows of `ids` [n], and notes for the round's record.

        adapters, shared and tables are the server's, before the round; rows [n, P] what the clients uploaded.
        """
        now = self.note_down(adapters, shared, tables, ids, rows, number)
        sampled = own = now["sketch"].double().numpy()
        others = torch.nonzero(tables["seen"]).flatten().numpy() if self.stored else np.empty(0, dtype=np.int64)
        others = np.setdiff1d(others, ids.numpy())
        known = np.concatenate([sampled, tables["sketch"][torch.from_numpy(others)].double().numpy()])
        columns = np.concatenate([ids.numpy(), others])
        if self.shuffled:
            known = known[np.random.default_rng([self.seed, number]).permutation(len(known))]
            sampled = known[: len(ids)]
        similar = self._compare(sampled, known, known)
        pairs = nearest_pairs(similar, ids.numpy(), columns, degree=self.degree)
        joined = join(pairs, clients=len(tables["seen"]), degree=self.degree)
        notes = {"learned_pairs": joined.nnz / 2}
        origin = self._origin(adapters.take(ids), shared)
        if origin is not None and not self.products and bool(self._is_due(tables, ids, number).all()) and len(ids) > 2:
            stretches = stretches_of(adapters.layout, by_module=self.by_module)
            exact = exact_similarities(rows - origin.rows, stretches, self.measure)
            agreed = agreement(compare(own, own, self.measure), exact)
            notes |= {} if agreed is None else {"sketch_agreement": agreed}
        return Graph(joined, "learned", self.note), now, notes

    def note_down(
        self,
        adapters: Stored,
        shared: Mapping[str, Tensor],
        tables: Mapping[str, Tensor],
        ids: Tensor,
        rows: Tensor,
        number: int,
    ) -> dict[str, Tensor]:
        """Return the tables' new rows of `ids` [n]; arguments as of `look`."""
        before, due = adapters.take(ids), self._is_due(tables, ids, number)
        sketch = tables["sketch"][ids]
        if bool(due.any()):
            new = self._sketch(before.with_rows(rows), self._origin(before, shared))
            sketch[due] = new[due].to(sketch.dtype)
        return {"sketch": sketch, "seen": torch.ones(len(ids), dtype=torch.int64)}

    def _is_due(self, tables: Mapping[str, Tensor], ids: Tensor, number: int) -> Tensor:
        """Whose sketch is made anew in a round [n]."""
        return (tables["seen"][ids] == 0) | ((number - 1) % self.every == 0)

    def _origin(self, before: Adapters, shared: Mapping[str, Tensor]) -> Adapters | None:
        """What is subtracted from uploads; None where that is nothing, as products of the common start are zero."""
        if self.of == "updates":
            return before
        if self.products:
            return None
        return before.with_rows(shared["start"].expand(len(before), -1).clone()).mask_()

    def nearest(self, tables: Mapping[str, Tensor], ids: Tensor) -> tuple[Array, Array]:
        """Return the clients [N] that ever took part, and their similarities [n, N] to `ids` [n].

        Each client has its own `degree` most similar ones, whether they have it or not; itself, all others and whoever
        never took part have 0. Among equals the earlier client comes first.
        """
        seen = torch.nonzero(tables["seen"]).flatten()
        profiles = tables["sketch"][seen].double().numpy()
        if self.shuffled:
            profiles = profiles[np.random.default_rng([self.seed, 0]).permutation(len(profiles))]
        others, places = seen.numpy(), np.searchsorted(seen.numpy(), ids.numpy())
        weights = np.zeros((len(ids), len(others)))
        had = np.flatnonzero(np.isin(ids.numpy(), others))
        if not len(had):
            return others, weights
        places = places[had]
        similar = self._compare(profiles[places], profiles, profiles)
        similar[np.arange(len(had)), places] = 0.0
        weights[had] = np.where(_largest(similar, self.degree), similar, 0.0)
        return others, weights

    def directed(self, tables: Mapping[str, Tensor]) -> Graph:
        """The graph of `nearest` over all clients, in which a client's row holds those that it takes from."""
        clients = len(tables["seen"])
        blocks = []
        for first in range(0, clients, _BLOCK):
            ids = torch.arange(first, min(first + _BLOCK, clients))
            others, weights = self.nearest(tables, ids)
            rows, columns = np.nonzero(weights)
            entries = (weights[rows, columns], (rows, others[columns]))
            blocks.append(sparse.coo_array(entries, shape=(len(ids), clients)))
        matrix = sparse.csr_array(sparse.vstack(blocks, format="csr"))
        return Graph(matrix, "learned", f"{self.note}, each for itself")

    def _compare(self, x: Array, y: Array, everyone: Array) -> Array:
        """Similarities [n, N] of sketches, of which `everyone` gives the mean that is subtracted."""
        if self.centred:
            mean = everyone.mean(axis=0)
            x, y = x - mean, y - mean
        return compare(x, y, self.measure)

    def whole(self, tables: Mapping[str, Tensor]) -> Graph:
        """The graph of all clients that ever took part, from their newest sketches."""
        ids = torch.nonzero(tables["seen"]).flatten()
        profiles = tables["sketch"][ids].double().numpy()
        if self.shuffled:
            profiles = profiles[np.random.default_rng([self.seed, 0]).permutation(len(profiles))]
        if self.centred and len(ids):
            profiles = profiles - profiles.mean(axis=0)
        clients = len(tables["seen"])
        if not len(ids):
            return Graph(sparse.csr_array((clients, clients), dtype=np.float64), "learned", self.note)
        return Graph(_join_all(profiles, ids.numpy(), clients, self.measure, self.degree), "learned", self.note)

    @property
    def note(self) -> str:
        of = f"{'centred ' if self.centred else ''}{self.of}"
        words = [f"{self.measure} of {of}", "by layer" if self.by_module else ""]
        words += ["of products" if self.products else "", f"at most {self.degree} neighbours"]
        return ", ".join(word for word in [*words, "shuffled" if self.shuffled else ""] if word)

    def _sketch(self, adapters: Adapters, origin: Adapters | None = None) -> Tensor:
        """Sketches [n, L, m] of adapters, or of their difference from an origin."""
        layout = adapters.layout
        if self.products:
            parts = 1 if not self.by_module else sum(len(part.leaves) // 2 for part in layout.parts)
            sketcher = ProductSketcher(layout, share_of(self.size, parts), not self.by_module, self.seed)
            sketches = sketcher.sketch(adapters)
            return sketches if origin is None else sketches - sketcher.sketch(origin)
        stretches = stretches_of(layout, by_module=self.by_module)
        rows = adapters.rows if origin is None else adapters.rows - origin.rows
        return _sketcher(stretches, share_of(self.size, len(stretches)), self.seed).sketch(rows)


def common_row(adapters: Stored) -> Tensor:
    """The row [P] of which each client's start is a part: each number from a client whose rank includes it."""
    _, kinds = torch.unique(adapters.ranks, dim=0, return_inverse=True)
    firsts = torch.tensor([int((kinds == kind).nonzero()[0]) for kind in range(int(kinds.max()) + 1)])
    rows = adapters.rows[firsts]
    return rows.gather(0, rows.abs().argmax(dim=0, keepdim=True))[0]


@functools.lru_cache(maxsize=4)
def _sketcher(stretches: tuple[tuple[int, int], ...], size: int, seed: int) -> Sketcher:
    """Return one sketcher for equal arguments: its maps have as many entries as a row."""
    return Sketcher(stretches, size, seed)
