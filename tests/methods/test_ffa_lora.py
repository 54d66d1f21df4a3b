"""FFA-LoRA: A is frozen and the mean is exact; FedAvg's is not."""

import pytest
import torch
from tests.laws.worlds import ALL, BEFORE, WORLDS
from tests.methods.hand import begin, make, merge, pairs, rows
from tests.methods.products import mean_of_products, one_rank, product_of_means

from fedmira.adapters.columns import factor_columns
from fedmira.engine.round import play
from fedmira.methods import build


def test_clients_count_by_their_examples_or_all_the_same() -> None:
    """A = 2 for all; B = 0 and 4."""
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("ffa_lora", weights=weights)
        assert pairs(merge(method, begin(method, (2, 1)), rows((2, 0), (2, 4)), 1, 3).rows) == [[2, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_the_product_of_the_means_is_the_mean_of_the_products(kind: str) -> None:
    world = one_rank(WORLDS[kind]())
    for name, exact in (("ffa_lora", True), ("fedavg", False)):
        scene = world.reach(build(name, {}, world.cohort))
        mean, product = mean_of_products(scene, ALL), product_of_means(scene, ALL)
        assert torch.allclose(mean, product, rtol=1e-9, atol=1e-12) == exact
        assert bool((mean != 0).any())


@pytest.mark.parametrize("kind", WORLDS)
def test_a_is_the_common_start_in_every_round_and_b_is_trained(kind: str) -> None:
    world = WORLDS[kind]()
    method = build("ffa_lora", {}, world.cohort)
    trained = factor_columns(world.layout, "B")
    after, start = world.third(method)[1].used(), world.start(method).used()
    assert torch.equal(after[:, ~trained], start[:, ~trained])
    assert not torch.equal(after[:, trained], start[:, trained])
    assert not method.personal


def test_only_b_crosses_the_wire_either_way() -> None:
    """At rank 2, A has 6 + 4 numbers and B 4 + 4: 18 or 8, padded to 32 or 16; three clients, 8 bytes a number."""
    world, ids = WORLDS["quadratic"](), torch.tensor(BEFORE[0])
    each = [3 * 32 * 8, 3 * 16 * 8]
    played = [
        play(scene.method, scene.ledger, scene.clients, ids, scene.clock)
        for scene in (world.start(build(name, {}, world.cohort)) for name in ("fedavg", "ffa_lora"))
    ]
    assert [one.bytes_up for one in played] == [one.bytes_down for one in played] == each
