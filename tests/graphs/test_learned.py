"""Sketches keep what they promise, and graphs made from them have the degrees and symmetry they should."""

import numpy as np
import pytest
import torch

from fedmira.adapters import Adapters, lora_layout
from fedmira.errors import MethodError
from fedmira.graphs.learned import (
    LearnedGraph,
    ProductSketcher,
    Sketcher,
    agreement,
    closeness,
    common_row,
    cosine,
    exact_similarities,
    join,
    knn_graph,
    nearest_pairs,
    share_of,
    squared_distances,
)

LAYOUT = lora_layout([("first", 40, 30), ("second", 20, 50)], 4)


def draw(count: int, seed: int = 0) -> torch.Tensor:
    """Rows in three families, so that similarities differ."""
    stream = torch.Generator().manual_seed(seed)
    ways = torch.randn(3, LAYOUT.size, generator=stream, dtype=torch.float64)
    noise = torch.randn(count, LAYOUT.size, generator=stream, dtype=torch.float64)
    return ways[torch.arange(count) % 3] + noise


def test_products_of_sketches_are_those_of_rows_on_average_with_the_variance_that_is_promised() -> None:
    rows = draw(2)
    exact = float(rows[0] @ rows[1])
    found = []
    for seed in range(400):
        one, other = Sketcher(((0, LAYOUT.size),), 256, seed).sketch(rows)[:, 0]
        found.append(float(one @ other))
    bound = float((rows[0].square().sum() * rows[1].square().sum() + exact**2) / 256)
    assert abs(np.mean(found) - exact) < 4 * (bound / 400) ** 0.5
    assert 0.5 * bound < np.var(found) < 1.3 * bound


def test_a_sketch_is_linear_and_the_same_every_time() -> None:
    sketcher, rows = Sketcher(((0, 100), (100, LAYOUT.size)), 64, 5), draw(3)
    both = sketcher.sketch(2 * rows[:1] + rows[1:2])
    torch.testing.assert_close(both, 2 * sketcher.sketch(rows[:1]) + sketcher.sketch(rows[1:2]))
    assert torch.equal(Sketcher(((0, 100), (100, LAYOUT.size)), 64, 5).sketch(rows), sketcher.sketch(rows))
    assert sketcher.sketch(rows).shape == (3, 2, 64)


@pytest.mark.parametrize("whole", [True, False])
def test_sketches_of_products_know_the_update_and_not_its_factors(whole: bool) -> None:
    ranks = torch.full((2,), 4)
    held = Adapters(LAYOUT, draw(2), ranks, torch.tensor([0.5, 2.0]).double())
    turned = held.with_rows(held.rows.clone())
    turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for first, second in LAYOUT.parts[0].pairs():
        turned.leaf(first).copy_(torch.linalg.inv(turn) @ held.leaf(first))
        turned.leaf(second).copy_(held.leaf(second) @ turn)
    sketcher = ProductSketcher(LAYOUT, 256, whole, 0)
    torch.testing.assert_close(sketcher.sketch(turned), sketcher.sketch(held), rtol=1e-8, atol=1e-8)
    updates = torch.cat([held.product(name).flatten(1) for name in ("first", "second")], dim=1)
    exact = float(updates[0] @ updates[1])
    found = []
    for seed in range(300):
        one, other = ProductSketcher(LAYOUT, 256, whole, seed).sketch(held).flatten(1)
        found.append(float(one @ other))
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / 300**0.5


@pytest.mark.parametrize("measure", ["cosine", "distance"])
@pytest.mark.parametrize("stretches", [((0, LAYOUT.size),), ((0, 280), (280, LAYOUT.size))])
def test_a_graph_of_256_numbers_agrees_with_the_exact_one(measure: str, stretches: tuple[tuple[int, int], ...]) -> None:
    rows = draw(30)
    sketches = Sketcher(stretches, 256 // len(stretches), 0).sketch(rows).numpy()
    compare = cosine if measure == "cosine" else closeness
    exact = exact_similarities(rows, stretches, measure)
    agreed = agreement(compare(sketches, sketches), exact)
    assert agreed is not None
    assert agreed > 0.9


def test_exact_similarities_are_those_of_the_rows_themselves() -> None:
    rows = draw(6)
    whole = ((0, LAYOUT.size),)
    np.testing.assert_allclose(exact_similarities(rows, whole, "cosine"), cosine(*[rows[:, None].numpy()] * 2))
    np.testing.assert_allclose(exact_similarities(rows, whole, "distance"), closeness(*[rows[:, None].numpy()] * 2))


def test_the_common_row_is_whole_though_nobody_has_the_largest_rank_everywhere() -> None:
    whole = Adapters(LAYOUT, draw(1), torch.tensor([4]), torch.ones(1)).mask_()
    ranks = torch.tensor([[4, 1], [2, 4], [1, 1]])
    parts = Adapters(LAYOUT, whole.rows.repeat(3, 1), ranks, torch.ones(3, 2)).mask_()
    assert torch.equal(common_row(parts), whole.rows[0])


def test_small_differences_of_large_float32_rows_are_not_lost() -> None:
    """|x|^2 + |y|^2 - 2 xy in float32 would give 0, or less, where the distance is 1e-3."""
    rows = 1e3 * torch.ones(2, 1000)
    rows[1, 0] += 1e-1
    expected = float(rows[1, 0] - rows[0, 0]) ** 2
    assert float(squared_distances(rows.numpy(), rows.numpy())[0, 1]) == pytest.approx(expected, rel=1e-6)
    values = exact_similarities(torch.cat([rows, rows[:1] + 0.1]), ((0, 1000),), "distance")
    assert 0 < values[0, 2] < values[0, 1] < 1


def test_nobody_gets_more_neighbours_than_the_degree_and_all_is_symmetric() -> None:
    stream = np.random.default_rng(0)
    half = stream.random((20, 20))
    similar, everyone = (half + half.T) / 2, np.arange(20)
    joined = join(nearest_pairs(similar, everyone, everyone, degree=3), clients=20, degree=3).toarray()
    assert np.array_equal(joined, joined.T)
    assert (joined > 0).sum(axis=1).max() <= 3
    assert not joined.diagonal().any()
    best = np.unravel_index(np.argmax(similar - np.eye(20)), similar.shape)
    assert joined[best] == similar[best]
    assert set(joined[joined > 0]) <= set(similar.flatten())


def test_among_equals_the_earlier_clients_are_joined() -> None:
    everyone = np.arange(5)
    assert set(nearest_pairs(np.ones((1, 5)), everyone[:1], everyone, degree=2)) == {(0, 1), (0, 2)}
    similar = np.array([[0.5, 0.9, 0.5, 0.2, 0.5]])
    assert set(nearest_pairs(similar, everyone[3:4], everyone, degree=3)) == {(1, 3), (0, 3), (2, 3)}


def test_a_few_rows_are_joined_to_other_clients_by_their_numbers() -> None:
    similar = np.array([[1.0, 0.2, 0.9], [0.2, 1.0, 0.0]])
    joined = join(nearest_pairs(similar, np.array([4, 1]), np.array([4, 1, 3]), degree=5), clients=6, degree=5)
    dense = joined.toarray()
    assert dense[4, 3] == dense[3, 4] == 0.9
    assert dense[4, 1] == 0.2
    assert dense.sum() == pytest.approx(2.2)


def test_profiles_that_tell_nobody_apart_are_refused() -> None:
    with pytest.raises(MethodError, match="same profile"):
        knn_graph(np.ones((4, 3)), measure="cosine", degree=2, note="")
    with pytest.raises(MethodError, match="not finite"):
        knn_graph(np.array([[1.0], [np.nan]]), measure="cosine", degree=2, note="")


@pytest.mark.parametrize("measure", ["cosine", "distance"])
def test_a_knn_graph_over_many_is_that_of_the_whole_matrix(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = draw(25).numpy()
    whole = knn_graph(profiles, measure=measure, degree=4, note="").weights.toarray()
    monkeypatch.setattr("fedmira.graphs.learned._BLOCK", 7)
    parts = knn_graph(profiles, measure=measure, degree=4, note="").weights.toarray()
    np.testing.assert_allclose(parts, whole)
    assert (whole > 0).sum() > 25


def test_a_direction_that_all_profiles_share_makes_nobody_alike() -> None:
    """Without their mean (10, 0) they are (0, 1), (0, 2), (0, -1), (0, -2): cosines 1 within the pairs, -1 between."""
    profiles = np.array([[10.0, 1.0], [10.0, 2.0], [10.0, -1.0], [10.0, -2.0]])
    found = knn_graph(profiles, measure="cosine", degree=3, note="").weights.toarray()
    assert found == pytest.approx(np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]))


def test_a_centred_graph_subtracts_the_mean_of_each_number_over_clients() -> None:
    """Sketches as the profiles above: with the mean of all numbers, 5, subtracted instead, everybody would be alike."""
    graph = LearnedGraph(
        of="adapters",
        measure="cosine",
        by_module=False,
        centred=True,
        every=1,
        degree=3,
        size=256,
        products=False,
        stored=False,
        shuffled=False,
        seed=0,
    )
    sketch = torch.tensor([[10.0, 1.0], [10.0, 2.0], [10.0, -1.0], [10.0, -2.0]])[:, None]
    tables = {"sketch": sketch, "seen": torch.ones(4, dtype=torch.int64)}
    pairs = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    assert graph.whole(tables).weights.toarray() == pytest.approx(pairs)
    assert graph.directed(tables).weights.toarray() == pytest.approx(pairs)


def test_parts_of_a_sketch_share_its_numbers_and_have_at_least_32() -> None:
    assert [share_of(256, parts) for parts in (1, 3, 8, 100)] == [256, 86, 32, 32]
