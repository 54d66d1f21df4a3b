"""raFLoRA: the mean of each pair over those who have it; numbers worked by hand, FlexLoRA where ranks are equal."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import ALPHA, NEXT, WORLDS, World
from torch import Tensor

from fedmira.adapters import Layout, Stored, lora_layout
from fedmira.disk.table import Table
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Message, Method, State

SQUARE = lora_layout([("m", 2, 2)], 2)
ONE = torch.zeros(1, dtype=torch.int64)


def cohort(ranks: Tensor | None, count: int = 2) -> Cohort:
    names = tuple(f"c{k}" for k in range(count))
    scale = None if ranks is None else 2.0 / ranks.double()
    return Cohort(names, (1,) * count, ({},) * count, (np.arange(count),), 0, ranks=ranks, scale=scale)


def method(*ranks: int, **settings: Any) -> Method:
    return build("raflora", settings, cohort(torch.tensor(ranks), len(ranks)))


def shared(layout: Layout, rows: Tensor | None = None) -> State:
    start = torch.zeros(1, layout.size, dtype=torch.float64) if rows is None else rows
    rank = layout.parts[0].rank
    scale = torch.tensor([2.0 / rank], dtype=torch.float64)
    return State(Stored(layout, Table(start, ONE, None), torch.tensor([rank]), scale))


def update(of: Method, state: State, uploads: Tensor, weights: Sequence[float], ids: Sequence[int] = ()) -> Tensor:
    """The update of module m that the merge leaves with the server."""
    who, counts = torch.tensor(ids or range(len(uploads))), torch.tensor(weights, dtype=torch.float64)
    change = of.merge(state, who, Message(uploads), counts, Clock(1))
    return state.adapters.take(ONE, rows=change.rows).product("m")[0]


def row(*numbers: float, layout: Layout = SQUARE) -> Tensor:
    return torch.tensor([*numbers, *[0.0] * (layout.size - len(numbers))], dtype=torch.float64)


def close(found: Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# First pair: 2 x [[1 0] [0 0]] of client 0 and 1 x [[4 0] [0 0]] of client 1, which alone has a second: [[0 0] [0 6]].
UPLOADS = torch.stack([row(1, 0, 0, 0, 1, 0, 0, 0), row(1, 0, 0, 1, 4, 0, 0, 6)])


def test_a_pair_is_the_mean_over_those_who_have_it() -> None:
    """First: 1/4 x 2 + 3/4 x 4 = 3.5. Second: all of 6, where FlexLoRA has 3/4 x 6 = 4.5."""
    close(update(method(1, 2), shared(SQUARE), UPLOADS, (1, 3)), [[3.5, 0], [0, 6]])
    flex = build("flexlora", {}, cohort(torch.tensor([1, 2])))
    close(update(flex, shared(SQUARE), UPLOADS, (1, 3)), [[3.5, 0], [0, 4.5]])


def test_uniform_weights_count_every_client_the_same() -> None:
    of = method(1, 2, weights="uniform")
    close(update(of, shared(SQUARE), UPLOADS, (1, 3)), [[3, 0], [0, 6]])
    assert not of.facts.weighs


def test_among_three_clients_each_pair_has_its_own_total() -> None:
    """Ranks 1, 2, 2 and examples 1, 1, 3. Pair 1: (2 + 1 + 3 x 1) / 5. Pair 2: (1 x 4 + 3 x 8) / 4."""
    uploads = torch.stack([row(1, 0, 0, 0, 1, 0, 0, 0), row(1, 0, 0, 1, 1, 0, 0, 4), row(1, 0, 0, 1, 1, 0, 0, 8)])
    close(update(method(1, 2, 2), shared(SQUARE), uploads, (1, 1, 3)), [[1.2, 0], [0, 7]])


@pytest.mark.parametrize(("missing", "second"), [("kept", 5.0), ("dropped", 0.0)])
def test_a_pair_that_nobody_of_the_round_has(missing: str, second: float) -> None:
    """Only client 0, of rank 1, answers; the server's own second pair is [[0 0] [0 5]], its first [[9 0] [0 0]]."""
    state = shared(SQUARE, row(1, 0, 0, 1, 9, 0, 0, 5)[None])
    close(update(method(1, 2, missing=missing), state, UPLOADS[:1], (1,), (0,)), [[2, 0], [0, second]])


def test_who_answered_says_whose_rank_an_upload_has() -> None:
    close(update(method(1, 2), shared(SQUARE), UPLOADS[1:], (3,), (1,)), [[4, 0], [0, 6]])


def test_uploads_are_only_read() -> None:
    before = UPLOADS.clone()
    update(method(1, 2), shared(SQUARE), UPLOADS, (1, 3))
    assert torch.equal(UPLOADS, before)


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(MethodError, match="2 clients sum to 0"):
        update(method(1, 2), shared(SQUARE), UPLOADS, (0, 0))


@pytest.mark.parametrize("settings", [{"missing": "lost"}, {"weights": "norm"}], ids=str)
def test_unknown_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        method(1, 2, **settings)


# ---------------------------------------------------------------- both worlds


@functools.cache
def told(kind: str) -> World:
    """The same federation, whose methods know that its clients have ranks 1 and 2."""
    world = WORLDS[kind]()
    return replace(world, cohort=replace(world.cohort, ranks=world.ranks, scale=ALPHA / world.ranks.double()))


@functools.cache
def of_world(kind: str) -> Method:
    return build("raflora", {}, told(kind).cohort)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("kind", WORLDS)
def test_where_all_have_one_rank_it_is_flexlora_to_the_bit(kind: str, weights: str) -> None:
    world = WORLDS[kind]()
    mine, theirs = (build(name, {"weights": weights}, world.cohort) for name in ("raflora", "flexlora"))
    laws.law_a_zero_penalty_is_the_simpler_neighbour(mine, world, simpler=theirs)


@pytest.mark.parametrize("kind", WORLDS)
def test_where_those_who_answer_have_the_largest_rank_it_is_flexlora(kind: str) -> None:
    """In a federation of mixed ranks, so by the sum over pairs: clients 0, 2 and 3, all of rank 2."""
    world, ids = told(kind), torch.tensor([0, 2, 3])
    mine, theirs = (world.start(build(name, {}, world.cohort)) for name in ("raflora", "flexlora"))
    changes = [scene.play(ids).rows for scene in (mine, theirs)]
    for leaf in world.layout.parts[0].leaves[::2]:
        one, other = (mine.ledger.state.adapters.take(ONE, rows=rows).product(leaf.module) for rows in changes)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("law", [law for law in laws.LAWS if "a_returning_client" not in law])  # it is sent its cut
@pytest.mark.parametrize("kind", WORLDS)
def test_the_laws_hold_for_clients_of_different_rank(kind: str, law: str) -> None:
    laws.LAWS[law](of_world(kind), told(kind))


@pytest.mark.parametrize("kind", WORLDS)
def test_the_merge_is_the_formula_of_dense_matrices(kind: str) -> None:
    """Whose rank 2 is all that the sum of these clients' pairs is cut to."""
    world, ids = told(kind), torch.tensor(NEXT)
    scene = world.reach(of_world(kind))
    returned = scene.phase(ids, scene.send(ids)).returned
    change = laws.merge(scene, ids, returned, world.weights(ids))
    found = scene.ledger.state.adapters.take(ONE, rows=change.rows)
    uploads, counts = world.adapters(ids, returned.rows), world.weights(ids)
    for first, second in world.layout.parts[0].pairs():
        dense = torch.zeros(second.shape[0], first.shape[1], dtype=torch.float64)
        for pair in range(2):
            having = [n for n, k in enumerate(NEXT) if world.ranks[k] > pair]
            for n in having:
                share = counts[n] / sum(counts[m] for m in having)
                a, b = uploads.leaf(first)[n, pair], uploads.leaf(second)[n, :, pair]
                dense += share * uploads.scale[n] * torch.outer(b, a)
        u, values, v = torch.linalg.svd(dense, full_matrices=False)
        wanted = (u[:, :2] * values[:2]) @ v[:2]
        torch.testing.assert_close(found.product(first.module)[0], wanted, rtol=1e-9, atol=1e-11)
