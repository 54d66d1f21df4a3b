"""FedFomo: whose rows a client is sent, what its own loss makes of them, what it tells of it; numbers by hand."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import WORLDS, World
from torch import Tensor

from fedmira.adapters import Adapters, Stored, lora_layout
from fedmira.disk.table import Table
from fedmira.engine.ledger import _grown
from fedmira.engine.round import play
from fedmira.errors import ConfigError, MethodError
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, State, Tools

LAYOUT = lora_layout([("m", 1, 1)], 1)  # A and B, one number each, and 14 that align
SURE = {"epsilon": 0}


def cohort(count: int, **known: Any) -> Cohort:
    names = tuple(f"c{k}" for k in range(count))
    return Cohort(names, (1,) * count, ({},) * count, (), seed=3, **known)


def served(of: Method, rows: Sequence[float], *, trained: Sequence[int], affinity: Sequence[Sequence[float]]) -> State:
    """A server whose client k has the row (rows[k], 0)."""
    count = len(rows)
    start = torch.zeros(count, LAYOUT.size, dtype=torch.float64)
    start[:, 0] = torch.tensor(rows, dtype=torch.float64)
    ones = torch.ones(count)
    stored = Stored(LAYOUT, Table(start, torch.arange(count), None), ones.long(), ones.double())
    state = of.init(stored, Clock(0))
    state.tables["trained"][list(trained)] = 1
    state.tables["affinity"][:] = torch.tensor(affinity)
    return state


def others(of: Method, state: State, ids: Sequence[int], number: int = 2) -> list[list[float | None]]:
    """The first number of the rows that these clients are sent beside their own; None = none."""
    message = of.message(state, torch.tensor(ids), Clock(number))
    names = sorted(message.more)
    return [
        [None if message.absent[name][place] else float(message.more[name][place, 0]) for name in names]
        for place in range(len(ids))
    ]


# ---------------------------------------------------------------- whose rows


def test_a_client_is_sent_those_of_its_largest_affinity_that_have_trained() -> None:
    """Client 0 likes 3, then 1, then 2, which has not trained; itself, whom it likes most, it is not sent."""
    method = build("fedfomo", {"M": 2, **SURE}, cohort(4))
    liked = [[9.0, 1.0, 2.0, 3.0], [0.0, 0, 0, 0], [1.0, 0, 0, 2.0], [0, 0, 0, 0]]
    state = served(method, [10, 11, 12, 13], trained=[0, 1, 3], affinity=liked)
    assert others(method, state, [0, 2]) == [[13, 11], [13, 10]]
    assert method.message(state, torch.tensor([2]), Clock(2)).rows[0, 0] == 12


def test_before_anybody_has_trained_there_is_nothing_to_send() -> None:
    method = build("fedfomo", {"M": 2, **SURE}, cohort(3))
    state = served(method, [10, 11, 12], trained=[], affinity=[[0.0] * 3] * 3)
    message = method.message(state, torch.tensor([0, 1]), Clock(1))
    assert all(bool(gone.all()) for gone in message.absent.values())
    assert not any(rows.any() for rows in message.more.values())


def test_fewer_than_m_others_leave_places_empty() -> None:
    method = build("fedfomo", {"M": 3, **SURE}, cohort(3))
    state = served(method, [10, 11, 12], trained=[0, 2], affinity=[[0.0] * 3] * 3)
    assert others(method, state, [0, 1]) == [[12, None, None], pytest.approx([10, 12, None], abs=2.1)]


def test_epsilon_offers_any_and_falls_from_round_to_round() -> None:
    """One of nine others, 150 draws. epsilon = 1: each about 17 times. In round 11 it is 1 - 10 x 0.05 = 1/2."""
    liked = [[0.0, *[0.0] * 8, 1.0], *[[0.0] * 10] * 9]
    for number, decay, wanted in ((1, 1.0, 1 / 9), (11, 0.05, 1 / 2 + 1 / 18), (30, 0.05, 1.0), (11, 0.0, 1 / 9)):
        best = 0
        for seed in range(150):
            method = build("fedfomo", {"M": 1, "epsilon": 1, "decay": decay}, replace(cohort(10), seed=seed))
            state = served(method, list(range(10)), trained=range(10), affinity=liked)
            best += others(method, state, [0], number) == [[9]]
        assert best / 150 == pytest.approx(wanted, abs=0.1)


def test_ties_are_drawn_for_each_round_and_client_and_do_not_depend_on_company() -> None:
    method = build("fedfomo", {"M": 2, **SURE}, cohort(8))
    state = served(method, list(range(8)), trained=range(8), affinity=[[0.0] * 8] * 8)
    together = others(method, state, range(8))
    assert together == [others(method, state, [k])[0] for k in range(8)]
    assert len({tuple(some) for some in together}) > 3
    assert together != others(method, state, range(8), 3)
    assert all(len({k, *some}) == 3 for k, some in enumerate(together))


def test_a_row_of_another_rank_comes_at_the_product_that_it_has() -> None:
    """Ranks 1 and 2 with scales 2 and 1: B of client 0 is doubled for client 1, and that of 1 halved for 0."""
    layout = lora_layout([("m", 1, 1)], 2)
    rows = torch.zeros(2, layout.size, dtype=torch.float64)
    rows[:, :4] = torch.tensor([[1.0, 0, 3, 0], [1.0, 1, 5, 7]])
    ranks, scale = torch.tensor([1, 2]), torch.tensor([2.0, 1.0], dtype=torch.float64)
    method = build("fedfomo", {"M": 1, **SURE}, cohort(2, ranks=ranks, scale=scale))
    state = method.init(Stored(layout, Table(rows, torch.arange(2), None), ranks, scale), Clock(0))
    state.tables["trained"][:] = 1
    more = method.message(state, torch.arange(2), Clock(2)).more["other_0"]
    assert more[:, :4].tolist() == [[1, 1, 2.5, 3.5], [1, 0, 6, 0]]


# ---------------------------------------------------------------- what a client makes of them


def tools(losses: Mapping[float, float], *, reports: bool = True) -> Tools:
    """A validation loss by the first number of a row."""
    nothing: Any = None

    def loss(adapters: Adapters, *, on: str = "validation") -> Tensor:
        return torch.tensor([losses[float(row[0])] for row in adapters.rows], dtype=torch.float64)

    return Tools(Clock(2), nothing, nothing, nothing, nothing, loss, nothing, reports)


def row(number: float) -> Tensor:
    one = torch.zeros(1, LAYOUT.size, dtype=torch.float64)
    one[0, 0] = number
    return one


def begin(
    losses: Mapping[float, float],
    *,
    v: float,
    own: float,
    sent: Sequence[float | None],
    reports: bool = True,
    baseline: str = "first",
) -> tuple[float, dict[str, float], Memory]:
    """The number that a client starts from, what it tells, and what it keeps."""
    method = build("fedfomo", {"M": len(sent), "baseline": baseline}, cohort(9))
    adapters = Adapters(LAYOUT, row(own), torch.ones(1).long(), torch.ones(1).double())
    more = {f"other_{place}": row(0 if number is None else number) for place, number in enumerate(sent)}
    absent = {f"other_{place}": torch.tensor([number is None]) for place, number in enumerate(sent)}
    given = Message(adapters.rows, more=more, absent=absent)
    box = tools(losses, reports=reports)
    begun, memory = method.client.begin(adapters, {"fedfomo_v": row(v)}, given, box)
    message, memory = method.client.finish(begun, memory, given, box)
    return float(begun.rows[0, 0]), {name: float(value) for name, value in message.scalars.items()}, memory


def test_weights_are_what_the_loss_falls_by_over_the_distance() -> None:
    """From v = 0 with loss 10: own 2 at 6 gives (10 - 6) / 2 = 2; 4 at 6 gives 1; -1 at 9 gives 1; 5 at 15 gives -1.

    Shares 1/2, 1/4, 1/4: 0 + 2/2 + 4/4 - 1/4 = 1.75. Told: 1/5, 1/5, -1/5 of 2 + 1 + 1 + |-1|.
    """
    losses = {0.0: 10.0, 2.0: 6.0, 4.0: 6.0, -1.0: 9.0, 5.0: 15.0}
    begun, told, memory = begin(losses, v=0, own=2, sent=[4, -1, 5])
    assert begun == 1.75
    assert told == pytest.approx({"other_0": 0.2, "other_1": 0.2, "other_2": -0.2, "told": 1})
    assert {name: float(value[0, 0]) for name, value in memory.items()} == {"fedfomo_v": 1.75}


def test_where_nothing_is_better_a_client_goes_back_to_what_it_began_from() -> None:
    begun, told, _ = begin({0.0: 10.0, 2.0: 11.0, 4.0: 12.0}, v=0, own=2, sent=[4])
    assert begun == 0
    assert told == {"other_0": -0.5, "told": 1}


def test_from_its_last_row_a_client_asks_others_to_be_better_than_its_own_training() -> None:
    """Own 2 at 6 and another, 4 at 5: (6 - 5) / 2 is all there is. With 7 it stays at 2, and not at 0."""
    assert begin({2.0: 6.0, 4.0: 5.0}, v=0, own=2, sent=[4], baseline="last")[0] == 4
    assert begin({2.0: 6.0, 4.0: 7.0}, v=0, own=2, sent=[4], baseline="last")[0] == 2


def test_a_row_that_is_absent_is_no_candidate_and_is_not_scored() -> None:
    begun, told, _ = begin({1.0: 10.0, 2.0: 6.0}, v=1, own=2, sent=[None])
    assert begun == 2
    assert told == {"other_0": 0, "told": 1}


def test_in_the_first_round_nothing_is_scored_and_nothing_told() -> None:
    begun, told, _ = begin({}, v=2, own=2, sent=[None, None])
    assert begun == 2
    assert told == {"other_0": 0, "other_1": 0, "told": 0}


def test_a_client_without_validation_trains_alone_and_tells_nothing() -> None:
    nan = float("nan")
    begun, told, _ = begin({0.0: nan, 2.0: nan, 4.0: nan}, v=0, own=2, sent=[4])
    assert begun == 2
    assert told == {"other_0": 0, "told": 0}


def test_a_loss_that_has_diverged_is_one_of_a_hundred_nats() -> None:
    """(10 - 100) / 4 against (10 - 6) / 2: told -22.5 / 24.5."""
    begun, told, _ = begin({0.0: 10.0, 2.0: 6.0, 4.0: float("inf")}, v=0, own=2, sent=[4])
    assert begun == 2
    assert told["other_0"] == pytest.approx(-22.5 / 24.5)


def test_a_client_that_shares_no_figures_tells_nothing_that_follows_from_losses() -> None:
    losses = {0.0: 10.0, 2.0: 6.0, 4.0: 6.0}
    begun, told, _ = begin(losses, v=0, own=2, sent=[4], reports=False)
    assert begun == begin(losses, v=0, own=2, sent=[4])[0]
    assert told == {"other_0": 0, "told": 0}


# ---------------------------------------------------------------- the server


def test_affinity_grows_by_what_clients_tell_of_those_that_they_were_sent() -> None:
    method = build("fedfomo", {"M": 2, **SURE}, cohort(4))
    liked = [[0.0, 0.1, 0.2, 0.3], *[[0.0, 0, 0, 0]] * 3]
    state = served(method, [10, 11, 12, 13], trained=[2, 3], affinity=liked)
    returned = Message(
        torch.cat([row(20), row(21)]),
        {
            "other_0": torch.tensor([0.5, 0.25]).double(),
            "other_1": torch.tensor([-0.25, 0.0]).double(),
            "told": torch.ones(2).double(),
        },
    )
    change = method.merge(state, torch.tensor([0, 1]), returned, torch.ones(2), Clock(2))
    assert torch.equal(change.rows, returned.rows)  # as they were uploaded
    torch.testing.assert_close(change.tables["affinity"][0], torch.tensor([0.0, 0.1, -0.05, 0.8]))
    assert sorted(change.tables["affinity"][1].tolist()) == [0, 0, 0, 0.25]
    assert change.tables["trained"].tolist() == [1, 1]
    assert state.tables["affinity"].tolist()[0] == pytest.approx(liked[0])


def test_what_was_said_of_an_empty_place_is_nobodys() -> None:
    method = build("fedfomo", {"M": 1, **SURE}, cohort(2))
    state = served(method, [10, 11], trained=[], affinity=[[0.0, 0]] * 2)
    returned = Message(row(20), {"other_0": torch.ones(1).double(), "told": torch.ones(1).double()})
    assert not method.merge(state, torch.tensor([0]), returned, torch.ones(1), Clock(1)).tables["affinity"].any()


def test_a_federation_without_a_validation_example_is_refused_with_the_way_out() -> None:
    with pytest.raises(MethodError, match=r"no client has a validation example; raise data.split.validation"):
        build("fedfomo", {}, cohort(3, validation=(0, 0, 0)))
    assert build("fedfomo", {}, cohort(3, validation=(0, 1, 0))).regime.scorings == 2 + 4


@pytest.mark.parametrize("settings", [{"M": -1}, {"epsilon": 2}, {"decay": -0.1}, {"baseline": "mean"}], ids=str)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build("fedfomo", settings, cohort(3))


# ---------------------------------------------------------------- both worlds


@functools.cache
def world_of(kind: str) -> World:
    return WORLDS[kind]()


@pytest.mark.parametrize("kind", WORLDS)
def test_without_others_and_from_its_last_row_it_is_local_training_to_the_bit(kind: str) -> None:
    world = world_of(kind)
    alone, local = build("fedfomo", {"M": 0, "baseline": "last"}, world.cohort), build("local", {}, world.cohort)
    laws.law_a_zero_penalty_is_the_simpler_neighbour(alone, world, simpler=local)
    others = build("fedfomo", {}, world.cohort)
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(others, world, simpler=local)


@pytest.mark.parametrize("kind", WORLDS)
def test_rows_that_are_not_handed_to_a_client_do_not_reach_it(kind: str) -> None:
    """Other stored rows of all that it was not sent: the same bits for it. And of one that it was sent: others."""
    world = world_of(kind)
    method = build("fedfomo", {"M": 2, "epsilon": 0}, world.cohort)
    scene = world.reach(method)
    scene.play(torch.arange(5))
    one, rows = torch.tensor([0]), scene.rows
    given = scene.send(one)
    first = slice(world.layout.parts[0].leaves[0].shape[1])  # of A, which is sent as it is
    met = [j for j in range(1, 5) if any(torch.equal(rows[j, first], more[0, first]) for more in given.more.values())]
    assert len(met) == 2

    def disturbed(ids: Sequence[int]) -> tuple[list[float], dict[str, float]]:
        other = scene.copy()
        other.ledger.table.write(torch.tensor(ids, dtype=torch.int64), 0.5 * rows[list(ids)])
        phase = other.phase(one, other.send(one))
        return phase.rows[0].tolist(), {name: float(value) for name, value in phase.returned.scalars.items()}

    plain, of_strangers, of_met = (disturbed(some) for some in ([], [j for j in range(1, 5) if j not in met], met))
    assert of_strangers == plain
    assert of_met != plain


def test_what_is_handed_on_is_counted_and_empty_places_are_not() -> None:
    """Nobody has trained before round 1; then clients 0, 2 and 3 have, and of M = 4 places two or three are filled."""
    world = world_of("quadratic")
    fomo, local = build("fedfomo", {}, world.cohort), build("mira", {"lambda": 0}, world.cohort)
    first = torch.tensor([0, 2, 3])
    for scene in (scenes := [world.start(method) for method in (fomo, local)]):
        scene.play(first)
    ids = torch.tensor([0, 1])  # of rank 2 and 1; the first has trained itself
    mine, theirs = (play(scene.method, scene.ledger, scene.clients, ids, scene.clock) for scene in scenes)
    sizes = [8 * int(world.layout.sizes(torch.tensor([rank]))) for rank in (2, 1)]
    assert mine.bytes_down - theirs.bytes_down == 2 * sizes[0] + 3 * sizes[1]
    assert mine.bytes_up - theirs.bytes_up == 2 * 8 * (4 + 1)


def test_a_table_of_fewer_clients_is_filled_up_where_clients_have_joined() -> None:
    assert _grown(torch.ones(2, 3), torch.zeros(5, 4)).tolist() == [[1, 1, 1, 0]] * 2
    same = torch.ones(2, 4)
    assert _grown(same, torch.zeros(5, 4)) is same
