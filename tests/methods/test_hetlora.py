"""HetLoRA: weights by norms, padding and truncation, and clients that give up pairs; numbers worked by hand."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import ALPHA, WORLDS, World
from torch import Tensor

from fedmira.adapters import Adapters, Layout, Stored, lora_layout
from fedmira.disk.table import Table
from fedmira.engine.round import play
from fedmira.errors import ConfigError
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Memory, Message, Method, State, Tools

SQUARE = lora_layout([("m", 2, 2)], 2)
ONE = torch.zeros(1, dtype=torch.int64)


def cohort(ranks: Tensor | None, count: int = 2) -> Cohort:
    names = tuple(f"c{k}" for k in range(count))
    scale = None if ranks is None else 2.0 / ranks.double()
    return Cohort(names, (1,) * count, ({},) * count, (np.arange(count),), 0, ranks=ranks, scale=scale)


def shared(layout: Layout, rows: Tensor | None = None) -> State:
    start = torch.zeros(1, layout.size, dtype=torch.float64) if rows is None else rows
    rank = layout.parts[0].rank
    scale = torch.tensor([2.0 / rank], dtype=torch.float64)
    return State(Stored(layout, Table(start, ONE, None), torch.tensor([rank]), scale))


def merge(of: Method, state: State, uploads: Tensor, weights: Sequence[float], ids: Sequence[int] = ()) -> Change:
    who, counts = torch.tensor(ids or range(len(uploads))), torch.tensor(weights, dtype=torch.float64)
    return of.merge(state, who, Message(uploads), counts, Clock(1))


def row(*numbers: float, layout: Layout = SQUARE) -> Tensor:
    return torch.tensor([*numbers, *[0.0] * (layout.size - len(numbers))], dtype=torch.float64)


# ---------------------------------------------------------------- the server


def test_weights_are_norms_of_products() -> None:
    """Rank 2, s = 1: B A = [[3 0] [0 0]] with norm 3 and [[0 0] [0 1]] with norm 1, so shares are 3/4 and 1/4."""
    uploads = torch.stack([row(1, 0, 0, 0, 3, 0, 0, 0), row(0, 0, 0, 1, 0, 0, 0, 1)])
    method = build("hetlora", {}, cohort(None))
    change = merge(method, shared(SQUARE), uploads, (1, 9))
    assert change.rows[0, :8].tolist() == [0.75, 0, 0, 0.25, 2.25, 0, 0, 0.25]
    assert (method.facts.weighs, method.facts.needs) == (False, "each")


def test_norms_are_over_all_modules_and_cross_terms_count() -> None:
    """First: 3 and 4 in two modules, norm 5. Second: two pairs with the same direction, 1 + 1, whose norm is 2."""
    layout = lora_layout([("m", 1, 1), ("n", 1, 1)], 2)
    uploads = torch.stack([row(3, 0, 1, 0, 4, 0, 1, 0, layout=layout), row(1, 1, 1, 1, layout=layout)])
    change = merge(build("hetlora", {}, cohort(None)), shared(layout), uploads, (1, 1))
    torch.testing.assert_close(change.rows[0, 4], torch.tensor(4 * 5 / 7, dtype=torch.float64))


@pytest.mark.parametrize(("weights", "first"), [("examples", 0.25), ("uniform", 0.5)])
def test_or_weights_are_those_of_fedavg(weights: str, first: float) -> None:
    uploads = torch.stack([row(1, 0, 0, 0, 3, 0, 0, 0), row()])
    method = build("hetlora", {"weights": weights}, cohort(None))
    assert merge(method, shared(SQUARE), uploads, (1, 3)).rows[0, 0] == first
    assert (method.facts.weighs, method.facts.needs) == (weights == "examples", "sum")


def test_where_nobody_has_learned_anything_the_mean_is_uniform() -> None:
    uploads = torch.stack([row(1, 0), row(0, 3)])
    change = merge(build("hetlora", {}, cohort(None)), shared(SQUARE), uploads, (1, 9))
    assert change.rows[0, :2].tolist() == [0.5, 1.5]


def test_padded_factors_are_those_of_one_scale() -> None:
    """Ranks 1 and 2, s = 2 and 1. Updates 2 [[1 0] [0 0]] and [[0 0] [0 6]]: norms 2 and 6, shares 1/4 and 3/4.

    At the scale 1 of the server the first has B = [[2 -] [0 -]]. A = [[1/4 3/4] -], B = [[2/4 -] [3/4 6 -]].
    """
    uploads = torch.stack([row(1, 0, 0, 0, 1, 0, 0, 0), row(0, 1, 0, 0, 0, 0, 6, 0)])
    before = uploads.clone()
    change = merge(build("hetlora", {}, cohort(torch.tensor([1, 2]))), shared(SQUARE), uploads, (1, 1))
    assert change.rows[0, :8].tolist() == [0.25, 0.75, 0, 0, 0.5, 0, 4.5, 0]
    assert torch.equal(uploads, before)


def test_a_client_is_sent_its_first_pairs_with_the_product_that_they_have() -> None:
    """To rank 1, whose s is 2 instead of 1, B comes halved: the product of the first pair stays."""
    state = shared(SQUARE, row(1, 2, 3, 4, 5, 6, 7, 8)[None])
    method = build("hetlora", {}, cohort(torch.tensor([1, 2])))
    sent = method.message(state, torch.arange(2), Clock(1)).rows
    assert sent[:, :8].tolist() == [[1, 2, 0, 0, 2.5, 0, 3.5, 0], [1, 2, 3, 4, 5, 6, 7, 8]]


# ---------------------------------------------------------------- the client

WIDE = lora_layout([("m", 2, 2)], 4)


def tools() -> Tools:
    """No loss of its own, and steps of plain gradient descent of rate 1."""
    nothing: Any = None
    return Tools(
        Clock(1),
        grad=lambda some: (torch.zeros(len(some)), torch.zeros_like(some.rows)),
        update=lambda some, gradient, *, of="main": some.with_rows(some.rows - gradient),
        rng=nothing,
        curvature=nothing,
        loss=nothing,
        each=nothing,
    )


def begun(method: Method, *rows: Tensor, ranks: Sequence[int] = (4,)) -> tuple[Adapters, Memory]:
    start = Adapters(WIDE, torch.stack(rows), torch.tensor(ranks), torch.ones(len(rows)).double())
    return method.client.begin(start, method.client.start(start), Message(start.rows), tools())


def last_pair(a: Sequence[float], b: Sequence[float]) -> Tensor:
    """A row of rank 4 whose first pair is A = [1 1], B = [1 1]', and whose last is A = a, B = b."""
    return row(1, 1, 0, 0, 0, 0, *a, 1, 0, 0, b[0], 1, 0, 0, b[1], layout=WIDE)


def test_the_penalty_pulls_the_pairs_on_trial_by_hand() -> None:
    """gamma 0.75: t = 3. ||A[3:]|| = ||3 4|| = 5, ||B[:, 3:]|| = ||0 2|| = 2, lambda = 1/10.

    dA = 1/10 x 2 x [3 4] / 5 = [0.12 0.16], dB = 1/10 x 5 x [0 2] / 2 = [0 0.5].
    """
    method = build("hetlora", {"gamma": 0.75, "lambda": 0.1}, cohort(None))
    adapters, memory = begun(method, last_pair([3, 4], [0, 2]))
    assert memory["hetlora_begun"].tolist() == [10]
    stepped, _ = method.client.step(adapters, memory, Message(adapters.rows), tools())
    torch.testing.assert_close(stepped.rows[0], last_pair([2.88, 3.84], [0, 1.5]))


def test_a_factor_of_zero_is_not_pushed_anywhere() -> None:
    method = build("hetlora", {"gamma": 0.75, "lambda": 0.1}, cohort(None))
    adapters, memory = begun(method, last_pair([3, 4], [0, 0]))
    stepped, _ = method.client.step(adapters, memory, Message(adapters.rows), tools())
    torch.testing.assert_close(stepped.rows[0], last_pair([3, 4], [0, 0]))


def test_who_has_less_in_the_pairs_on_trial_than_before_gives_them_up() -> None:
    """Products of norms were 10, 10, 10 and are 9, 11, 10: the first goes from rank 4 to 3, the others stay."""
    method = build("hetlora", {"gamma": 0.75}, cohort(None))
    adapters, memory = begun(method, *[last_pair([3, 4], [0, 2])] * 3, ranks=(4, 4, 4))
    after = torch.stack([last_pair([3, 4], [0, b]) for b in (1.8, 2.2, 2.0)])
    message, memory = method.client.finish(adapters.with_rows(after.clone()), memory, Message(after), tools())
    assert message.rows.tolist() == [last_pair([0, 0], [0, 0]).tolist(), *after[1:].tolist()]
    assert {name: value.tolist() for name, value in memory.items()} == {"hetlora_ranks": [[3], [4], [4]]}
    assert message.scalars["rank"].tolist() == [3, 4, 4]


def test_what_was_given_up_stays_zero_in_training_and_in_use() -> None:
    """Even if the server sends something there, and the optimizer would move it."""
    method = build("hetlora", {"gamma": 0.75, "lambda": 0}, cohort(None))
    sent = Adapters(WIDE, last_pair([3, 4], [0, 2])[None], torch.tensor([4]), torch.ones(1).double())
    memory = {"hetlora_ranks": torch.tensor([[3]])}
    used = method.client.use(sent, memory, Message(sent.rows), tools())
    assert used.rows[0].tolist() == last_pair([0, 0], [0, 0]).tolist()
    assert sent.rows[0].tolist() == last_pair([3, 4], [0, 2]).tolist()
    adapters, memory = method.client.begin(sent, memory, Message(sent.rows), tools())
    assert adapters.rows[0].tolist() == last_pair([0, 0], [0, 0]).tolist()
    pushed = replace(tools(), grad=lambda some: (torch.zeros(1), torch.ones_like(some.rows)))
    stepped, _ = method.client.step(adapters, memory, Message(sent.rows), pushed)
    before = last_pair([0, 0], [0, 0])[:16]
    mask = row(*[1] * 6, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, layout=WIDE)[:16]
    assert stepped.rows[0, :16].tolist() == ((before - 1) * mask).tolist()


@pytest.mark.parametrize(
    ("gamma", "ranks", "kept"), [(0.99, 4, 3), (0.5, 4, 2), (0.5, 1, 1), (0.01, 3, 1), (0.29, 100, 29), (0.99, 100, 99)]
)
def test_how_many_pairs_are_kept(gamma: float, ranks: int, kept: int) -> None:
    """Rounded down, one at least."""
    layout = lora_layout([("m", 1, 1)], ranks)
    method = build("hetlora", {"gamma": gamma}, cohort(None))
    start = Adapters(layout, torch.ones(1, layout.size).double(), torch.tensor([ranks]), torch.ones(1).double())
    _, memory = method.client.begin(start, method.client.start(start), Message(start.rows), tools())
    shrunk = start.with_rows(start.rows * 0.9)
    message, memory = method.client.finish(shrunk, memory, Message(shrunk.rows), tools())
    assert memory["hetlora_ranks"].tolist() == [[kept]]
    assert int((message.rows[0, : 2 * ranks] != 0).sum()) == 2 * kept


def test_modules_of_other_ranks_fall_each_by_its_share_and_together() -> None:
    """Ranks 4 and 2, gamma 0.5: the sum of both decides."""
    layout = lora_layout([("m", 1, 1), ("n", 1, 1)], [4, 2])
    method = build("hetlora", {"gamma": 0.5}, cohort(None))
    start = Adapters(layout, torch.ones(1, layout.size).double(), torch.tensor([[4, 2]]), torch.ones(1, 2).double())
    _, memory = method.client.begin(
        start.with_rows(start.rows.clone()), method.client.start(start), Message(start.rows), tools()
    )
    assert memory["hetlora_begun"].tolist() == pytest.approx([2 + 1])
    after = start.rows.clone()
    after[0, :8] = 1.2  # 2 x 1.44, and with 0 in the other module the sum falls all the same
    after[0, 8:12] = 0
    _, memory = method.client.finish(start.with_rows(after), memory, Message(after), tools())
    assert memory["hetlora_ranks"].tolist() == [[2, 1]]


@pytest.mark.parametrize("settings", [{"gamma": 0}, {"gamma": 1.5}, {"lambda": -1}, {"weights": "norms"}], ids=str)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build("hetlora", settings, cohort(None))


# ---------------------------------------------------------------- both worlds


@functools.cache
def told(kind: str) -> World:
    """The same federation, whose methods know that its clients have ranks 1 and 2."""
    world = WORLDS[kind]()
    return replace(world, cohort=replace(world.cohort, ranks=world.ranks, scale=ALPHA / world.ranks.double()))


@functools.cache
def pruned(kind: str) -> Method:
    """A penalty so strong that pairs are given up."""
    return build("hetlora", {"gamma": 0.5, "lambda": {"quadratic": 5.0, "transformer": 1.0}[kind]}, told(kind).cohort)


@pytest.mark.parametrize("kind", WORLDS)
def test_without_pruning_and_by_examples_it_is_fedavg_to_the_bit(kind: str) -> None:
    world = WORLDS[kind]()
    method, fedavg = (
        build(name, settings, world.cohort)
        for name, settings in (("hetlora", {"gamma": 1, "weights": "examples"}), ("fedavg", {}))
    )
    laws.law_a_zero_penalty_is_the_simpler_neighbour(method, world, simpler=fedavg)
    by_norm = build("hetlora", {"gamma": 1}, world.cohort)
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(by_norm, world, simpler=fedavg)


@pytest.mark.parametrize("law", [law for law in laws.LAWS if "a_returning_client" not in law])  # it is sent its cut
@pytest.mark.parametrize("kind", WORLDS)
def test_the_laws_hold_where_ranks_differ_and_fall(kind: str, law: str) -> None:
    laws.LAWS[law](pruned(kind), told(kind))


@pytest.mark.parametrize("kind", WORLDS)
def test_ranks_fall_in_the_rounds_and_never_rise(kind: str) -> None:
    """Some clients of rank 2 come to rank 1, those of rank 1 stay, and client 5, which never trains, has its own."""
    world, method = told(kind), pruned(kind)
    scene = world.reach(method)
    begun = world.ranks[:, None].expand(-1, len(list(world.layout.parts[0].pairs())))
    most = begun
    for ids in ([0, 1, 3, 4], [0, 2, 3], [0, 1, 2, 3, 4]):
        scene.play(torch.tensor(ids))
        ranks = scene.remembered()["method/hetlora_ranks"]
        known = torch.where(ranks > 0, ranks, begun)  # 0 = has not trained
        assert bool((known <= most).all())
        assert not scene.used()[~world.layout.rank_mask(known)].any()
        assert bool((scene.used()[world.layout.rank_mask(known)] != 0).any())
        most = known
    assert int((most < begun).sum()) >= 2
    assert int(most.min()) == 1
    assert not ranks[5].any()


def test_pairs_that_were_given_up_are_counted_all_the_same() -> None:
    world, method, ids = told("quadratic"), pruned("quadratic"), torch.arange(5)
    plain = build("fedavg", {}, world.cohort)
    scenes = [world.reach(one) for one in (method, plain)]
    mine, theirs = (play(scene.method, scene.ledger, scene.clients, ids, scene.clock) for scene in scenes)
    assert mine.bytes_down == theirs.bytes_down
    assert mine.bytes_up == theirs.bytes_up + 8 * len(ids)  # the rank
