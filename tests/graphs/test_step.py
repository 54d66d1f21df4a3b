"""The weights of one round's step: rows of weights that sum to 1, and clients without neighbours as they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.graphs.step import Coupling, normalise, transfer


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
