"""FedOpt in numbers worked by hand, and against FedAvg and the wrapper."""

from typing import Any

import pytest
import torch
from tests.laws.worlds import WORLDS
from tests.methods.hand import after, begin, make, merge, pairs, rows

from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.fedopt import Config

# eta = 2, b1 = 1/2, tau = 1; from (0, 8) with updates D = (4, 0), then (-2, 0): m = (2, 0), then (0, 0)
SETTINGS: dict[str, Any] = {"server_learning_rate": 2, "betas": [0.5, 0.75], "tau": 1}
FIRST = {
    "adam": 2 * 2 / (4.75**0.5 + 1),  # v = 3/4 1 + 1/4 16
    "yogi": 2 * 2 / (5**0.5 + 1),  # v = 1 - 1/4 16 sign(1 - 16)
    "adagrad": 2 * 2 / (17**0.5 + 1),  # v = 1 + 16
    "momentum": 2 * 4,  # m = 4
}
SECOND_V = {"adam": 0.75 * 4.75 + 0.25 * 4, "yogi": 5 - 0.25 * 4, "adagrad": 17 + 4, "momentum": 1}


@pytest.mark.parametrize("variant", FIRST)
def test_two_steps_of_the_server(variant: str) -> None:
    method = make("fedopt", variant=variant, **SETTINGS)
    state = begin(method, (0, 8))
    state = after(state, merge(method, state, rows((2, 8), (6, 8)), 1, 1))
    (first,) = pairs(state.adapters.rows)
    assert first == pytest.approx([FIRST[variant], 8])
    change = merge(method, state, rows((first[0] - 2, 8)), 1)
    assert pairs(change.rows)[0] == pytest.approx([first[0], 8])  # m = 1/2 2 - 1/2 2, of momentum 1/2 4 - 2
    assert change.shared is not None
    assert float(change.shared["server.v"][0, 0]) == pytest.approx(SECOND_V[variant])


def test_clients_count_by_their_examples_or_all_the_same() -> None:
    """D = (0 + 3 x 4) / 4 or 2; momentum's first step is D."""
    for weights, mean in (("examples", 3), ("uniform", 2)):
        method = make("fedopt", variant="momentum", weights=weights)
        assert pairs(merge(method, begin(method, (0, 0)), rows((0, 0), (4, 4)), 1, 3).rows) == [[mean, mean]]
        assert method.facts.weighs == (weights == "examples")


@pytest.mark.parametrize("kind", WORLDS)
def test_momentum_of_zero_with_a_whole_step_is_fedavg(kind: str) -> None:
    world = WORLDS[kind]()
    plain = build("fedopt", {"variant": "momentum", "betas": [0, 0]}, world.cohort)
    scenes = [world.third(method)[1] for method in (plain, build("fedavg", {}, world.cohort))]
    torch.testing.assert_close(scenes[0].used(), scenes[1].used(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", FIRST)
def test_it_is_the_wrapper_around_fedavg(variant: str) -> None:
    world = WORLDS["quadratic"]()
    wrapper = {"name": "server_optimizer", "variant": variant, "learning_rate": 0.1, "tau": 0.01}
    method = build("fedopt", {"variant": variant, "server_learning_rate": 0.1, "tau": 0.01}, world.cohort)
    wrapped = build("fedavg", {"with": [wrapper]}, world.cohort)
    assert torch.equal(world.third(method)[1].used(), world.third(wrapped)[1].used())


def test_momentum_takes_whole_steps_unless_it_is_told_otherwise() -> None:
    assert [Config().server_learning_rate, Config(variant="momentum").server_learning_rate] == [0.01, 1]
    assert Config(variant="momentum", server_learning_rate=0.5).server_learning_rate == 0.5


@pytest.mark.parametrize(("key", "value"), [("tau", 0), ("betas", [0.9, 1]), ("server_learning_rate", 0), ("eta", 1)])
def test_settings_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        make("fedopt", **{key: value})
