"""FedRep in steps worked by hand: the private factor first, then the shared one."""

from dataclasses import replace

import pytest
import torch
from tests.laws.worlds import WORLDS, transformer
from tests.methods.hand import Clients, begin, make, merge, pairs, rows

from fedmira.adapters import Adapters
from fedmira.adapters.columns import factor_columns
from fedmira.adapters.optim import adamw
from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.base import Memory, Message, Tools
from fedmira.methods.fedrep import head_steps


def test_the_private_factor_is_trained_first_and_then_the_shared_one() -> None:
    """From (0, 0) at rate 1/2 to (8, 16): B is 8 and 12 after two steps, then A is 4."""
    clients = Clients(make("fedrep", head=0.7), rows((8, 16)))
    for steps, found in ((1, [4, 0]), (2, [4, 8]), (3, [4, 12])):
        assert pairs(clients.train(rows((0, 0)), steps=steps).rows) == [found]
    assert clients.moments == ["main", "private", "main", "private", "private", "main"]


def test_each_optimizer_sees_the_gradient_of_its_own_factor_so_that_clipping_does_too() -> None:
    clients = Clients(make("fedrep", head=0.5), rows((8, 16)))
    clients.train(rows((0, 0)), steps=2)
    assert clients.pushed == [[[0, -16]], [[-8, 0]]]


def test_the_factors_may_change_places() -> None:
    clients = Clients(make("fedrep", shared="B", head=0.7), rows((8, 16)))
    assert pairs(clients.train(rows((0, 0)), steps=3).rows) == [[6, 8]]


def test_a_share_of_the_steps_is_rounded_and_each_factor_has_one_where_there_are_two() -> None:
    steps = torch.tensor([1, 2, 3, 5, 10])
    assert head_steps(steps, 0.8).tolist() == [0, 1, 2, 4, 8]
    assert head_steps(steps, 0.1).tolist() == [0, 1, 1, 1, 1]
    assert head_steps(steps, 0.99).tolist() == [0, 1, 2, 4, 9]


@pytest.mark.parametrize("shared", ["A", "B"])
def test_only_the_shared_factor_reaches_the_server(shared: str) -> None:
    world = WORLDS["transformer"]()
    scene = world.reach(build("fedrep", {"shared": shared, "head": 0.5}, world.cohort))
    start = world.start(scene.method)
    columns = factor_columns(world.layout, shared)
    assert torch.equal(scene.rows[:, ~columns], start.rows[:, ~columns])
    assert not torch.equal(scene.rows[:, columns], start.rows[:, columns])
    used = scene.used(torch.tensor([0, 3]))  # of rank 2, last trained in rounds 1 and 2
    assert torch.equal(used[0, columns], used[1, columns])
    assert not torch.equal(used[0, ~columns], used[1, ~columns])
    assert scene.method.personal


def test_under_adamw_with_decay_the_factor_that_rests_does_not_move() -> None:
    """Two steps, the first for B; the second is left out."""
    world, ids = transformer(optimizer=adamw(weight_decay=0.3), local_steps=2), torch.tensor([0])
    method = build("fedrep", {"head": 0.5}, world.cohort)

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return method.client.step(adapters, memory, given, tools) if tools.clock.step == 0 else (adapters, memory)

    scene = world.start(replace(method, client=replace(method.client, step=step)))
    given = scene.send(ids)
    before, found = scene.seen(ids, given), scene.phase(ids, given).rows
    shared = factor_columns(world.layout, "A")
    assert torch.equal(found[:, shared], before[:, shared])
    assert not torch.equal(found[:, ~shared], before[:, ~shared])


def test_clients_count_by_their_examples_or_all_the_same() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("fedrep", weights=weights)
        assert pairs(merge(method, begin(method, (2, 1)), rows((0, 1), (4, 1)), 1, 3).rows) == [[mean, 1]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize(("key", "value"), [("shared", "C"), ("head", 0), ("head", 1), ("heads", 2)])
def test_settings_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make("fedrep", **{key: value})
