"""FedAMP in numbers worked by hand, against local training and FedAvg, and which stored rows count."""

import math
from typing import Any

import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import ALL, WORLDS
from tests.methods.hand import Clients, after, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.base import Clock, Message, Method, State

NEXT = Clock(2)
HALF = 1 / math.log(2)  # as sigma: a squared distance of 1 has the weight 1/2


def uploads(*sent: tuple[float, float], pull: float = 0.0) -> Message:
    return Message(rows(*sent), {"pull": torch.full((len(sent),), pull, dtype=torch.float64)})


def after_round(method: Method, *sent: tuple[float, float], ids: tuple[int, ...]) -> State:
    """Four clients at (0, 0), of which `ids` have trained once."""
    state = begin(method, *[(0, 0)] * 4)
    return after(state, merge(method, state, uploads(*sent), *[1] * len(sent), ids=ids))


def sent(method: Method, state: State, *ids: int) -> Message:
    return method.message(state, torch.tensor(ids), NEXT)


def test_weights_fall_with_the_squared_distance_and_are_shared_among_the_others() -> None:
    """From (0, 0), (1, 0) and (0, 2): weights 1/2 and 1/16 for the first, of which alpha / m = 1/4 is taken.

    u = 1/8 (1, 0) + 1/64 (0, 2); for the second 1/8 (-1, 0) + 1/4 2^-5 (-1, 2) more than its own.
    """
    method = make("fedamp", clients=4, alpha=0.5, sigma=HALF)
    message = sent(method, after_round(method, (0, 0), (1, 0), (0, 2), ids=(0, 1, 2)), 0, 1)
    assert pairs(message.rows)[0] == pytest.approx([1 / 8, 1 / 32])
    assert pairs(message.rows)[1] == pytest.approx([1 - 1 / 8 - 1 / 128, 2 / 128])
    assert message.scalars["pull"].tolist() == pytest.approx([1 / 8 + 1 / 64, 1 / 8 + 1 / 128])


def test_only_clients_that_have_trained_are_met_and_a_newcomer_gets_the_start() -> None:
    """Clients 1 and 3 have trained; 0 has not, and is neither met nor moved."""
    method = make("fedamp", clients=4, alpha=1, sigma=HALF)
    message = sent(method, after_round(method, (1, 0), (2, 0), ids=(1, 3)), 0, 1)
    assert pairs(message.rows)[0] == [0, 0]
    assert pairs(message.rows)[1] == pytest.approx([1.5, 0])
    assert message.scalars["pull"].tolist() == pytest.approx([0, 0.5])


def test_uploads_are_stored_as_they_came_and_a_client_uses_its_own() -> None:
    method = make("fedamp", clients=4)
    state = begin(method, *[(0, 0)] * 4)
    change = merge(method, state, uploads((1, 0), (2, 0), pull=0.25), 1, 1, ids=(1, 3))
    assert pairs(change.rows) == [[1, 0], [2, 0]]
    assert change.notes["pull_percent"] == 25
    clients = Clients(method, rows((8, 8)))
    clients.train(uploads((0, 0)))
    assert clients.use(uploads((1, 1))) == [[4, 4]]
    assert Clients(method, rows((8, 8))).use(uploads((1, 1))) == [[1, 1]]


def test_a_client_starts_from_what_it_is_sent_and_is_pulled_back_to_it() -> None:
    """From 2 at rate 1/2 to 8: 5, then 5 + 1/2 (3 - 1/2 3)."""
    clients = Clients(make("fedamp", **{"lambda": 0.5}), rows((8, 8)))
    assert pairs(clients.train(uploads((2, 2)), steps=2).rows) == [[5.75, 5.75]]


def test_sigma_is_the_mean_squared_distance_of_the_newest_round_unless_it_is_given() -> None:
    """Squared distances 4, 16 and 4 among 0, 2 and 4; a round of one client changes nothing."""
    method = make("fedamp", clients=4)
    state = after_round(method, (0, 0), (2, 0), (4, 0), ids=(0, 1, 2))
    assert float(state.shared["sigma"]) == 8
    state = after(state, merge(method, state, uploads((9, 9)), 1, ids=(3,)))
    assert float(state.shared["sigma"]) == 8
    given = make("fedamp", clients=4, sigma=3)
    assert float(after_round(given, (0, 0), (2, 0), ids=(0, 1)).shared["sigma"]) == 3


def test_as_long_as_no_distance_is_known_nobody_is_moved() -> None:
    method = make("fedamp", clients=4)
    state = after_round(method, (5, 0), ids=(1,))
    assert pairs(sent(method, state, 0, 1).rows) == [[0, 0], [5, 0]]


def test_many_clients_are_read_in_blocks() -> None:
    count = 150
    method = make("fedamp", clients=count, alpha=1, sigma=HALF)
    state = begin(method, *[(0, 0)] * count)
    there = [(float(k % 2), 0.0) for k in range(count)]
    state = after(state, merge(method, state, uploads(*there), *[1] * count))
    even = sent(method, state, 0)  # 74 others where it is, 75 at distance 1
    assert pairs(even.rows)[0] == pytest.approx([75 / 149 / 2, 0])


@pytest.mark.parametrize("kind", WORLDS)
def test_without_pull_and_penalty_it_is_local_training(kind: str) -> None:
    world = WORLDS[kind]()
    alone = build("fedamp", {"alpha": 0, "lambda": 0}, world.cohort)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(alone, world, simpler=build("local", {}, world.cohort))


@pytest.mark.parametrize("kind", WORLDS)
def test_with_everybody_near_all_start_from_the_mean(kind: str) -> None:
    """alpha = 1 - 1/K and a wide kernel: the next round of everybody begins where that of FedAvg does."""
    world = WORLDS[kind]()
    settings: dict[str, dict[str, Any]] = {
        "fedamp": {"alpha": 5 / 6, "sigma": 1e15, "lambda": 0},
        "fedavg": {"weights": "uniform"},
    }
    found = []
    for name, some in settings.items():
        scene = world.start(build(name, some, world.cohort))
        scene.play(ALL)
        found.append(scene.seen(ALL, scene.send(ALL)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"alpha": 1.5}, "alpha"), ({"sigma": 0}, "sigma"), ({"lambda": -1}, "lambda"), ({"self_weight": 0.5}, "self_w")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make("fedamp", **settings)
