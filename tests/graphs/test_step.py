"""The weights of one round's step: rows of weights that sum to 1, and clients without neighbours as they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.adapters import Stored, lora_layout, scales
from fedmira.adapters.lazy import sparse, torch
from fedmira.graphs.graph import Graph
from fedmira.graphs.step import Coupling, extend, normalise, transfer


def draw_coupling(seed: int, *, clients: int, symmetric: bool, kind: str, stored: int) -> Coupling:
    """A round in which about half of all clients have no neighbour, and the others several."""
    stream = np.random.default_rng(seed)
    joined = stream.random((clients, clients)) < 0.4
    alone = stream.random(clients) < 0.5
    joined[alone] = False
    if symmetric:
        joined = joined & joined.T
    weights = np.where(joined, stream.random((clients, clients)), 0.0)
    weights = (weights + weights.T) / 2 if symmetric else weights
    np.fill_diagonal(weights, 0.0)
    outside = np.where(alone[:, None], 0.0, stream.random((clients, stored)))
    whole = normalise(np.concatenate([weights, outside], axis=1), kind)
    return Coupling(np.arange(clients), whole[:, :clients], np.arange(stored), whole[:, clients:])


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clients=st.integers(1, 40),
    symmetric=st.booleans(),
    kind=st.sampled_from(["none", "row"]),
    stored=st.integers(0, 3),
    strength=st.floats(0.0, 20.0),
)
def test_a_client_without_neighbours_takes_its_row_alone_and_all_rows_sum_to_one(
    exact: bool, seed: int, clients: int, symmetric: bool, kind: str, stored: int, strength: float
) -> None:
    near = draw_coupling(seed, clients=clients, symmetric=symmetric, kind=kind, stored=stored)
    within, outside = transfer(near, strength, exact=exact)
    for k in np.flatnonzero(near.degree == 0):
        assert within[k].tolist() == np.eye(clients)[k].tolist()
        assert not outside[k].any()
    scale = max(1.0, strength * float(near.degree.max(initial=0.0)))
    np.testing.assert_allclose(within.sum(axis=1) + outside.sum(axis=1), 1.0, atol=1e-12 * scale)
    if exact:
        whole = np.eye(clients) + strength * near.laplacian
        np.testing.assert_allclose(whole @ within, np.eye(clients), atol=1e-10 * scale)


@pytest.mark.parametrize("products", [False, True])
def test_a_newcomer_starts_where_the_regulariser_is_lowest(products: bool) -> None:
    """sum_l a_kl |w_k - w_l|^2 over the known clients has its minimum at the row, and one without a neighbour stays."""
    weights = np.array([[0, 0, 0, 3, 0], [0, 0, 0, 1, 0], [0, 0, 0, 5, 0], [3, 1, 5, 0, 0], [0, 0, 0, 0, 0]], float)
    layout = lora_layout([("layer", 3, 4)], 2)
    rows = torch.randn(5, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = torch.full((5,), 2)
    stored = Stored(layout, rows, ranks, scales(ranks, 4.0).double())
    known = np.array([0, 1])  # 2 is a neighbour too, and joins at the same time
    found = extend(Graph(sparse.csr_array(weights), "file"), stored, np.array([3, 4]), known, products=products)
    assert torch.equal(found[1], rows[4])

    def products_of(row: torch.Tensor) -> torch.Tensor:
        adapters = stored.take(torch.tensor([0]), rows=row[None])
        (part,) = layout.parts
        a, b = (adapters.leaf(leaf)[0] for leaf in part.leaves[:2])
        return b @ a

    if products:
        mean = 0.75 * products_of(rows[0]) + 0.25 * products_of(rows[1])
        u, s, vh = torch.linalg.svd(mean)
        assert torch.allclose(products_of(found[0]), (u[:, :2] * s[:2]) @ vh[:2])
    else:
        assert torch.allclose(found[0], 0.75 * rows[0] + 0.25 * rows[1])
