"""FLoRA: the mean of products in everybody's base, for any ranks, and factors that begin anew; numbers by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import ALPHA, WORLDS, World
from torch import Tensor

from fedmira.adapters import Layout, Stored, lora_layout
from fedmira.adapters.added import join_pairs
from fedmira.adapters.columns import factor_columns
from fedmira.disk.table import Table
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, State

SQUARE = lora_layout([("m", 2, 2)], 2)
ONE = torch.zeros(1, dtype=torch.int64)


def cohort(ranks: Tensor | None, count: int = 2, seed: int = 0) -> Cohort:
    names = tuple(f"c{k}" for k in range(count))
    scale = None if ranks is None else 2.0 / ranks.double()
    return Cohort(names, (1,) * count, ({},) * count, (np.arange(count),), seed, ranks=ranks, scale=scale)


def shared(layout: Layout) -> State:
    table = Table(torch.zeros(1, layout.size, dtype=torch.float64), ONE, None)
    rank = layout.parts[0].rank
    return State(Stored(layout, table, torch.tensor([rank]), torch.tensor([2.0 / rank], dtype=torch.float64)))


def merge(of: Method, state: State, uploads: Tensor, weights: Sequence[float], ids: Sequence[int] = ()) -> Change:
    who, counts = torch.tensor(ids or range(len(uploads))), torch.tensor(weights, dtype=torch.float64)
    return of.merge(state, who, Message(uploads), counts, Clock(1))


def by_hand() -> Tensor:
    """Ranks 1 and 2, alpha = 2: scales 2 and 1. Updates 2 [[1 0] [0 0]] and [[0 0] [0 6]]."""
    uploads = torch.zeros(2, SQUARE.size, dtype=torch.float64)
    uploads[0, :8] = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])  # A = [[1 0] -], B = [[1 -] [0 -]]
    uploads[1, :8] = torch.tensor([0.0, 1, 0, 0, 0, 0, 6, 0])  # A = [[0 1] [0 0]], B = [[0 0] [6 0]]
    return uploads


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, [[0.5, 0], [0, 4.5]]), ({"weights": "uniform"}, [[1, 0], [0, 3]])],
    ids=["examples", "uniform"],
)
def test_two_clients_of_ranks_one_and_two(settings: dict[str, str], wanted: list[list[float]]) -> None:
    """1/4 [[2 0] [0 0]] + 3/4 [[0 0] [0 6]], or half of each; three pairs are one more than 2 x 2 needs."""
    method = build("flora", settings, cohort(torch.tensor([1, 2])))
    change = merge(method, shared(SQUARE), by_hand(), (1, 3))
    assert change.base is not None
    a, b = change.base["m"]
    assert (b @ a).tolist() == wanted
    assert len(a) == 2
    assert method.facts.weighs == (not settings)


def test_factors_lie_side_by_side_each_at_its_own_rank() -> None:
    """Ranks 1 and 2 of a module of 5 x 4: a pair of rank 3, A first the one row of client 0, then both of client 1."""
    layout = lora_layout([("m", 4, 5)], 2)
    ranks = torch.tensor([1, 2])
    uploads = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = merge(build("flora", {}, cohort(ranks)), shared(layout), uploads, (1, 1))
    assert change.base is not None
    a, b = change.base["m"]
    assert a.tolist() == [uploads[0, :4].tolist(), uploads[1, :4].tolist(), uploads[1, 4:8].tolist()]
    scaled = uploads[:, 8:18].view(2, 5, 2) * torch.tensor([1.0, 0.5])[:, None, None]  # p_k s_k = 1/2 x 2, 1/2 x 1
    torch.testing.assert_close(b, torch.cat([scaled[0, :, :1], scaled[1]], dim=1))


def test_who_answered_says_whose_rank_and_scale_an_upload_has() -> None:
    change = merge(build("flora", {}, cohort(torch.tensor([1, 2]))), shared(SQUARE), by_hand()[1:], (3,), (1,))
    assert change.base is not None
    a, b = change.base["m"]
    assert (b @ a).tolist() == [[0, 0], [0, 6]]


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="2 clients sum to 0"):
        merge(build("flora", {}, cohort(None)), shared(SQUARE), by_hand(), (0, 0))


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="start"):
        build("flora", {"start": "random"}, cohort(None))


def test_every_round_begins_with_another_a_and_no_b() -> None:
    """Within 1 / sqrt(2); the same for all clients, whenever it is asked for, and another for another seed."""
    method, state = build("flora", {}, cohort(None)), shared(SQUARE)
    first, second = (method.message(state, torch.arange(2), Clock(number)).rows for number in (1, 2))
    columns = factor_columns(SQUARE, "A")
    assert torch.equal(first, method.message(state, torch.arange(2), Clock(1)).rows)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first[:1], build("flora", {}, cohort(None, seed=1)).message(state, ONE, Clock(1)).rows)
    for rows in (first, second):
        assert bool((rows[:, columns] != 0).all())
        assert float(rows.abs().max()) < 0.5**0.5
        assert not rows[:, ~columns].any()


def test_a_common_start_is_that_of_the_first_round() -> None:
    world = WORLDS["transformer"]()
    scene = world.reach(build("flora", {"start": "common"}, world.cohort))
    begun = world.start(scene.method).rows
    assert torch.equal(scene.rows, begun)
    assert torch.equal(scene.method.message(scene.ledger.state, ONE, Clock(3)).rows, begun)
    assert len(scene.ledger.state.base) == 2


# ---------------------------------------------------------------- both worlds, with the clients' ranks told


def told(world: World) -> World:
    """The same federation, whose methods know that its clients have ranks 1 and 2."""
    return replace(world, cohort=replace(world.cohort, ranks=world.ranks, scale=ALPHA / world.ranks.double()))


SETTINGS: list[dict[str, Any]] = [{}, {"weights": "uniform", "start": "common"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["paper", "uniform, common"])
@pytest.mark.parametrize("kind", WORLDS)
def test_what_is_added_is_the_mean_of_the_products_of_clients_of_any_rank(kind: str, settings: dict[str, Any]) -> None:
    world, ids = told(WORLDS[kind]()), torch.arange(6)
    scene = world.reach(build("flora", settings, world.cohort))
    returned = scene.phase(ids, scene.send(ids)).returned
    change = laws.merge(scene, ids, returned, world.weights(ids))
    counts = torch.ones(6, dtype=torch.float64) if settings else world.weights(ids)
    uploads = world.adapters(ids, returned.rows)
    assert change.base is not None
    for first, second in world.layout.parts[0].pairs():
        wanted = torch.einsum("k,koi->oi", counts / counts.sum(), uploads.product(first.module))
        a, b = change.base[first.module]
        torch.testing.assert_close(b @ a, wanted, rtol=1e-10, atol=1e-12)
        assert len(a) == min(10, first.shape[1], second.shape[0])  # ranks 2 1 2 2 1 2
        assert float(wanted.norm()) > 0


@pytest.mark.parametrize("kind", WORLDS)
def test_all_that_was_learned_is_in_the_base(kind: str) -> None:
    """What clients use has B = 0, and the base has a change of every round."""
    world = told(WORLDS[kind]())
    scene = world.reach(build("flora", {}, world.cohort))
    b = factor_columns(world.layout, "B")
    assert not scene.used()[:, b].any()
    assert bool((scene.used()[:, ~b] != 0).any())
    assert set(join_pairs(scene.ledger.state.base)) == {first.module for first, _ in world.layout.parts[0].pairs()}


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("kind", WORLDS)
def test_the_laws_hold_for_clients_of_different_rank(kind: str, law: str) -> None:
    world, method = told_flora(kind)
    laws.LAWS[law](method, world)


BUILT: dict[str, tuple[World, Method]] = {}


def told_flora(kind: str) -> tuple[World, Method]:
    if kind not in BUILT:
        world = told(WORLDS[kind]())
        BUILT[kind] = world, build("flora", {}, world.cohort)
    return BUILT[kind]
