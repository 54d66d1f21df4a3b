"""Ditto in numbers worked by hand, and against local training and FedAvg."""

import pytest
import torch
from tests.laws.worlds import ALL, BEFORE, WORLDS
from tests.methods.hand import Clients, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build


def test_the_personal_adapter_is_pulled_to_what_was_sent_and_the_shared_one_is_not() -> None:
    """From 0 at rate 1/2 to 8, lambda = 1: v = 4, where gradient -4 and pull 4 cancel; w_k = 4, then 6."""
    clients = Clients(make("ditto", **{"lambda": 1}), rows((8, 8)))
    assert pairs(clients.train(rows((0, 0)), steps=2).rows) == [[6, 6]]
    assert clients.use(rows((1, 1))) == [[4, 4]]
    assert clients.moments == ["ditto_v", "main", "ditto_v", "main"]


def test_the_personal_adapter_goes_on_where_it_was() -> None:
    """v = 4 meets w = 2: gradient -4, pull 2, so v = 5; the shared one goes from 2 to 5 as well, by gradient -6."""
    clients = Clients(make("ditto", **{"lambda": 1}), rows((8, 8)))
    clients.memory = {"ditto_v": rows((4, 4))}
    assert pairs(clients.train(rows((2, 2))).rows) == [[5, 5]]
    assert clients.use(rows((9, 9))) == [[5, 5]]


def test_a_client_that_never_trained_uses_what_it_is_sent() -> None:
    assert Clients(make("ditto"), rows((8, 8))).use(rows((3, 1))) == [[3, 1]]


def test_the_server_takes_a_mean() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("ditto", weights=weights)
        assert pairs(merge(method, begin(method, (7, 7)), rows((0, 0), (4, 4)), 1, 3).rows) == [[mean, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_without_penalty_it_is_local_training_beside_fedavg(kind: str) -> None:
    """Both rows have moments of their own: with shared ones neither would be what it is alone."""
    world = WORLDS[kind]()
    settings = {"ditto": {"lambda": 0}, "fedavg": {"weights": "uniform"}, "local": {}}
    both, fedavg, local = (world.reach(build(name, some, world.cohort)) for name, some in settings.items())
    assert torch.equal(both.rows, fedavg.rows)
    trained = torch.tensor(BEFORE[0])  # whoever comes later begins where the shared row is then
    assert torch.equal(both.used(trained), local.used(trained))
    names = {name for name in both.clients.memory.tables if name.startswith("moments/")}
    assert names == {"moments/main/velocity", "moments/ditto_v/velocity"}
    assert not torch.equal(both.used(), fedavg.used(ALL))


@pytest.mark.parametrize("kind", WORLDS)
def test_the_shared_adapter_is_fedavgs_whatever_the_penalty_is(kind: str) -> None:
    world = WORLDS[kind]()
    settings = {"ditto": {"lambda": 3}, "fedavg": {"weights": "uniform"}, "local": {}}
    both, fedavg, local = (world.reach(build(name, some, world.cohort)) for name, some in settings.items())
    assert torch.equal(both.rows, fedavg.rows)
    assert not torch.equal(both.used(torch.tensor(BEFORE[0])), local.used(torch.tensor(BEFORE[0])))


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(ConfigError, match="lambda"):
        make("ditto", **{"lambda": -1})
