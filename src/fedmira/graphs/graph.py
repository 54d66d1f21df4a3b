"""Task graphs: who is similar to whom, and the Laplacian step that pulls similar clients together.

A graph is a sparse matrix A [K, K] of non-negative similarities with an empty diagonal. For clients `ids` of a round:

    normalise the round's own subgraph, A~ = A_SS | D^-1 A_SS | D^-1/2 A_SS D^-1/2      (none | row | symmetric)
    L = diag(A~ 1) - A~                                     rows of L sum to 0, so equal clients stay equal
    W_S <- W_S - c L W_S,  c = eta x lambda                 (simultaneous: all differences from the uploads)

Source: MIRA (arXiv:2410.15524), equations 3, 4 and 8; normalisation is ours. Negative similarities are refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

from fedmira.adapters.lazy import np, sparse
from fedmira.errors import MethodError, StoreError
from fedmira.names import ONLY_IDS, ClientNames, shown_name

Array: TypeAlias = "np.ndarray"
NORMALISATIONS = ("none", "row", "symmetric")
_LISTED = 4_000_000  # entries; a larger graph is a rule, of which each round computes what it needs
_BLOCK = 256  # rows of a rule at a time


class Rule(NamedTuple):
    """A symmetric matrix of similarities that is too large to store; any block of it can be computed.

    block: row ids [n], column ids [m] -> similarities [n, m], 0 where both are the same client. identity: text that
    determines the similarities, for fingerprints. entries: number of nonzeros; None = unknown until all are computed.
    """

    shape: tuple[int, int]
    block: Callable[[Array, Array], Array]
    identity: str
    entries: int | None


@dataclass(frozen=True, eq=False)
class Graph:
    """Similarities of K clients. weights: CSR [K, K], non-negative, diagonal empty, or a rule for them; kind and note
    for reports.
    """

    weights: sparse.csr_array | Rule
    kind: str
    note: str = ""

    def __post_init__(self) -> None:
        if self.weights.shape[0] != self.weights.shape[1]:
            raise MethodError(f"graph: found a {self.weights.shape} matrix, need one row and one column per client")
        if isinstance(self.weights, Rule):
            return
        if not np.isfinite(self.weights.data).all() or (self.weights.data < 0).any():
            worst = self.weights.data.min() if len(self.weights.data) else 0.0
            raise MethodError(
                f"graph: similarities must be finite and >= 0 (smallest found: {worst:g}); "
                "a negative one would push clients apart without bound"
            )

    @property
    def clients(self) -> int:
        return self.weights.shape[0]

    @property
    def entries(self) -> int | None:
        """Number of similarities that are not 0, in both directions; None if a rule would have to compute them all."""
        return self.weights.entries if isinstance(self.weights, Rule) else int(self.weights.nnz)

    @cached_property
    def symmetric(self) -> bool:
        if isinstance(self.weights, Rule):
            return True
        difference = abs(self.weights - self.weights.T)
        return difference.nnz == 0 or float(difference.max()) < 1e-12

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the similarities, so that a resumed run can detect that its graph has changed.

        For a rule: of its identity, and of the similarities among the first 64 clients.
        """
        if isinstance(self.weights, Rule):
            sample = np.arange(min(64, self.clients))
            digest = hashlib.sha256(f"{self.kind} {self.clients} {self.weights.identity}".encode())
            digest.update(self.subgraph(sample).astype("<f8").tobytes())
            return digest.hexdigest()
        canonical = self.weights.tocoo()
        digest = hashlib.sha256(repr(canonical.shape).encode())
        for part in (canonical.row.astype("<i8"), canonical.col.astype("<i8"), canonical.data.astype("<f8")):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def edges(self, most: int) -> list[tuple[int, int, float]] | None:
        """List (row, column, similarity); None if there are more than `most`, or too many to store."""
        if isinstance(self.weights, Rule) or self.weights.nnz > most:
            return None
        whole = self.weights.tocoo()
        return list(zip(whole.row.tolist(), whole.col.tolist(), whole.data.tolist(), strict=True))

    def subgraph(self, ids: Array, others: Array | None = None) -> Array:
        """Return the dense similarities [S, N] of `ids` to `others` (default: among `ids`)."""
        columns = ids if others is None else others
        if isinstance(self.weights, Rule):
            return self.weights.block(ids, columns)
        return self.weights[ids][:, columns].toarray()

    def neighbours(self, ids: Array) -> Array:
        """Return the ids outside `ids` that are joined to a client of `ids`, ascending."""
        if isinstance(self.weights, Rule):
            joined = np.flatnonzero((self.subgraph(ids, np.arange(self.clients)) > 0).any(axis=0))
        else:
            joined = np.unique(self.weights[ids].indices)
        return np.setdiff1d(joined, ids)

    @cached_property
    def lonely(self) -> Array:
        """The ids, ascending, of the clients that have no neighbour: no other client pulls them.

        None of the rules `uniform` and `random`, which would have to be computed for all pairs.
        """
        if isinstance(self.weights, Rule):
            if self.kind != "groups":
                return np.empty(0, dtype=np.int64)
            return np.flatnonzero(self.degrees(np.arange(self.clients)) == 0)
        return np.flatnonzero(abs(self.weights).sum(axis=1) == 0)

    def degrees(self, ids: Array) -> Array:
        """Return each client's sum of similarities [N] to the others of `ids`."""
        if isinstance(self.weights, Rule):
            parts = [ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK)]
            return np.concatenate([self.subgraph(part, ids).sum(axis=1) for part in parts])
        return self.weights[ids][:, ids].sum(axis=1)


def from_matrix(matrix: Array, *, kind: str, note: str = "") -> Graph:
    """Make a Graph from a dense [K, K] array; the diagonal is dropped."""
    values = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(values, 0.0)
    return Graph(sparse.csr_array(values), kind, note)


def make_graph(
    kind: str,
    *,
    ids: Sequence[str],
    names: ClientNames,
    columns: Sequence[Mapping[str, str]],
    column: str | None = None,
    path: str | None = None,
    seed: int = 0,
) -> Graph:
    """Make the graph that a config names: random (seed), uniform, groups (column) or file (path).

    ids, columns: of every client; columns are the data columns that have one value for the client. names: of clients
    that have others than their ids.
    Raises MethodError if a column or a file does not fit these clients.
    """
    if kind == "uniform":
        return uniform_graph(len(ids))
    if kind == "random":
        return random_graph(len(ids), seed=seed)
    if kind == "file":
        return file_graph(str(path), ids, names)
    if column is None:
        raise MethodError("graph kind 'groups' needs the data column that names a client's group")
    return group_graph(groups_by(column, ids, columns, names=names, what="graph column"))


def groups_by(
    column: str, ids: Sequence[str], columns: Sequence[Mapping[str, str]], *, names: ClientNames, what: str
) -> list[str]:
    """Return each client's value of a data column. Raises MethodError, starting with `what`, if it is not one value."""
    lacking = [client_id for client_id, values in zip(ids, columns, strict=True) if column not in values]
    if lacking:
        shared = sorted(set.intersection(*(set(values) for values in columns)))
        raise MethodError(
            f"{what} '{column}' has no single value for {len(lacking)} clients such as '{names.shown(lacking[0])}'; "
            f"columns with one value per client: {', '.join(shared) or 'none'}"
        )
    return [values[column] for values in columns]


def uniform_graph(clients: int) -> Graph:
    """Every pair of clients equally similar: a_kl = 1."""
    if clients**2 <= _LISTED:
        return from_matrix(np.ones((clients, clients)), kind="uniform")
    rule = Rule((clients, clients), lambda rows, columns: _apart(rows, columns) * 1.0, "", clients * (clients - 1))
    return Graph(rule, "uniform")


def random_graph(clients: int, *, seed: int) -> Graph:
    """The recipe of MIRA's and FedU's code: b ~ U(0,1)^{KxK}, a = (b + b^T) / 2, entries below 0.25 become 0."""
    note = f"seed {seed}"
    if clients**2 <= _LISTED:
        draw = _draw(seed, clients, np.arange(clients), np.arange(clients))
        values = (draw + draw.T) / 2
        values[values < 0.25] = 0.0
        return from_matrix(values, kind="random", note=note)

    def block(rows: Array, columns: Array) -> Array:
        values = (_draw(seed, clients, rows, columns) + _draw(seed, clients, columns, rows).T) / 2
        values[(values < 0.25) | ~_apart(rows, columns)] = 0.0
        return values

    return Graph(Rule((clients, clients), block, note, None), "random", note)


def _draw(seed: int, clients: int, rows: Array, columns: Array) -> Array:
    """Return b[rows, columns] of b ~ U(0,1)^{KxK}, as if all of b were drawn row by row from one stream."""
    bits = np.random.PCG64([seed, 0x6D697261])  # the generator of default_rng; one step of it is one number of b
    stream = np.random.Generator(bits)
    low = int(columns.min())
    span = np.empty(int(columns.max()) + 1 - low)
    drawn = np.empty((len(rows), len(columns)))
    position = 0
    for out, row in zip(drawn, rows.tolist(), strict=True):
        start = row * clients + low
        bits.advance((start - position) % 2**128)
        stream.random(out=span)
        out[:] = span[columns - low]
        position = start + len(span)
    return drawn


def group_graph(groups: Sequence[str]) -> Graph:
    """Clients of the same group are joined with a_kl = 1, others not at all."""
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    codes = np.array([names[group] for group in groups])
    note = f"{len(names)} groups"
    sizes = np.bincount(codes)
    if int((sizes**2).sum()) > _LISTED:

        def block(rows: Array, columns: Array) -> Array:
            return ((codes[rows][:, None] == codes[columns]) & _apart(rows, columns)) * 1.0

        identity = hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest()
        return Graph(Rule((len(codes),) * 2, block, identity, int((sizes * (sizes - 1)).sum())), "groups", note)
    member = sparse.csr_array((np.ones(len(codes)), (np.arange(len(codes)), codes)), shape=(len(codes), len(names)))
    joined = sparse.csr_array(member @ member.T)
    joined.setdiag(0)
    joined.eliminate_zeros()
    return Graph(joined, "groups", note)


def _apart(rows: Array, columns: Array) -> Array:
    """Return [n, m] bool: False where row and column are the same client."""
    return rows[:, None] != columns


def file_graph(path: str | Path, ids: Sequence[str], names: ClientNames = ONLY_IDS) -> Graph:
    """Read similarities from CSV with the columns client, neighbour, weight (header row), by client id or name.

    A pair listed once counts in both directions; if both directions are listed, each keeps its weight.
    Raises MethodError with file and line: a client that is unknown, or may be one of several; a pair with two weights;
    a weight that is not a number or below 0; a missing file.
    """
    source = Path(path)
    if not source.is_file():
        raise MethodError(f"graph file '{path}' not found (current folder: {Path.cwd()})")
    index, find = {client_id: position for position, client_id in enumerate(ids)}, names.finder(ids)
    listed: dict[tuple[int, int], float] = {}
    try:
        text = source.read_bytes().decode("utf-8-sig")  # line breaks inside quotes are kept as they are
    except UnicodeDecodeError as error:
        raise MethodError(f"graph file '{path}': byte {error.start} is not UTF-8; save it as UTF-8") from None
    lines = _cells_of(text, str(path))
    number, cells = next(lines, (1, []))
    if cells != ["client", "neighbour", "weight"]:
        raise MethodError(f"{path}:{number}: the first line must be 'client,neighbour,weight'")
    for number, cells in lines:
        if not any(cells):
            continue
        if len(cells) != 3:
            raise MethodError(f"{path}:{number}: found {len(cells)} cells, need client,neighbour,weight")
        pair = []
        for cell in cells[:2]:
            try:
                client_id = find(cell)
            except StoreError as error:
                raise MethodError(f"{path}:{number}: {error}") from None
            if client_id is None:
                raise MethodError(
                    f"{path}:{number}: no client '{shown_name(cell)}'{names.near(cell, ids)}; clients are named as in "
                    "the data, or by the ids in clients.json of a run"
                )
            pair.append(index[client_id])
        try:
            weight = float(cells[2])
        except ValueError:
            raise MethodError(f"{path}:{number}: weight '{cells[2]}' is not a number") from None
        if not (0 <= weight < float("inf")):
            raise MethodError(f"{path}:{number}: weight {weight:g}: similarities are finite and >= 0")
        if listed.setdefault((pair[0], pair[1]), weight) != weight:
            raise MethodError(
                f"{path}:{number}: weight {weight:g} of a pair that has {listed[pair[0], pair[1]]:g} above; keep one "
                "line"
            )
    rows, columns, values = [], [], []
    for (first, second), weight in listed.items():
        pairs = [(first, second)] if (second, first) in listed else [(first, second), (second, first)]
        for row, column in pairs:
            if row != column:
                rows.append(row)
                columns.append(column)
                values.append(weight)
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(ids), len(ids)), dtype=np.float64)
    return Graph(matrix, "file", str(path))


def _cells_of(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the last line number and the cells of each record of comma-separated values, without outer spaces.

    Raises MethodError with file and line if quotes do not match.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise MethodError(f"{path}:{reader.line_num}: not comma-separated values: {error}") from None
