"""Rows that a client is not sent: not counted, and where it is its own, the client goes on from what it has itself."""

from dataclasses import replace
from pathlib import Path

import torch
from tests.engine.house import house, run, without_seconds
from tests.laws.worlds import WORLDS
from torch import Tensor

from fedmira.engine.round import message_of, play
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Message, Method, State


def kept() -> Method:
    """Clients send their rows, and are never sent them."""

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        return Message(torch.zeros(len(ids), state.adapters.layout.size), absent={"rows": torch.ones(len(ids)) > 0})

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        return Change(ids, returned.rows)

    return Method("kept", merge, rows_of="each", send=send)


def handed() -> Method:
    """Beside its own row a client of rank 2 is handed client 0's, with a scalar; nobody else is."""

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        own = state.adapters.rows[ids]
        first = state.adapters.rows[torch.zeros_like(ids)]
        without = state.adapters.ranks[ids] < 2
        return Message(own, {"first": torch.ones(len(ids))}, {"first": first}, absent={"first": without})

    return replace(kept(), name="handed", send=send)


def test_a_client_that_is_never_sent_its_row_goes_on_from_it(tmp_path: Path) -> None:
    """As with `local`, whose rows stay where they are; after a stop too, and only the way up costs anything."""
    of = house()
    local = run(of, build("local", {}, of.cohort()), tmp_path / "local")
    run(of, kept(), tmp_path / "kept", rounds=2)
    mine = run(of, kept(), tmp_path / "kept")
    assert torch.equal(mine.rows, local.rows)
    assert [record["bytes_down"] for record in mine.records] == [0, 0, 0]
    assert all(record["bytes_up"] > 0 for record in mine.records)
    costs = ("bytes_up", "bytes_down")
    one, other = (
        [{name: value for name, value in record.items() if name not in costs} for record in without_seconds(some)]
        for some in (mine.records, local.records)
    )
    assert one == other


def test_only_rows_and_scalars_that_are_sent_are_counted() -> None:
    world, ids = WORLDS["quadratic"](), torch.arange(4)  # ranks 2 1 2 2
    scenes = [world.start(method) for method in (handed(), replace(handed(), send=None))]
    mine, theirs = (play(scene.method, scene.ledger, scene.clients, ids, scene.clock) for scene in scenes)
    row = 8 * int(world.layout.sizes(torch.tensor([2])))
    assert mine.bytes_down - theirs.bytes_down == 3 * (row + 8)
    assert mine.bytes_up == theirs.bytes_up


def test_some_messages_of_many_say_what_is_absent_in_them() -> None:
    world = WORLDS["quadratic"]()
    scene = world.start(handed())
    message = message_of(scene.method, scene.ledger, scene.ledger.state, torch.arange(6), scene.clock)
    assert message.take(torch.tensor([4, 2])).absent["first"].tolist() == [True, False]
    assert message.map(lambda rows: rows + 1).absent["first"].tolist() == message.absent["first"].tolist()
