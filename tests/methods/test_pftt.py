"""PFTT: a shared and an own adapter in one row; the sum is used, exported and travels in halves."""

from dataclasses import replace

import pytest
import torch
from tests.laws.worlds import ALL, BEFORE, WORLDS
from torch import Tensor

from fedmira.adapters import Adapters, Layout, lora_layout, scales
from fedmira.adapters.added import fold
from fedmira.adapters.parts import OWN, SHARED, own_and_shared, part_columns, scaled_parts
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Message, Method, State


def frozen(method: Method, part: str) -> Method:
    """The method without training of one part."""

    def trained(layout: Layout, clock: Clock) -> Tensor:
        return ~part_columns(layout, part)

    return replace(method, trained=trained)


@pytest.mark.parametrize("name", ["pftt", "fedbone"])
@pytest.mark.parametrize("kind", WORLDS)
def test_without_its_shared_part_it_is_local_training(kind: str, name: str) -> None:
    world = WORLDS[kind]()
    method, local = build(name, {}, world.cohort), build("local", {}, world.cohort)
    scene, alone = world.under(method).start(frozen(method, SHARED)), world.start(local)
    for ids in BEFORE:
        scene.play(torch.tensor(ids))
        alone.play(torch.tensor(ids))
    layout = own_and_shared(world.layout)
    own = scene.used()[:, part_columns(layout, OWN)]
    torch.testing.assert_close(own, alone.used(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["pftt", "fedbone"])
@pytest.mark.parametrize("kind", WORLDS)
def test_the_shared_part_is_the_same_for_all_and_the_own_one_never_reaches_the_server(kind: str, name: str) -> None:
    world = WORLDS[kind]()
    method = build(name, {}, world.cohort)
    scene = world.under(method).reach(method)
    shared = part_columns(own_and_shared(world.layout), SHARED)
    used = scene.used(torch.tensor([0, 2, 3]))  # of rank 2, all trained in round 1
    assert torch.equal(used[0, shared], used[1, shared])
    assert not torch.equal(used[0, ~shared], used[1, ~shared])
    start = world.under(method).start(method).rows
    torch.testing.assert_close(scene.rows[:, ~shared], start[:, ~shared], rtol=1e-15, atol=1e-15)  # a mean of equals
    assert not torch.equal(scene.rows[:, shared], start[:, shared])


def test_the_mean_by_hand() -> None:
    """Two clients of 1 and 3 examples return 4 and 8 in every shared number: (4 + 3 x 8) / 4 = 7."""
    world = WORLDS["quadratic"]()
    method = build("pftt", {}, world.cohort)
    scene = world.under(method).start(method)
    rows = torch.tensor([[4.0], [8.0]], dtype=torch.float64).expand(2, scene.ledger.federation.layout.size)
    state: State = scene.ledger.state
    change: Change = method.merge(state, ALL[:2], Message(rows), torch.tensor([1.0, 3.0]), Clock(1))
    shared = part_columns(scene.ledger.federation.layout, SHARED)
    assert torch.equal(change.rows[0, shared], torch.full((int(shared.sum()),), 7.0, dtype=torch.float64))


def test_parts_by_hand_and_their_sum_as_one_adapter() -> None:
    """One module 2 -> 3 of rank 2 and 1: each part 2 x 2 + 3 x 2 = 10 numbers in 16 columns, the second from 16 on."""
    layout = own_and_shared(lora_layout([("layer", 2, 3)], 2))
    assert [(part.name, part.start, part.stop) for part in layout.parts] == [(OWN, 0, 16), (SHARED, 16, 32)]
    assert part_columns(layout, SHARED).nonzero().flatten().tolist() == list(range(16, 32))
    ranks = torch.tensor([2, 1])
    rows = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    both = Adapters(layout, rows, ranks, scales(ranks, 3.0)).mask_()
    for k, rank in enumerate((2, 1)):
        one = fold(both.take(torch.tensor([k])))
        assert one.ranks.tolist() == [[2 * rank]]
        expected = both.product("layer", OWN)[k] + both.product("layer", SHARED)[k]
        torch.testing.assert_close(one.product("layer")[0], expected)
    halves = both.with_rows(scaled_parts(layout, both.rows, torch.tensor([[0.25], [1.0]]), 2.0))
    torch.testing.assert_close(halves.product("layer", OWN)[0], 0.25 * both.product("layer", OWN)[0])
    torch.testing.assert_close(halves.product("layer", OWN)[1], both.product("layer", OWN)[1])
    torch.testing.assert_close(halves.product("layer", SHARED), 2 * both.product("layer", SHARED))
