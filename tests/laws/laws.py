"""The laws of the design page: each takes a method and a world, and raises AssertionError where it is broken."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tests.laws.worlds import CLIENTS, EVERYONE, NEXT, World
from torch import Tensor

from fedmira.engine.ledger import Ledger
from fedmira.methods.base import Change, Clock, Memory, Message, Method, State

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
ROUND = Clock(3)
IDS = torch.tensor(NEXT)
ALL = torch.tensor(EVERYONE)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text: f"{what}: {text}")


def pick(message: Message, places: Tensor) -> Message:
    return Message(message.rows[places], {name: value[places] for name, value in message.scalars.items()})


def part(memory: Memory, places: Tensor) -> Memory:
    return {name: value[places] for name, value in memory.items()}


def copy(message: Message) -> Message:
    return Message(message.rows.clone(), {name: value.clone() for name, value in message.scalars.items()})


def used(method: Method, state: State, ids: Tensor) -> Tensor:
    """Which row of the state each client uses [n]: its own, the one that all share, or that of its group."""
    rows = state.adapters.rows
    if method.personal or len(rows) == 1:
        return ids if method.personal else torch.zeros_like(ids)
    marks = torch.arange(len(rows), dtype=rows.dtype)[:, None].repeat(1, rows.shape[1])
    return method.serve(replace(state, adapters=state.adapters.with_rows(marks)), {}, ids).rows[:, 0].long()


def rows_after(method: Method, ledger: Ledger, change: Change) -> Tensor:
    """What everyone would use once a change is in place [K, P]."""
    ledger.apply(change)
    return method.serve(ledger.state, ledger.memory, ALL).rows


def uploads(ids: Tensor, world: World, *, seed: int = 0) -> Tensor:
    """Any rows that clients of these ranks might return."""
    stream = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(ids), world.layout.size, generator=stream, dtype=torch.float64)
    return world.adapters(ids, rows).mask_().rows


def law_a_batch_of_one_equals_a_batch_of_all(method: Method, world: World) -> None:
    """A client trained alone returns and keeps what it does among others."""
    ledger = world.reach(method)
    given, memory = method.send(ledger.state, IDS, ROUND), ledger.recall(IDS)
    together, kept = world.train(method, IDS, given, memory)
    for place in range(len(IDS)):
        one = torch.tensor([place])
        alone, own = world.train(method, IDS[one], pick(given, one), part(memory, one))
        close(alone.rows, together.rows[one], f"client {int(IDS[place])}, row")
        for name, value in alone.scalars.items():
            close(value, together.scalars[name][one], f"client {int(IDS[place])}, {name}")
        for name, value in own.items():
            close(value, kept[name][one], f"client {int(IDS[place])}, {name}")


def law_the_order_in_the_stack_does_not_matter(method: Method, world: World) -> None:
    """Sampled clients in another order: the same answer for each of them."""
    order = torch.tensor([2, 0, 3, 1])
    ledger = world.reach(method)
    given, memory = method.send(ledger.state, IDS, ROUND), ledger.recall(IDS)
    close(method.send(ledger.state, IDS[order], ROUND).rows, given.rows[order], "send")
    returned, _ = world.train(method, IDS, given, memory)
    shuffled, _ = world.train(method, IDS[order], pick(given, order), part(memory, order))
    close(shuffled.rows, returned.rows[order], "training")
    weights = world.weights(IDS)
    change = method.merge(ledger.state, IDS, copy(returned), weights, ROUND)
    other = method.merge(ledger.state, IDS[order], pick(returned, order), weights[order], ROUND)
    assert sorted(other.ids.tolist()) == sorted(change.ids.tolist())
    back = torch.tensor([other.ids.tolist().index(k) for k in change.ids.tolist()], dtype=torch.int64)
    close(other.rows[back], change.rows, "merge")


def law_renaming_clients_renames_the_answer(
    method: Method, world: World, *, rebuild: Callable[[World], Method]
) -> None:
    """All clients at other positions, the graph with them: after three rounds each has what it had."""
    order = [4, 2, 5, 0, 3, 1]
    other = world.rename(order)
    renamed = rebuild(other)
    ledger, moved = world.reach(method), other.reach(renamed)
    world.play(method, ledger, torch.from_numpy(world.cohort.schedule[2]))
    other.play(renamed, moved, torch.from_numpy(other.cohort.schedule[2]))
    rows, expected = moved.state.adapters.rows, ledger.state.adapters.rows
    close(rows, expected[order] if method.personal else expected, "rows")
    for name, value in moved.memory.items():
        close(value[ALL], ledger.memory[name][torch.tensor(order)], name)


def law_inputs_of_a_phase_and_of_a_merge_are_unchanged(method: Method, world: World) -> None:
    """send, the local phase, merge and serve only read what they are given."""
    ledger = world.reach(method)
    state, memory = ledger.state, ledger.recall(IDS)
    given = copy(method.send(state, IDS, ROUND))
    returned, _ = world.train(method, IDS, given, memory)
    returned = copy(returned)
    weights = world.weights(IDS)
    inputs = {
        "state": state.adapters.rows,
        "given": given.rows,
        "returned": returned.rows,
        "weights": weights,
        "ids": IDS,
        **{f"shared {name}": value for name, value in state.shared.items()},
        **{f"memory {name}": value for name, value in memory.items()},
    }
    before = {name: value.clone() for name, value in inputs.items()}
    world.train(method, IDS, given, memory)
    method.send(state, IDS, ROUND)
    method.merge(state, IDS, returned, weights, ROUND)
    served = method.serve(state, memory, IDS)
    served.rows.add_(1)  # what is served is the caller's own
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), f"{name} was changed"


def law_the_same_seed_gives_the_same_bits(method: Method, world: World) -> None:
    """Three rounds, twice."""
    first, second = world.reach(method), world.reach(method)
    for ledger in (first, second):
        world.play(method, ledger, IDS)
    assert torch.equal(first.state.adapters.rows, second.state.adapters.rows)
    assert first.memory.keys() == second.memory.keys()
    assert all(torch.equal(value[ALL], second.memory[name][ALL]) for name, value in first.memory.items())
    assert all(torch.equal(value, second.state.shared[name]) for name, value in first.state.shared.items())


def law_an_absent_client_has_no_influence(method: Method, world: World, *, stored: bool = False) -> None:
    """Other data, another stored row and other memory of the absent: the same bits for those who are there.

    stored: the method reads stored rows of the absent clients joined to a sampled one; the others must not matter.
    """
    absent = [k for k in EVERYONE if k not in NEXT]
    if stored:
        assert method.graph is not None
        absent = [k for k in absent if k not in method.graph.neighbours(np.array(NEXT))]
    first, second = world.reach(method), world.reach(method)
    if method.personal:
        second.state.adapters.rows[absent] = 5.0
    others = torch.tensor(absent, dtype=torch.int64)
    for value in second.memory.values():
        value[others] = torch.full_like(value[others], 3)
    change = world.play(method, first, IDS)
    other = world.disturb(absent).play(method, second, IDS)
    assert torch.equal(change.ids, other.ids)
    assert torch.equal(change.rows, other.rows)


def law_a_client_of_weight_zero_has_no_influence(method: Method, world: World) -> None:
    """Where weights are used: an upload of weight zero is no upload. Elsewhere: weights change nothing."""
    ledger = world.reach(method)
    rows = uploads(IDS, world)
    weights = world.weights(IDS)
    if not method.uses_weights:
        change = method.merge(ledger.state, IDS, Message(rows.clone()), weights, ROUND)
        other = method.merge(ledger.state, IDS, Message(rows.clone()), weights.flip(0) + 1, ROUND)
        assert torch.equal(change.rows, other.rows), "weights are said not to be used"
        return
    weights[1] = 0.0
    rest = torch.tensor([0, 2, 3])
    change = method.merge(ledger.state, IDS, Message(rows.clone()), weights, ROUND)
    without = method.merge(ledger.state, IDS[rest], Message(rows[rest]), weights[rest], ROUND)
    keep = torch.tensor([k in without.ids.tolist() for k in change.ids.tolist()])
    close(change.rows[keep], without.rows, "weight 0 against absent")
    wild = rows.clone()
    wild[1] = 1e3
    close(method.merge(ledger.state, IDS, Message(wild), weights, ROUND).rows[keep], change.rows[keep], "its upload")
    doubled = method.merge(ledger.state, IDS, Message(rows.clone()), 2 * weights, ROUND)
    close(doubled.rows, change.rows, "only the ratio of weights counts")


def law_silent_clients_keep_their_row(method: Method, world: World) -> None:
    """Where the method is personal: a merge replaces rows of those that answered, and only these."""
    if not method.personal:
        return
    ledger = world.reach(method)
    before = ledger.state.adapters.rows.clone()
    change = world.play(method, ledger, IDS)
    assert set(change.ids.tolist()) <= set(NEXT)
    silent = [k for k in EVERYONE if k not in NEXT]
    assert torch.equal(ledger.state.adapters.rows[silent], before[silent])
    assert not torch.equal(ledger.state.adapters.rows, before)


def law_a_returning_client_starts_from_the_merged_row(method: Method, world: World) -> None:
    """What a merge decided is what the client receives and uses next; where a graph pulls, that is not its upload."""
    ledger = world.reach(method)
    given = method.send(ledger.state, IDS, ROUND)
    returned, _ = world.train(method, IDS, given, ledger.recall(IDS))
    change = method.merge(ledger.state, IDS, returned, world.weights(IDS), ROUND)
    ledger.apply(change)
    again = method.send(ledger.state, IDS, Clock(4)).rows
    served = method.serve(ledger.state, ledger.memory, IDS).rows
    if method.trains == "nobody":
        assert not len(change.ids), "nobody trains, so nothing is merged"
        decided = given.rows
    else:
        places = used(method, ledger.state, IDS).tolist()
        decided = change.rows[[change.ids.tolist().index(place) for place in places]]
    assert torch.equal(again, decided), "sent"
    assert torch.equal(served, decided), "served"
    if method.pull is not None:
        for place, fraction in enumerate(method.pull(IDS).tolist()):
            moved = not torch.equal(again[place], returned.rows[place])
            assert moved == (fraction > 0), f"client {NEXT[place]} is pulled by {fraction} and moved: {moved}"


def law_a_first_time_client_starts_from_the_common_start(method: Method, world: World) -> None:
    """Whoever trained before: a personal method sends a newcomer the start, a shared one the newest row it shares."""
    ledger = world.reach(method)
    newcomer = torch.tensor([5])
    given = method.send(ledger.state, newcomer, ROUND).rows
    begun = world.start(method).state.adapters.rows
    if method.personal:
        assert torch.equal(given[0], begun[5])
    else:
        place = int(used(method, ledger.state, newcomer))
        assert torch.equal(given[0], ledger.state.adapters.rows[place])
        assert torch.equal(given[0], begun[place]) == (method.trains == "nobody")
    assert all(not bool(value[newcomer].any()) for value in ledger.memory.values())


def law_numbers_beyond_a_clients_rank_stay_zero(method: Method, world: World) -> None:
    """Ranks 1 and 2 in one stack: neither training nor a merge fills what a client does not have."""
    ledger = world.reach(method)
    given = method.send(ledger.state, IDS, ROUND)
    returned, _ = world.train(method, IDS, given, ledger.recall(IDS))
    own = world.layout.rank_mask(world.ranks)
    assert bool((returned.rows[~own[IDS]] == 0).all()), "returned"
    assert bool((returned.rows[own[IDS]] != 0).any())
    world.play(method, ledger, IDS)
    if method.personal:
        assert bool((ledger.state.adapters.rows[~own] == 0).all()), "stored"


def law_equal_clients_stay_equal(method: Method, world: World) -> None:
    """Everyone stores and returns the same row: everyone gets the same row; a graph step leaves it as it is."""
    ledger = world.reach(method)
    row = uploads(ALL[:1], world)
    ledger.state.adapters.rows[:] = row
    if method.compare == "products" and method.personal:  # equal rows of other ranks, and scales, are other updates
        _equal_updates_stay_equal(method, world, ledger, row)
        return
    for ids in (IDS, ALL):
        change = method.merge(ledger.state, ids, Message(row.repeat(len(ids), 1)), torch.ones(len(ids)).double(), ROUND)
        close(change.rows, change.rows[:1].expand_as(change.rows), "each other")
        if method.graph is not None:
            close(change.rows, row.expand_as(change.rows), "what they had")


def _equal_updates_stay_equal(method: Method, world: World, ledger: Ledger, row: Tensor) -> None:
    """The same among clients of the same rank: whatever the factors are, their products stay."""
    alike = torch.nonzero(world.ranks == world.ranks.max()).flatten()
    given = row.repeat(len(alike), 1)
    change = method.merge(ledger.state, alike, Message(given), torch.ones(len(alike)).double(), ROUND)
    for leaf in world.layout.parts[0].leaves[::2]:
        mine, before = (world.adapters(alike, rows).product(leaf.module) for rows in (change.rows, given))
        torch.testing.assert_close(mine, before, rtol=1e-6, atol=1e-8)


def law_the_graph_step_keeps_the_mean(method: Method, world: World) -> None:
    """With a symmetric operator and everyone present, the mean over clients stays."""
    rows = uploads(ALL, world)
    ledger = world.reach(method)
    change = method.merge(ledger.state, ALL, Message(rows.clone()), torch.ones(CLIENTS).double(), ROUND)
    after = rows_after(method, ledger, change)
    close(after.mean(dim=0), rows.mean(dim=0), "mean")
    assert not torch.allclose(after, rows)


def law_the_graph_step_never_widens_disagreement(method: Method, world: World, *, similarities: np.ndarray) -> None:
    """sum_kl a_kl ||w_k - w_l||^2 does not grow with everyone present."""
    ledger = world.reach(method)
    for seed in range(5):
        rows = uploads(ALL, world, seed=seed)
        change = method.merge(ledger.state, ALL, Message(rows.clone()), torch.ones(CLIENTS).double(), ROUND)
        before, after = (disagreement(some, similarities) for some in (rows, rows_after(method, ledger, change)))
        assert after < before, f"{before:g} became {after:g}"


def law_only_clients_that_are_joined_have_influence(method: Method, world: World) -> None:
    """Other uploads of those a client is not joined to: the same bits for that client."""
    assert method.graph is not None
    rows = uploads(IDS, world)
    for place, k in enumerate(NEXT):
        joined = method.graph.neighbours(np.array([k]))
        strangers = [other for other, near in enumerate(NEXT) if near != k and near not in joined]
        wild = rows.clone()
        wild[strangers] = 1e3
        mine, theirs = (
            rows_after(method, ledger, method.merge(ledger.state, IDS, Message(some), world.weights(IDS), ROUND))[k]
            for some, ledger in ((rows.clone(), world.reach(method)), (wild, world.reach(method)))
        )
        assert torch.equal(mine, theirs), f"client {k} is moved by {[NEXT[other] for other in strangers]}"
        assert not torch.equal(mine, rows[place]) or not set(joined) & set(NEXT), f"client {k} is not moved by its own"


def law_where_nobody_trains_nothing_moves(method: Method, world: World) -> None:
    """Even if clients are asked to train: what they return is the start, and so is what they use after three rounds."""
    ledger = world.reach(method)
    given = method.send(ledger.state, IDS, ROUND)
    returned, _ = world.train(method, IDS, given, ledger.recall(IDS))
    own = world.layout.rank_mask(world.ranks)[IDS]
    assert torch.equal(returned.rows, given.rows * own)
    world.play(method, ledger, IDS)
    assert torch.equal(ledger.state.adapters.rows, world.start(method).state.adapters.rows)


def law_a_zero_penalty_is_the_simpler_neighbour(method: Method, world: World, *, simpler: Method) -> None:
    """Three rounds give the same bits as the method without the penalty."""
    one, other = world.reach(method), world.reach(simpler)
    for some, ledger in ((method, one), (simpler, other)):
        world.play(some, ledger, IDS)
    assert torch.equal(one.state.adapters.rows, other.state.adapters.rows)
    assert all(torch.equal(value[ALL], other.memory[name][ALL]) for name, value in one.memory.items())


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
    )
}
