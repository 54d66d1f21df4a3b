"""Example methods: the client's own loss, and pairs beside the base, under all laws; what travels, counted once."""

import functools
from dataclasses import dataclass

import pytest
import torch
from tests.laws import laws
from tests.laws.examples import EXAMPLES
from tests.laws.worlds import BEFORE, WORLDS, World
from torch import Tensor

from fedmira.engine.clients import Reply, Send, Trainers
from fedmira.engine.round import play
from fedmira.methods import build
from fedmira.methods.base import Method


@functools.cache
def example(name: str) -> Method:
    return EXAMPLES[name]()


@functools.cache
def world_of(kind: str) -> World:
    return WORLDS[kind]()


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("law", laws.LAWS)
def test_examples_obey(law: str, name: str, kind: str) -> None:
    laws.LAWS[law](example(name), world_of(kind))


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_absent_client_has_no_influence(name: str, kind: str) -> None:
    laws.law_an_absent_client_has_no_influence(example(name), world_of(kind))


@pytest.mark.parametrize("kind", WORLDS)
def test_a_further_row_costs_as_much_as_the_first_both_ways(kind: str) -> None:
    world, ids = WORLDS[kind](), torch.tensor(BEFORE[0])
    plain, variate = (world.start(build(name, {}, world.cohort)) for name in ("fedavg", "scaffold"))
    one, two = (play(scene.method, scene.ledger, scene.clients, ids, scene.clock) for scene in (plain, variate))
    assert (two.bytes_up, two.bytes_down) == (2 * one.bytes_up, 2 * one.bytes_down)


@dataclass(frozen=True)
class OneByOne:
    """Clients whose messages are made one at a time, in the other order, before they train."""

    clients: Trainers

    def train(self, ids: Tensor, send: Send) -> Reply:
        for k in reversed(ids.tolist()):
            send(torch.tensor([k]))
        return self.clients.train(ids, send)


@pytest.mark.parametrize("kind", WORLDS)
def test_a_message_counts_once_however_often_it_is_made(kind: str) -> None:
    world, ids = WORLDS[kind](), torch.tensor(BEFORE[0])
    for method in (build(name, {}, world.cohort) for name in ("rolora", "scaffold")):
        scene = world.reach(method)
        one, two = (
            play(method, scene.ledger, clients, ids, scene.clock)
            for clients in (scene.clients, OneByOne(scene.clients))
        )
        assert (one.bytes_up, one.bytes_down) == (two.bytes_up, two.bytes_down)
        assert torch.equal(one.change.rows, two.change.rows)
