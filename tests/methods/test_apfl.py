"""APFL in numbers worked by hand, and against local training and FedAvg."""

from typing import Any

import pytest
import torch
from tests.laws.worlds import ALL, BEFORE, WORLDS
from tests.methods.hand import Clients, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build


def remembering(alpha: float, v: float, **settings: Any) -> Clients:
    """A client with target (8, 8) that remembers alpha and v = (v, v)."""
    clients = Clients(make("apfl", **settings), rows((8, 8)))
    clients.memory = {"apfl_v": rows((v, v)), "apfl_alpha": torch.tensor([[alpha]], dtype=torch.float64)}
    return clients


def test_one_step_of_both_adapters_and_of_alpha() -> None:
    """v = 4, w = 0, alpha = 1/2: the mixture is 2, its gradient -6. v = 4 + 1/2 1/2 6; w = 0 + 1/2 8.

    alpha: the slope is (4, 4) (-6, -6) = -48, at rate 1/192 alpha = 1/2 + 1/4.
    """
    clients = remembering(0.5, 4, alpha_learning_rate=1 / 192)
    assert pairs(clients.train(rows((0, 0))).rows) == [[4, 4]]
    assert clients.memory is not None
    assert pairs(clients.memory["apfl_v"]) == [[5.5, 5.5]]
    assert clients.memory["apfl_alpha"].tolist() == [[0.75]]
    assert clients.use(rows((0, 0))) == [[4.125, 4.125]]
    assert clients.use(rows((8, 0))) == [[6.125, 4.125]]  # of the shared adapter as it is now
    assert clients.moments == ["apfl_v", "main"]


def test_alpha_stays_within_0_and_1_and_still_where_it_is_fixed() -> None:
    """With the local step's rate, 1/2, alpha would be 24.5; and from v = -4, w = 0 it would be -19.5."""
    for v, adaptive, found in ((4, True, 1), (-4, True, 0), (4, False, 0.5)):
        clients = remembering(0.5, v, adaptive=adaptive)
        clients.train(rows((0, 0)))
        assert clients.memory is not None
        assert clients.memory["apfl_alpha"].tolist() == [[found]]


def test_a_client_that_never_trained_uses_what_it_is_sent() -> None:
    assert Clients(make("apfl"), rows((8, 8))).use(rows((3, 1))) == [[3, 1]]


def test_the_server_takes_a_mean() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("apfl", weights=weights)
        assert pairs(merge(method, begin(method, (7, 7)), rows((0, 0), (4, 4)), 1, 3).rows) == [[mean, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_the_ends_of_alpha_are_local_training_and_fedavg(kind: str) -> None:
    world = WORLDS[kind]()
    entries: list[tuple[str, dict[str, Any]]] = [
        ("apfl", {"alpha": 1, "adaptive": False}),
        ("apfl", {"alpha": 0, "adaptive": False}),
        ("local", {}),
        ("fedavg", {"weights": "uniform"}),
    ]
    own, shared, local, fedavg = (world.reach(build(name, settings, world.cohort)) for name, settings in entries)
    trained = torch.tensor(BEFORE[0])  # whoever comes later begins where the shared row is then
    assert torch.equal(own.used(trained), local.used(trained))
    assert torch.equal(shared.used(ALL), fedavg.used(ALL))
    assert torch.equal(own.rows, fedavg.rows)


def test_clients_learn_other_shares_in_the_rounds_of_the_engine() -> None:
    world = WORLDS["transformer"]()
    scene = world.third(build("apfl", {"alpha_learning_rate": 0.2}, world.cohort))[1]
    alphas = scene.remembered()["method/apfl_alpha"][torch.tensor([0, 1, 3])].flatten().tolist()
    assert len(set(alphas)) == 3
    assert all(0 <= alpha <= 1 for alpha in alphas)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"alpha": 1.1}, "alpha"), ({"alpha_learning_rate": 0}, "alpha_learning_rate"), ({"lambda": 1}, "lambda")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make("apfl", **settings)
