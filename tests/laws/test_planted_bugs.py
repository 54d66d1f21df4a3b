"""The laws bite: each planted bug breaks the law that is named beside it, and the real method does not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.laws import laws
from tests.laws.worlds import WORLDS, World
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.disk.table import Table
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Memory, Message, Method, State, Tools
from fedmira.methods.means import mean_row, shares_of

COUPLING = 0.1
MIRA = {"lambda": COUPLING, "normalise": "none", "graph": {"kind": "uniform"}}

Breaks = Callable[[Method], Method]
Law = Callable[[Method, World], None]


def weights_of(method: Method, ids: Tensor) -> Tensor:
    assert method.facts.graph is not None
    return torch.from_numpy(method.facts.graph.subgraph(ids.numpy()))


def flip_the_sign(method: Method) -> Method:
    """W + c L W: similar clients push each other away."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        return replace(change, rows=2 * returned.rows - change.rows)

    return replace(method, merge=merge)


def mix_in_place(method: Method) -> Method:
    """Gauss-Seidel: a client is pulled towards neighbours that this very step has already moved."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        rows = returned.rows.clone()
        for k, near in enumerate(weights_of(method, ids)):
            rows[k] -= COUPLING * (near[:, None] * (rows[k] - rows)).sum(dim=0)
        return Change(ids, rows)

    return replace(method, merge=merge)


def swap_clients_on_return(method: Method) -> Method:
    """The stack is sorted for training and not sorted back."""

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        message, memory = method.client.finish(adapters, memory, given, tools)
        return replace(message, rows=message.rows.flip(0)), memory

    return replace(method, client=replace(method.client, finish=finish))


def drop_the_regularised_row(method: Method) -> Method:
    """The merge is computed for show: clients go on from their own uploads."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        return replace(method.merge(state, ids, returned, weights, clock), rows=returned.rows)

    return replace(method, merge=merge)


def reply_with_the_upload(method: Method) -> Method:
    """The merged row is stored and served, but what is sent back is the un-regularised upload."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        everyone = torch.arange(len(state.adapters))
        replies = state.shared["replies"].clone() if state.shared else state.adapters.rows[everyone]
        replies[ids] = returned.rows
        return replace(method.merge(state, ids, returned, weights, clock), shared={"replies": replies})

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        return Message(state.shared["replies"][ids] if state.shared else state.adapters.rows[ids])

    return replace(method, merge=merge, send=send)


def take_one_mean_over_all_clients(method: Method) -> Method:
    """The loss of a stack is averaged over its clients, so that each gradient is S times too small."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        def grad(current: Adapters) -> tuple[Tensor, Tensor]:
            losses, gradient = tools.grad(current)
            return losses, gradient.div_(len(current))

        return method.client.step(adapters, memory, given, replace(tools, grad=grad))

    return replace(method, client=replace(method.client, step=step))


def ignore_weights(method: Method) -> Method:
    """Every client counts the same, whatever it brings."""
    return replace(
        method,
        merge=lambda state, ids, returned, weights, clock: method.merge(
            state, ids, returned, torch.ones_like(weights), clock
        ),
    )


def change_the_shared_row_in_place(method: Method) -> Method:
    """The server's row is overwritten before the engine has made the change durable."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        row, table = torch.zeros(1, dtype=torch.int64), state.adapters.rows
        assert isinstance(table, Table)
        table.write(row, mean_row(returned.rows, shares_of(weights, "examples")))
        return Change(row, table[row])

    return replace(method, merge=merge)


def move_the_silent(method: Method) -> Method:
    """Stored neighbours are pulled along although they are not in the round."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        rest = torch.tensor([k for k in range(len(state.adapters)) if k not in ids.tolist()])
        rows = 0.9 * state.adapters.rows[rest] + 0.1 * change.rows.mean(dim=0)
        return Change(torch.cat([change.ids, rest]), torch.cat([change.rows, rows]))

    return replace(method, merge=merge)


def draw_by_place_in_the_stack(method: Method) -> Method:
    """Noise from one stream for the whole stack instead of each client's own."""

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        noise = np.random.default_rng(tools.clock.round).normal(size=adapters.rows.shape)
        return adapters.with_rows(adapters.rows + torch.from_numpy(noise)).mask_(), memory

    return replace(method, client=replace(method.client, begin=begin))


def remember_in_the_method(method: Method) -> Method:
    """State hidden in a closure: a second run begins where the first one ended."""
    calls: list[int] = []

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        calls.append(1)
        change = method.merge(state, ids, returned, weights, clock)
        return replace(change, rows=change.rows * (1 + len(calls)))

    return replace(method, merge=merge)


def fill_padded_ranks(method: Method) -> Method:
    """Noise on the whole row after the last mask."""

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        return Message(adapters.rows + 1), memory

    return replace(method, client=replace(method.client, finish=finish))


def peek_at_the_absent(method: Method) -> Method:
    """The mean row of all clients, absent ones included, leaks into the merge."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        return replace(change, rows=change.rows + 0.01 * state.adapters.rows.mean())

    return replace(method, merge=merge)


def start_newcomers_from_the_mean(method: Method) -> Method:
    """A client that was never there is sent the mean of the others instead of the common start."""

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        return Message(state.adapters.rows.mean().expand(len(ids), -1).clone())

    return replace(method, send=send)


def pull_towards_zero(method: Method) -> Method:
    """The degree is taken from the whole graph, the neighbours from the round: rows of L no longer sum to zero."""

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        assert method.facts.graph is not None
        degree = torch.from_numpy(method.facts.graph.weights.sum(axis=1))[ids]
        mixed = weights_of(method, ids) @ returned.rows
        return Change(ids, returned.rows - COUPLING * (degree[:, None] * returned.rows - mixed))

    return replace(method, merge=merge)


def send_a_trace_of_what_is_kept(method: Method) -> Method:
    """A declared scalar tells the server of columns that never travel."""

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        return Message(adapters.rows, {"trace": adapters.rows.sum(dim=1)}), memory

    def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
        change = method.merge(state, ids, returned, weights, clock)
        return replace(change, rows=change.rows + 1e-3 * returned.scalars["trace"].mean())

    return replace(method, merge=merge, client=replace(method.client, finish=finish))


def move_what_is_frozen(method: Method) -> Method:
    """A step of its own that forgets that some columns are not trained; the engine puts them back."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return adapters.with_rows(adapters.rows + 0.01).mask_(), memory

    return replace(method, client=replace(method.client, step=step))


BUGS: list[tuple[str, Breaks, Law]] = [
    ("mira", flip_the_sign, partial(laws.law_the_graph_step_never_widens_disagreement, similarities=np.ones((6, 6)))),
    ("mira", mix_in_place, laws.law_the_order_in_the_stack_does_not_matter),
    ("mira", mix_in_place, laws.law_the_graph_step_keeps_the_mean),
    ("mira", swap_clients_on_return, laws.law_a_batch_of_one_equals_a_batch_of_all),
    ("fedavg", swap_clients_on_return, laws.law_a_batch_of_one_equals_a_batch_of_all),
    ("mira", drop_the_regularised_row, laws.law_a_returning_client_starts_from_the_merged_row),
    ("mira", reply_with_the_upload, laws.law_a_returning_client_starts_from_the_merged_row),
    ("mira", take_one_mean_over_all_clients, laws.law_a_batch_of_one_equals_a_batch_of_all),
    ("local", take_one_mean_over_all_clients, laws.law_a_batch_of_one_equals_a_batch_of_all),
    ("fedavg", ignore_weights, laws.law_a_client_of_weight_zero_has_no_influence),
    ("fedavg", change_the_shared_row_in_place, laws.law_inputs_of_a_phase_and_of_a_merge_are_unchanged),
    ("mira", move_the_silent, laws.law_silent_clients_keep_their_row),
    ("local", draw_by_place_in_the_stack, laws.law_a_batch_of_one_equals_a_batch_of_all),
    ("fedavg", remember_in_the_method, laws.law_the_same_seed_gives_the_same_bits),
    ("fedavg", fill_padded_ranks, laws.law_numbers_beyond_a_clients_rank_stay_zero),
    ("mira", peek_at_the_absent, laws.law_an_absent_client_has_no_influence),
    ("mira", start_newcomers_from_the_mean, laws.law_a_first_time_client_starts_from_the_common_start),
    ("mira", pull_towards_zero, laws.law_equal_clients_stay_equal),
]


@pytest.mark.parametrize("kind", WORLDS)
def test_a_trace_of_private_columns_breaks_its_law(kind: str) -> None:
    world, law = WORLDS[kind](), laws.law_columns_that_do_not_travel_influence_nobody_else
    method = build("fedsa_lora", {}, world.cohort)
    law(method, world)
    with pytest.raises(AssertionError):
        law(send_a_trace_of_what_is_kept(method), world)


def test_a_step_that_moves_what_is_not_trained_breaks_its_law_and_the_engine_undoes_it() -> None:
    law = laws.law_columns_that_are_not_trained_stay_as_they_were_sent
    world = WORLDS["quadratic"]()
    method = build("ffa_lora", {}, world.cohort)
    law(method, world)
    with pytest.raises(AssertionError):  # the quadratic world has a local phase that trusts its methods
        law(move_what_is_frozen(method), world)
    law(move_what_is_frozen(method), WORLDS["transformer"]())


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize(
    ("name", "plant", "law"),
    BUGS,
    ids=lambda part: getattr(part, "__name__", None) or getattr(getattr(part, "func", None), "__name__", None),
)
def test_a_planted_bug_breaks_its_law(name: str, plant: Breaks, law: Law, kind: str) -> None:
    world = WORLDS[kind]()
    real = build(name, MIRA if name == "mira" else {}, world.cohort)
    law(real, world)
    with pytest.raises(AssertionError):
        law(plant(real), world)


def test_a_penalty_that_is_not_zero_is_not_local_training() -> None:
    world = WORLDS["quadratic"]()
    mira = build("mira", MIRA, world.cohort)
    with pytest.raises(AssertionError):
        laws.law_a_zero_penalty_is_the_simpler_neighbour(mira, world, simpler=build("local", {}, world.cohort))


def test_a_graph_that_is_not_renamed_with_its_clients_breaks_the_law_of_renaming() -> None:
    world = WORLDS["quadratic"]()
    settings = {"lambda": 0.3, "graph": {"kind": "random"}}  # drawn by position, not by client
    with pytest.raises(AssertionError):
        laws.law_renaming_clients_renames_the_answer(
            build("mira", settings, world.cohort), world, rebuild=lambda other: build("mira", settings, other.cohort)
        )
