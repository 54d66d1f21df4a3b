"""pFedMe in numbers worked by hand, and against FedAvg."""

from typing import Any

import pytest
import torch
from tests.laws.worlds import WORLDS
from tests.methods.hand import Clients, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build

SETTINGS: dict[str, Any] = {"lambda": 0.5, "K": 2, "eta": 0.5}  # eta lambda = 1/4


def test_k_steps_of_theta_and_one_of_w() -> None:
    """From w = theta = 0 at rate 1/2 to 8: theta is 4, then 4 + 1/2 (4 - 1/2 4) = 5; w is 1/4 of 5."""
    clients = Clients(make("pfedme", **SETTINGS), rows((8, 16)))
    assert pairs(clients.train(rows((0, 0))).rows) == [[1.25, 2.5]]
    assert clients.use(rows((9, 9))) == [[5, 10]]
    assert clients.moments == ["theta", "theta"]


def test_theta_goes_on_from_step_to_step_and_its_penalty_follows_w() -> None:
    """theta = 5, w = 1.25: 5 + 1/2 (3 - 1/2 3.75) = 5.5625, and 5.5625 + 1/2 (2.4375 - 1/2 4.3125) = 5.703125."""
    clients = Clients(make("pfedme", **SETTINGS), rows((8, 8)))
    found = pairs(clients.train(rows((0, 0)), steps=2).rows)[0][0]
    assert clients.use(rows((9, 9)))[0][0] == 5.703125
    assert found == 1.25 + (5.703125 - 1.25) / 4


def test_theta_begins_every_round_at_what_was_sent() -> None:
    clients = Clients(make("pfedme", **SETTINGS), rows((8, 8)))
    clients.memory = {"theta": rows((100, 100))}
    assert pairs(clients.train(rows((0, 0))).rows) == [[1.25, 1.25]]


def test_a_client_that_never_trained_uses_what_it_is_sent() -> None:
    assert Clients(make("pfedme"), rows((8, 8))).use(rows((3, 1))) == [[3, 1]]


def test_the_server_goes_beta_of_the_way_to_the_mean() -> None:
    """From 1: the mean is 5 by examples and 3 uniformly."""
    for beta, weights, found in ((1, "examples", 5), (0.5, "examples", 3), (2, "examples", 9), (1, "uniform", 3)):
        method = make("pfedme", beta=beta, weights=weights)
        assert pairs(merge(method, begin(method, (1, 1)), rows((-1, -1), (7, 7)), 1, 3).rows) == [[found, found]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_with_one_step_and_the_whole_pull_it_is_fedavg(kind: str) -> None:
    world = WORLDS[kind]()
    settings = {"pfedme": {"K": 1, "lambda": 4, "eta": 0.25}, "fedavg": {}}
    one, other = (world.third(build(name, some, world.cohort))[1] for name, some in settings.items())
    assert torch.equal(one.rows, other.rows)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lambda": 15, "eta": 0.1}, "eta x lambda = 1.5"),
        ({"K": 0}, "K"),
        ({"beta": 0}, "beta"),
        ({"lambda": 0}, "lambda"),
        ({"mu": 1}, "mu"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make("pfedme", **settings)
