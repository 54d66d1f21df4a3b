"""FedProx in numbers worked by hand, and against FedAvg."""

import pytest
from tests.laws import laws
from tests.laws.worlds import WORLDS
from tests.methods.hand import Clients, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build


def test_the_second_step_is_pulled_back_to_what_was_sent() -> None:
    """From (0, 0) to the targets (4, -8) at rate 1/2: (2, -4). There the gradient is (-2, 4), the pull mu (2, -4)."""
    clients = Clients(make("fedprox", mu=0.5), rows((4, -8)))
    assert pairs(clients.train(rows((0, 0)), steps=1).rows) == [[2, -4]]
    assert pairs(clients.train(rows((0, 0)), steps=2).rows) == [[2.5, -5]]  # 2 - 1/2 (-2 + 1)
    assert pairs(Clients(make("fedprox", mu=0), rows((4, -8))).train(rows((0, 0)), steps=2).rows) == [[3, -6]]


def test_it_is_the_distance_from_what_was_sent_that_counts() -> None:
    """From (2, 2) to (4, 4): the first step is to (3, 3), where the pull is 1/2 (1, 1), and not 1/2 (3, 3)."""
    clients = Clients(make("fedprox", mu=0.5), rows((4, 4)))
    assert pairs(clients.train(rows((2, 2)), steps=2).rows) == [[3.25, 3.25]]


def test_the_server_takes_a_mean() -> None:
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("fedprox", weights=weights)
        change = merge(method, begin(method, (7, 7)), rows((0, 0), (4, 4)), 1, 3)
        assert pairs(change.rows) == [[mean, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_without_a_penalty_it_is_fedavg(kind: str, weights: str) -> None:
    world = WORLDS[kind]()
    fedavg = build("fedavg", {"weights": weights}, world.cohort)
    method = build("fedprox", {"mu": 0, "weights": weights}, world.cohort)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(method, world, simpler=fedavg)
    pulled = build("fedprox", {"mu": 0.1, "weights": weights}, world.cohort)
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(pulled, world, simpler=fedavg)


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(ConfigError, match="mu"):
        make("fedprox", mu=-0.1)
