"""FedSA-LoRA: A is shared, and B never leaves its client."""

import pytest
import torch
from tests.laws.worlds import BEFORE, WORLDS
from tests.methods.hand import begin, make, merge, pairs, rows

from fedmira.adapters.columns import factor_columns
from fedmira.engine.round import play
from fedmira.methods import build


def test_clients_count_by_their_examples_or_all_the_same() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("fedsa_lora", weights=weights)
        assert pairs(merge(method, begin(method, (2, 1)), rows((0, 1), (4, 1)), 1, 3).rows) == [[mean, 1]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_b_differs_between_clients_and_a_is_shared(kind: str) -> None:
    world = WORLDS[kind]()
    method = build("fedsa_lora", {}, world.cohort)
    found = world.reach(method).used(torch.tensor([0, 2, 3]))  # of rank 2, all trained in round 1
    shared = factor_columns(world.layout, "A")
    assert torch.equal(found[0, shared], found[1, shared])
    assert not torch.equal(found[0, ~shared], found[1, ~shared])
    assert method.personal


@pytest.mark.parametrize("kind", WORLDS)
def test_b_never_leaves_and_the_server_s_own_b_stays_at_zero(kind: str) -> None:
    """What is sent up has room for A alone; whole rows at the server have the B that it began with."""
    world, ids = WORLDS[kind](), torch.tensor(BEFORE[0])
    scene = world.start(build("fedsa_lora", {}, world.cohort))
    shared = factor_columns(world.layout, "A")
    played = play(scene.method, scene.ledger, scene.clients, ids, scene.clock)
    assert played.reply.message.rows.shape == (3, int(shared.sum()))
    second = factor_columns(world.layout, "B")
    assert not bool(played.uploads.rows[:, second].any())
    scene.play(ids)
    assert not bool(scene.rows[:, second].any())
    assert bool(scene.used(ids)[:, second].any())


@pytest.mark.parametrize("kind", WORLDS)
def test_a_client_that_was_not_sampled_yet_has_the_shared_a_and_no_update(kind: str) -> None:
    world = WORLDS[kind]()
    scene = world.reach(build("fedsa_lora", {}, world.cohort))
    newcomer, old = scene.used(torch.tensor([5, 0]))
    shared = factor_columns(world.layout, "A")
    assert torch.equal(newcomer[shared], old[shared])
    assert not bool(newcomer[~shared].any())
