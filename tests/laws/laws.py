"""The laws of methods: each takes a method and a world, and raises AssertionError where it is broken."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tests.laws.worlds import ALL, CLIENTS, EVERYONE, NEXT, Scene, World
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.methods.base import Change, Clock, Memory, Message, Method, Tools, use_what_was_sent

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
ROUND = Clock(3)
IDS = torch.tensor(NEXT)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text: f"{what}: {text}")


def copy(message: Message) -> Message:
    return replace(message.map(torch.clone), scalars={name: value.clone() for name, value in message.scalars.items()})


def whole(scene: Scene, ids: Tensor, returned: Message) -> Message:
    """Uploads of a phase as the server's merge gets them: columns that do not travel are those it sent."""
    method, layout = scene.method, scene.ledger.federation.layout
    sends = method.travels(layout, ROUND) & method.trained(layout, ROUND)
    server = method.message(scene.ledger.state, ids, ROUND).rows
    return returned.map(lambda rows: torch.where(sends, rows, server))


def merge(scene: Scene, ids: Tensor, returned: Message, weights: Tensor) -> Change:
    return scene.method.merge(scene.ledger.state, ids, returned, weights, ROUND)


def rows_after(scene: Scene, change: Change) -> Tensor:
    """The row that the server has for everyone once a change is applied [K, P], before ranks cut it."""
    scene.ledger.apply(change)
    return scene.rows[scene.method.row_of(ALL)]


def uploads(ids: Tensor, world: World, *, seed: int = 0) -> Tensor:
    """Any rows that clients of these ranks might return."""
    stream = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(ids), world.layout.size, generator=stream, dtype=torch.float64)
    return world.adapters(ids, rows).mask_().rows


def message(method: Method, world: World, rows: Tensor) -> Message:
    """Rows [n, P] as a message of the form that this method's clients return: scalars 0, further rows these again."""
    like = world.trained(method).returned
    scalars = {name: torch.zeros(len(rows), dtype=value.dtype) for name, value in like.scalars.items()}
    return Message(rows, scalars, {name: rows.clone() for name in like.more})


def law_a_batch_of_one_equals_a_batch_of_all(method: Method, world: World) -> None:
    """A client trained alone returns and keeps what it does among others."""
    scene = world.reach(method)
    given = scene.send(IDS)
    together = world.trained(method)
    for place in range(len(IDS)):
        one = torch.tensor([place])
        alone = scene.phase(IDS[one], given.take(one))
        name = f"client {int(IDS[place])}"
        close(alone.rows, together.rows[one], f"{name}, its own row")
        close(alone.returned.rows, together.returned.rows[one], f"{name}, row")
        pairs = [(alone.returned.scalars, together.returned.scalars), (alone.returned.more, together.returned.more)]
        pairs += [(alone.memory, together.memory)]
        pairs += [(alone.moments[of], together.moments[of]) for of in together.moments]
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                close(value, theirs[key][one], f"{name}, {key}")


def law_the_order_in_the_stack_does_not_matter(method: Method, world: World) -> None:
    """Sampled clients in another order: the same answer for each of them."""
    order = torch.tensor([2, 0, 3, 1])
    scene = world.reach(method)
    given = scene.send(IDS)
    close(scene.send(IDS[order]).rows, given.rows[order], "send")
    returned = whole(scene, IDS, world.trained(method).returned)
    shuffled = whole(scene, IDS[order], scene.phase(IDS[order], given.take(order)).returned)
    close(shuffled.rows, returned.rows[order], "training")
    weights = world.weights(IDS)
    change = merge(scene, IDS, copy(returned), weights)
    other = merge(scene, IDS[order], returned.take(order), weights[order])
    assert sorted(other.ids.tolist()) == sorted(change.ids.tolist())
    back = torch.tensor([other.ids.tolist().index(k) for k in change.ids.tolist()], dtype=torch.int64)
    close(other.rows[back], change.rows, "merge")


def law_renaming_clients_renames_the_answer(
    method: Method, world: World, *, rebuild: Callable[[World], Method]
) -> None:
    """All clients at other positions, the graph with them: after three rounds each has what it had."""
    order = [4, 2, 5, 0, 3, 1]
    other = world.rename(order)
    (_, scene), (_, moved) = world.third(method), other.third(rebuild(other))
    close(moved.used(), scene.used()[order], "rows in use")
    close(moved.rows, scene.rows[order] if method.has_row_of_each else scene.rows, "rows")
    for name, value in moved.remembered().items():
        close(value, scene.remembered()[name][order], name)


def law_inputs_of_a_phase_and_of_a_merge_are_unchanged(method: Method, world: World) -> None:
    """send, the local phase, merge and use only read what they are given."""
    scene = world.reach(method)
    state = scene.ledger.state
    given = copy(scene.send(IDS))
    returned = copy(whole(scene, IDS, world.trained(method).returned))
    weights = world.weights(IDS)

    def inputs() -> dict[str, Tensor]:
        return {
            "state": scene.rows,
            "given": given.rows,
            "returned": returned.rows,
            "weights": weights,
            "ids": IDS,
            **{f"shared {name}": value for name, value in state.shared.items()},
            **{f"table {name}": value for name, value in state.tables.items()},
            **{f"memory {name}": value for name, value in scene.remembered().items()},
        }

    before = {name: value.clone() for name, value in inputs().items()}
    scene.phase(IDS, given)
    method.message(state, IDS, ROUND)
    merge(scene, IDS, returned, weights)
    scene.used(IDS).add_(1)  # what a client uses is the caller's own
    for name, value in inputs().items():
        assert torch.equal(value, before[name]), f"{name} was changed"


def law_the_same_seed_gives_the_same_bits(method: Method, world: World) -> None:
    """Three rounds, twice."""
    first = world.reach(method, again=True)
    first.play(IDS)
    _, second = world.third(method)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.used(), second.used())
    mine, theirs = first.remembered(), second.remembered()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    shared = second.ledger.state.shared
    assert all(torch.equal(value, shared[name]) for name, value in first.ledger.state.shared.items())


def law_an_absent_client_has_no_influence(method: Method, world: World, *, stored: bool = False) -> None:
    """Other data, another stored row and other memory of the absent: the same bits for those who are there.

    stored: the method reads stored rows of the absent clients joined to a sampled one; the others must not matter.
    """
    absent = [k for k in EVERYONE if k not in NEXT]
    if stored:
        assert method.facts.graph is not None
        absent = [k for k in absent if k not in method.facts.graph.neighbours(np.array(NEXT))]
    second = world.disturb(absent).reach(method)
    second.ledger, second.clients.memory = world.reach(method).ledger, world.reach(method).clients.memory
    others = torch.tensor(absent, dtype=torch.int64)
    if method.has_row_of_each:
        second.ledger.table.write(others, torch.full((len(others), world.layout.size), 5.0, dtype=torch.float64))
    for table in second.clients.memory.tables.values():
        table.write(others, torch.full_like(table[others], 3))
    (change, first), other = world.third(method), second.play(IDS)
    assert torch.equal(change.ids, other.ids)
    assert torch.equal(change.rows, other.rows)
    assert torch.equal(first.used(IDS), second.used(IDS))


def law_a_client_of_weight_zero_has_no_influence(method: Method, world: World) -> None:
    """Where weights are used: an upload of weight zero is no upload. Elsewhere: weights change nothing."""
    scene = world.reach(method)
    rows = uploads(IDS, world)
    weights = world.weights(IDS)
    if not method.facts.weighs:
        change = merge(scene, IDS, message(method, world, rows.clone()), weights)
        other = merge(scene, IDS, message(method, world, rows.clone()), weights.flip(0) + 1)
        assert torch.equal(change.rows, other.rows), "weights are said not to be used"
        return
    weights[1] = 0.0
    rest = torch.tensor([0, 2, 3])
    change = merge(scene, IDS, message(method, world, rows.clone()), weights)
    without = merge(scene, IDS[rest], message(method, world, rows[rest]), weights[rest])
    keep = torch.tensor([k in without.ids.tolist() for k in change.ids.tolist()])
    close(change.rows[keep], without.rows, "weight 0 against absent")
    wild = rows.clone()
    wild[1] = 1e3
    close(merge(scene, IDS, message(method, world, wild), weights).rows[keep], change.rows[keep], "its upload")
    doubled = merge(scene, IDS, message(method, world, rows.clone()), 2 * weights)
    close(doubled.rows, change.rows, "only the ratio of weights counts")


def law_silent_clients_keep_their_row(method: Method, world: World) -> None:
    """Where each client has a row: a round changes those that answered, and only these."""
    if not method.has_row_of_each:
        return
    scene = world.reach(method)
    before, used = scene.rows, scene.used()
    change, scene = world.third(method)
    assert set(change.ids.tolist()) <= set(NEXT)
    silent = [k for k in EVERYONE if k not in NEXT]
    assert torch.equal(scene.rows[silent], before[silent])
    assert torch.equal(scene.used()[silent], used[silent])
    assert not torch.equal(scene.used(), used)


def law_a_returning_client_starts_from_the_merged_row(method: Method, world: World) -> None:
    """What a merge decided is what the client receives and uses next; where a graph pulls, that is not its upload."""
    scene = world.reach(method)
    returned = whole(scene, IDS, world.trained(method).returned)
    before = scene.rows[method.row_of(IDS)]
    change = merge(scene, IDS, returned, world.weights(IDS))
    scene.ledger.apply(change)
    again = method.message(scene.ledger.state, IDS, Clock(4)).rows
    if method.client.use is use_what_was_sent:
        close(scene.used(IDS), scene.seen(IDS, scene.send(IDS)), "used")
    if not len(change.ids):
        assert torch.equal(again, before), "nothing is merged, so nothing else is sent"
        return
    decided = change.rows[[change.ids.tolist().index(row) for row in method.row_of(IDS).tolist()]]
    if method.send is None:
        assert torch.equal(again, decided), "sent"
    if method.facts.pull is not None:
        for place, fraction in enumerate(method.facts.pull(IDS).tolist()):
            moved = not torch.equal(again[place], returned.rows[place])
            assert moved == (fraction > 0), f"client {NEXT[place]} is pulled by {fraction} and moved: {moved}"


def law_a_first_time_client_starts_from_the_common_start(method: Method, world: World) -> None:
    """Whoever trained before: a newcomer begins at the start, or at the newest row that it shares."""
    scene = world.reach(method)
    newcomer = torch.tensor([5])
    given = method.message(scene.ledger.state, newcomer, ROUND).rows
    begun = world.start(method).rows
    if method.has_row_of_each:
        assert torch.equal(given[0], begun[5])
        assert torch.equal(scene.seen(newcomer, scene.send(newcomer)), world.start(method).used(newcomer))
    elif method.send is None:
        assert torch.equal(given[0], scene.rows[int(method.row_of(newcomer))])
    start = world.start(method).clients.memory.recall("method", newcomer)
    memory = scene.clients.memory.recall("method", newcomer)
    assert all(not bool(memory[name].any()) for name in memory if name not in start)


def law_numbers_beyond_a_clients_rank_stay_zero(method: Method, world: World) -> None:
    """Ranks 1 and 2 in one stack: neither training nor a merge fills what a client does not have."""
    phase = world.trained(method)
    own = world.layout.rank_mask(world.ranks)
    for rows in (phase.rows, phase.returned.rows, *phase.returned.more.values()):
        assert bool((rows[~own[IDS]] == 0).all()), "returned"
    assert bool((phase.returned.rows[own[IDS]] != 0).any())
    _, scene = world.third(method)
    assert bool((scene.used()[~own] == 0).all()), "used"
    if method.has_row_of_each:
        assert bool((scene.rows[~own] == 0).all()), "stored"


def law_equal_clients_stay_equal(method: Method, world: World) -> None:
    """Everyone stores and returns the same row: everyone gets the same row; a graph step leaves it as it is."""
    scene = world.reach(method)
    row = uploads(ALL[:1], world)
    scene.ledger.table.write(torch.arange(len(scene.ledger.table)), row.repeat(len(scene.ledger.table), 1))
    if method.facts.compare == "products" and method.has_row_of_each:  # equal rows of other ranks are other updates
        _equal_updates_stay_equal(world, scene, row)
        return
    for ids in (IDS, ALL):
        change = merge(scene, ids, message(method, world, row.repeat(len(ids), 1)), torch.ones(len(ids)).double())
        close(change.rows, change.rows[:1].expand_as(change.rows), "each other")
        if method.facts.graph is not None:
            close(change.rows, row.expand_as(change.rows), "what they had")


def _equal_updates_stay_equal(world: World, scene: Scene, row: Tensor) -> None:
    """The same among clients of the same rank: whatever the factors are, their products stay."""
    alike = torch.nonzero(world.ranks == world.ranks.max()).flatten()
    given = row.repeat(len(alike), 1)
    change = merge(scene, alike, message(scene.method, world, given), torch.ones(len(alike)).double())
    for leaf in world.layout.parts[0].leaves[::2]:
        mine, before = (world.adapters(alike, rows).product(leaf.module) for rows in (change.rows, given))
        torch.testing.assert_close(mine, before, rtol=1e-6, atol=1e-8)


def law_columns_that_do_not_travel_influence_nobody_else(method: Method, world: World) -> None:
    """Another private part of one client, which then takes no step: the server and everybody else have the same bits.

    Steps are left out because a client's own loss may lead from what it keeps to what it sends.
    """
    travels = method.travels(world.layout, ROUND)
    if bool(travels.all()):
        return
    scenes = world.reach(method), world.reach(method)
    one = torch.tensor([NEXT[0]])
    own = world.layout.rank_mask(world.ranks[one])
    table = scenes[1].clients.memory.tables["row"]
    table.write(one, table[one] + (0.5 * ~travels) * own)
    before = [scene.used(one) for scene in scenes]
    assert not torch.equal(*before), "what a client keeps is what it uses"
    for scene in scenes:
        scene.method = scene.clients.method = replace(method, client=replace(method.client, step=stand_still))
    first, second = (scene.play(IDS) for scene in scenes)
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.rows, second.rows)
    others = torch.tensor([k for k in EVERYONE if k != NEXT[0]])
    assert torch.equal(scenes[0].used(others), scenes[1].used(others))


def stand_still(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    return adapters, memory


def law_columns_that_are_not_trained_stay_as_they_were_sent(method: Method, world: World) -> None:
    """Neither gradient nor decay nor momentum moves them, and they are not returned."""
    scene = world.reach(method)
    trained = method.trained(world.layout, ROUND)
    given = scene.send(IDS)
    before = scene.seen(IDS, given) * world.layout.rank_mask(world.ranks[IDS])
    phase = world.trained(method)
    assert torch.equal(phase.rows[:, ~trained], before[:, ~trained])
    moved = (phase.rows != before)[:, trained]
    assert bool(moved.any()) == bool(trained.any())


def law_the_graph_step_keeps_the_mean(method: Method, world: World) -> None:
    """With a symmetric operator and everyone present, the mean over clients stays."""
    rows = uploads(ALL, world)
    scene = world.reach(method)
    change = merge(scene, ALL, message(method, world, rows.clone()), torch.ones(CLIENTS).double())
    after = rows_after(scene, change)
    close(after.mean(dim=0), rows.mean(dim=0), "mean")
    assert not torch.allclose(after, rows)


def law_the_graph_step_never_widens_disagreement(method: Method, world: World, *, similarities: np.ndarray) -> None:
    """sum_kl a_kl ||w_k - w_l||^2 does not grow with everyone present."""
    scene = world.reach(method)
    for seed in range(5):
        rows = uploads(ALL, world, seed=seed)
        change = merge(scene, ALL, message(method, world, rows.clone()), torch.ones(CLIENTS).double())
        before, after = (disagreement(some, similarities) for some in (rows, rows_after(scene, change)))
        assert after < before, f"{before:g} became {after:g}"


def law_only_clients_that_are_joined_have_influence(method: Method, world: World) -> None:
    """Other uploads of those a client is not joined to: the same bits for that client."""
    graph = method.facts.graph
    assert graph is not None
    rows = uploads(IDS, world)
    for place, k in enumerate(NEXT):
        joined = graph.neighbours(np.array([k]))
        strangers = [other for other, near in enumerate(NEXT) if near != k and near not in joined]
        wild = rows.clone()
        wild[strangers] = 1e3
        mine, theirs = (
            rows_after(scene, merge(scene, IDS, message(method, world, some), world.weights(IDS)))[k]
            for some, scene in ((rows.clone(), world.reach(method)), (wild, world.reach(method)))
        )
        assert torch.equal(mine, theirs), f"client {k} is moved by {[NEXT[other] for other in strangers]}"
        assert not torch.equal(mine, rows[place]) or not set(joined) & set(NEXT), f"client {k} is not moved by its own"


def law_where_nobody_trains_nothing_moves(method: Method, world: World) -> None:
    """Even if clients are asked to train: what they return is the start, and so is what they use after three rounds."""
    scene = world.reach(method)
    given = scene.send(IDS)
    own = world.layout.rank_mask(world.ranks)[IDS]
    assert torch.equal(world.trained(method).rows, scene.seen(IDS, given) * own)
    _, scene = world.third(method)
    assert torch.equal(scene.used(), world.start(method).used())


def law_a_zero_penalty_is_the_simpler_neighbour(method: Method, world: World, *, simpler: Method) -> None:
    """Three rounds give the same bits as the method without the penalty."""
    (_, one), (_, other) = world.third(method), world.third(simpler)
    assert torch.equal(one.used(), other.used())
    for of in ("method", "moments/main"):
        mine, theirs = (scene.clients.memory.recall(of, ALL) for scene in (one, other))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items() if name in theirs)


def disagreement(rows: Tensor, similarities: np.ndarray) -> float:
    gaps = torch.cdist(rows, rows).square()
    return float((torch.from_numpy(similarities) * gaps).sum())


# Every law that holds for any method at all; the rest need a word from the test that calls them.
LAWS: dict[str, Callable[[Method, World], None]] = {
    law.__name__: law
    for law in (
        law_a_batch_of_one_equals_a_batch_of_all,
        law_the_order_in_the_stack_does_not_matter,
        law_inputs_of_a_phase_and_of_a_merge_are_unchanged,
        law_the_same_seed_gives_the_same_bits,
        law_a_client_of_weight_zero_has_no_influence,
        law_silent_clients_keep_their_row,
        law_a_returning_client_starts_from_the_merged_row,
        law_a_first_time_client_starts_from_the_common_start,
        law_numbers_beyond_a_clients_rank_stay_zero,
        law_equal_clients_stay_equal,
        law_columns_that_do_not_travel_influence_nobody_else,
        law_columns_that_are_not_trained_stay_as_they_were_sent,
    )
}
