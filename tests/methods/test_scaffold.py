"""SCAFFOLD in numbers worked by hand, against FedAvg, and what travels."""

import pytest
import torch
from tests.laws.worlds import BEFORE, WORLDS
from tests.methods.hand import Clients, after, begin, make, merge, pairs, rows

from fedmira.engine.round import play
from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.base import Clock, Message

BOTH = torch.arange(2)
TARGETS = rows((4, 0), (0, 8))


def message(*sent: tuple[float, float], more: tuple[tuple[float, float], ...]) -> Message:
    return Message(rows(*sent), more={"c": rows(*more)})


def test_two_rounds_of_two_clients() -> None:
    """At rate 1/2 from (0, 0); gradients (-4, 0) and (0, -8) become the variates, their mean (-2, -4) the server's.

    Round 2 begins at (1, 2), gradients (-3, 2) and (1, -6), corrected (-3 + 4 - 2, 2 - 4) = (-1, -2) and, for the
    second, (1 - 2, -6 + 8 - 4): both take the same step. The new variates are the gradients at (1, 2).
    """
    method = make("scaffold", clients=2)
    state, clients = begin(method, (0, 0)), Clients(method, TARGETS)
    returned = clients.train(method.message(state, BOTH, Clock(1)))
    assert pairs(returned.rows) == [[2, 0], [0, 4]]
    assert pairs(returned.more["c"]) == [[-4, 0], [0, -8]]
    state = after(state, merge(method, state, returned, 1, 3))
    sent = method.message(state, BOTH, Clock(2))
    assert pairs(sent.rows) == [[1, 2], [1, 2]]
    assert pairs(sent.more["c"]) == [[-2, -4], [-2, -4]]
    returned = clients.train(sent)
    assert pairs(returned.rows) == [[1.5, 3], [1.5, 3]]
    assert clients.memory is not None
    assert pairs(clients.memory["c"]) == [[-3, 2], [1, -6]]
    assert pairs(returned.more["c"]) == [[1, 2], [1, 2]]


def test_both_options_in_one_round_of_two_steps() -> None:
    """From 0 at rate 1/2 to 4: gradients -4, then -2 at 2. Their mean is -3; at the shared adapter it is -4 twice."""
    for variate, expected in (("difference", -3), ("gradient", -4)):
        method = make("scaffold", clients=1, variate=variate)
        clients = Clients(method, rows((4, 4)))
        returned = clients.train(message((0, 0), more=((0, 0),)), steps=2)
        assert pairs(returned.rows) == [[3, 3]]
        assert pairs(returned.more["c"]) == [[expected, expected]]
        assert clients.memory is not None
        assert list(clients.memory) == ["c"]  # a sum is kept during a round alone


def test_both_options_take_the_server_s_variate_off() -> None:
    """c = 1, c_k = 3, one step: the change of c_k is the gradient less 3, which option II finds from the step."""
    for variate in ("difference", "gradient"):
        clients = Clients(make("scaffold", clients=1, variate=variate), rows((4, 0)))
        clients.memory = {"c": rows((3, 3))}
        returned = clients.train(message((0, 0), more=((1, 1),)))
        assert pairs(returned.rows) == [[3, 1]]  # 0 - 1/2 (-4 - 3 + 1), 0 - 1/2 (0 - 3 + 1)
        assert pairs(returned.more["c"]) == [[-7, -3]]
        assert pairs(clients.memory["c"]) == [[-4, 0]]


def test_clients_stay_where_their_variates_say_that_all_gradients_cancel() -> None:
    """At the mean of the targets, (2, 4), with exact variates: FedAvg's clients drift apart there, these do not."""
    clients = Clients(make("scaffold", clients=2), TARGETS)
    clients.memory = {"c": rows((-2, 4), (2, -4))}
    returned = clients.train(message((2, 4), (2, 4), more=((0, 0), (0, 0))), steps=5)
    assert pairs(returned.rows) == [[2, 4], [2, 4]]
    assert pairs(returned.more["c"]) == [[0, 0], [0, 0]]


def test_the_server_takes_eta_g_of_the_mean_step_and_the_share_of_clients_that_answered() -> None:
    """Of four clients, two: w = 1 + 2 ((3 + 5) / 2 - 1), c = 0 + 2/4 (4 + 8) / 2."""
    method = make("scaffold", clients=4, server_learning_rate=2)
    change = merge(method, begin(method, (1, 1)), message((3, 3), (5, 5), more=((4, 4), (8, 8))), 1, 3, ids=(1, 3))
    assert pairs(change.rows) == [[7, 7]]
    assert change.shared is not None
    assert pairs(change.shared["c"]) == [[3, 3]]


def test_clients_count_by_their_examples_where_that_is_asked_for() -> None:
    """w = (3 + 3 x 7) / 4, c = 1/1 (4 + 3 x 8) / 4."""
    method = make("scaffold", clients=2, weights="examples")
    change = merge(method, begin(method, (1, 1)), message((3, 3), (7, 7), more=((4, 4), (8, 8))), 1, 3)
    assert pairs(change.rows) == [[6, 6]]
    assert change.shared is not None
    assert pairs(change.shared["c"]) == [[7, 7]]
    assert method.facts.weighs
    assert not make("scaffold").facts.weighs


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("variate", ["difference", "gradient"])
def test_the_first_round_is_fedavg_and_the_second_is_not(variate: str, kind: str) -> None:
    world = WORLDS[kind]()
    scaffold = build("scaffold", {"variate": variate}, world.cohort)
    scenes = [world.start(one) for one in (build("fedavg", {"weights": "uniform"}, world.cohort), scaffold)]
    for ids, same in zip(BEFORE, (True, False), strict=True):
        for scene in scenes:
            scene.play(torch.tensor(ids))
        assert torch.equal(scenes[0].rows, scenes[1].rows) == same


@pytest.mark.parametrize("variate", ["difference", "gradient"])
def test_it_sends_twice_what_fedavg_sends(variate: str) -> None:
    world, ids = WORLDS["quadratic"](), torch.tensor(BEFORE[0])
    methods = build("fedavg", {}, world.cohort), build("scaffold", {"variate": variate}, world.cohort)
    one, two = (
        play(scene.method, scene.ledger, scene.clients, ids, scene.clock) for scene in map(world.start, methods)
    )
    assert (two.bytes_up, two.bytes_down) == (2 * one.bytes_up, 2 * one.bytes_down)


def test_it_needs_plain_sgd() -> None:
    assert make("scaffold").regime.optimizer == "sgd"


@pytest.mark.parametrize(("key", "value"), [("variate", "option I"), ("server_learning_rate", 0), ("mu", 1)])
def test_settings_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make("scaffold", **{key: value})
