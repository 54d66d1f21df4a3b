"""RoLoRA: factors take turns, only the one in turn is returned, and every round's mean is exact."""

import pytest
import torch
from tests.laws.worlds import ALL, BEFORE, WORLDS
from tests.methods.hand import begin, make, merge, pairs, rows
from tests.methods.products import mean_of_products, one_rank, product_of_means

from fedmira.adapters.columns import factor_columns
from fedmira.engine.round import play
from fedmira.methods import build


def test_every_client_counts_the_same_or_by_its_examples() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("rolora", weights=weights)
        assert pairs(merge(method, begin(method, (2, 1)), rows((2, 0), (2, 4)), 1, 3).rows) == [[2, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_factors_alternate_by_round_and_only_the_trained_one_is_returned(kind: str) -> None:
    world = WORLDS[kind]()
    scene = world.start(build("rolora", {}, world.cohort))
    first = factor_columns(world.layout, "B")
    for ids, moved in zip(BEFORE, (first, ~first), strict=True):
        before = scene.rows
        played = play(scene.method, scene.ledger, scene.clients, torch.tensor(ids), scene.clock)
        assert played.bytes_up < played.bytes_down
        scene.play(torch.tensor(ids))
        changed = (scene.rows != before)[0]
        assert bool(changed[moved].any())
        assert not bool(changed[~moved].any())


@pytest.mark.parametrize("kind", WORLDS)
def test_the_mean_is_exact_in_odd_and_in_even_rounds(kind: str) -> None:
    world = one_rank(WORLDS[kind]())
    scene = world.start(build("rolora", {}, world.cohort))
    for _ in range(3):
        mean, product = mean_of_products(scene, ALL), product_of_means(scene, ALL)
        torch.testing.assert_close(mean, product, rtol=1e-9, atol=1e-12)
        assert bool((mean != 0).any())
        scene.play(ALL)
