"""The local phase of a cohort: each client trains as if it were alone, for its own number of steps."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.columns import factor_columns
from fedmira.adapters.optim import adamw, sgd
from fedmira.data.batches import ClientData, collate
from fedmira.engine.phase import PhaseResult, local_phase, plan_steps
from fedmira.engine.tools import Moments, Training
from fedmira.errors import MethodError
from fedmira.evaluation.measure import measure_loss
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Tools, descend
from fedmira.model.base.load import Base
from fedmira.model.passes import gradients

TRAIN = (2, 7, 4)  # examples: 1, 4 and 2 batches of two in one epoch
EPOCH = Training(adamw(weight_decay=0.1), 0.02, 2, None, 1, 1.0, True, 0.0, seed=3)
LOCAL = build("local", {}, Cohort(("c0", "c1", "c2"), TRAIN, ({}, {}, {}), (), 0))
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def half(**parts: Any) -> Method:
    """Local training with some functions of the client's half replaced."""
    return replace(LOCAL, client=replace(LOCAL.client, **parts))


@dataclass(frozen=True, eq=False)
class Site:
    base: Base
    clients: list[ClientData]
    start: Adapters

    def run(
        self,
        method: Method = LOCAL,
        *,
        who: tuple[int, ...] = (0, 1, 2),
        training: Training = EPOCH,
        memory: Memory | None = None,
        moments: Moments | None = None,
        given: Message | None = None,
        number: int = 1,
        cohort: int = 8,
    ) -> PhaseResult:
        index = torch.tensor(who)
        return local_phase(
            self.base,
            method,
            [self.clients[k] for k in who],
            self.start.take(index),
            given or Message(self.start.rows[index]),
            memory or {},
            moments,
            training=training,
            clock=Clock(number),
            cohort=cohort,
        )


@pytest.fixture(scope="module")
def site() -> Site:
    base = tiny.base("gpt2", targets=["c_attn"])
    clients = [tiny.client(f"c{k}", train=count) for k, count in enumerate(TRAIN)]
    return Site(base, clients, tiny.adapters(tiny.layout(base, 2), (2, 1, 2)))


def test_every_client_takes_the_steps_of_its_own_epoch(site: Site) -> None:
    found = site.run()
    assert found.steps.tolist() == [1, 4, 2]
    assert found.moments["main"]["steps"].tolist() == [1, 4, 2]
    assert found.tokens == sum(len(one.ids) for client in site.clients for one in client.train)


def test_a_client_that_has_finished_keeps_its_row_and_its_moments(site: Site) -> None:
    """Decay and momentum would move it on even with a zero gradient."""
    seen: list[tuple[list[int], Tensor]] = []

    def watch(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        seen.append(([len(adapters), *(len(value) for value in memory.values())], given.rows.clone()))
        return descend(adapters, memory, given, tools)

    found = site.run(half(step=watch), memory={"own": torch.zeros(3, 2)})
    assert [set(sizes) for sizes, _ in seen] == [{3}, {2}, {1}, {1}]
    assert torch.equal(seen[-1][1], site.start.rows[1:2])  # what is at work is the client with most steps
    short = site.run(training=replace(EPOCH, local_epochs=None, local_steps=1))
    torch.testing.assert_close(found.returned.rows[0], short.returned.rows[0], **CLOSE)
    for name in ("moment_1", "moment_2", "steps"):
        torch.testing.assert_close(found.moments["main"][name][0], short.moments["main"][name][0], **CLOSE)


def test_a_client_alone_ends_where_it_ends_among_others(site: Site) -> None:
    together = site.run()
    for k in range(3):
        alone = site.run(who=(k,))
        torch.testing.assert_close(alone.returned.rows[0], together.returned.rows[k], **CLOSE)
        torch.testing.assert_close(alone.losses[0], together.losses[k], **CLOSE)
        assert alone.moments.keys() == {"main"}
        for name, value in alone.moments["main"].items():
            torch.testing.assert_close(value[0], together.moments["main"][name][k], **CLOSE)


@pytest.mark.parametrize("cohort", [1, 2])
def test_the_size_of_a_pass_changes_nothing(site: Site, cohort: int) -> None:
    found, expected = site.run(cohort=cohort), site.run()
    torch.testing.assert_close(found.returned.rows, expected.returned.rows, **CLOSE)
    torch.testing.assert_close(found.losses, expected.losses, **CLOSE)
    assert found.steps.tolist() == expected.steps.tolist()
    assert found.tokens == expected.tokens
    for name, value in found.moments["main"].items():
        torch.testing.assert_close(value, expected.moments["main"][name], **CLOSE)


def test_the_answer_comes_back_in_the_order_of_the_clients_given(site: Site) -> None:
    found, expected = site.run(who=(2, 0, 1)), site.run()
    torch.testing.assert_close(found.returned.rows, expected.returned.rows[[2, 0, 1]], **CLOSE)
    assert found.steps.tolist() == [2, 1, 4]


def test_the_loss_of_a_phase_is_the_mean_over_the_clients_own_steps(site: Site) -> None:
    seen: list[list[float]] = [[], [], []]

    def watch(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        losses, gradient = tools.grad(adapters)
        for place, loss in enumerate(losses.tolist()):
            seen[(1, 2, 0)[place]].append(loss)  # most steps first
        return tools.update(adapters, gradient), memory

    found = site.run(half(step=watch))
    assert found.losses.tolist() == pytest.approx([np.mean(losses) for losses in seen])


def test_kept_moments_go_on_where_they_were(site: Site) -> None:
    first = site.run()
    second = site.run(moments=first.moments, given=first.returned, number=2)
    fresh = site.run(given=first.returned, number=2)
    assert second.moments["main"]["steps"].tolist() == [2, 8, 4]
    assert fresh.moments["main"]["steps"].tolist() == [1, 4, 2]
    assert not torch.allclose(second.returned.rows, fresh.returned.rows)


def test_what_is_given_is_only_read(site: Site) -> None:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        memory["own"] += 1
        return descend(adapters, memory, given, tools)

    first = site.run()
    given, moments = first.returned, first.moments["main"]
    memory = {"own": torch.zeros(3, 2)}
    before = [value.clone() for value in (given.rows, *memory.values(), *moments.values())]
    found = site.run(half(step=step), memory=memory, moments={"main": moments}, given=given)
    assert found.memory["own"][:, 0].tolist() == [1, 4, 2]
    after = [given.rows, *memory.values(), *moments.values()]
    assert all(torch.equal(*two) for two in zip(after, before, strict=True))


def test_rows_that_arrive_filled_beyond_a_rank_are_masked_before_training(site: Site) -> None:
    own = site.start.layout.rank_mask(site.start.ranks)
    dirty = Message(torch.where(own, site.start.rows, 5.0))
    found = site.run(given=dirty)
    assert torch.equal(found.returned.rows[1], site.run().returned.rows[1])
    assert not found.returned.rows[1][~own[1]].any()


def test_an_update_fills_nothing_beyond_a_rank_whatever_gradient_a_method_gives_it(site: Site) -> None:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        tools.grad(adapters)
        return tools.update(adapters, torch.ones_like(adapters.rows)), memory

    own = site.start.layout.rank_mask(site.start.ranks)
    found = site.run(half(step=step)).returned.rows
    assert not found[~own].any()
    assert bool((found[own] != site.start.rows[own]).all())


def test_every_round_has_other_batches_of_the_same_examples(site: Site) -> None:
    first, second = (np.concatenate(plan_steps(site.clients[1], EPOCH, number)).tolist() for number in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(7))


def test_clipping_bounds_each_clients_step_by_its_own_norm(site: Site) -> None:
    plain = Training(sgd(), 1.0, 2, 1, None, 0.01, False, 0.0, seed=3)
    moved = (site.run(training=plain).returned.rows - site.start.rows).norm(dim=1)
    assert moved.tolist() == pytest.approx([0.01] * 3)


def test_one_step_is_the_gradient_of_the_planned_batch(site: Site) -> None:
    plain = Training(sgd(), 0.5, 2, 1, None, None, False, 0.0, seed=3)
    found = site.run(training=plain)
    texts = [[client.train[i] for i in plan_steps(client, plain, 1)[0]] for client in site.clients]
    into = torch.zeros_like(site.start.rows)
    losses, _ = gradients(site.base, site.start, collate(texts, pad_id=0), into=into)
    torch.testing.assert_close(found.returned.rows, site.start.rows - 0.5 * into, **CLOSE)
    torch.testing.assert_close(found.losses, losses, **CLOSE)


def test_dropout_does_not_depend_on_the_cohort_and_changes_with_round_and_seed(site: Site) -> None:
    dropped = replace(EPOCH, dropout=0.3)
    together = site.run(training=dropped)
    for k in range(3):
        alone = site.run(who=(k,), training=dropped)
        torch.testing.assert_close(alone.returned.rows[0], together.returned.rows[k], **CLOSE)
    assert torch.equal(site.run(training=dropped).returned.rows, together.returned.rows)
    for other in (EPOCH, replace(dropped, seed=4)):
        assert not torch.allclose(site.run(training=other).losses, together.losses)


def test_tools_tell_the_step_the_rate_and_a_stream_for_each_client(site: Site) -> None:
    seen: dict[int, list[float]] = {}
    facts: list[tuple[int, int, list[int], float]] = []

    def watch(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        clock = tools.clock
        assert clock.steps is not None
        facts.append((clock.round, clock.step, clock.steps.tolist(), clock.learning_rate))
        seen[clock.step] = [float(stream.random()) for stream in tools.rng("noise")]
        assert [float(stream.random()) for stream in tools.rng("noise")] == seen[clock.step]
        assert [float(stream.random()) for stream in tools.rng("other")] != seen[clock.step]
        return descend(adapters, memory, given, tools)

    site.run(half(step=watch), number=7)
    own = sorted(facts[0][2], reverse=True)
    assert facts == [(7, step, [steps for steps in own if steps > step], 0.02) for step in range(4)]
    drawn = [value for values in seen.values() for value in values]
    assert [len(values) for values in seen.values()] == [3, 2, 1, 1]
    assert len(set(drawn)) == len(drawn)
    longest = seen[0][0]
    site.run(half(step=watch), who=(1,), number=7)
    assert seen[0] == [longest]


def test_a_step_may_return_new_values_instead_of_changing_its_own(site: Site) -> None:
    def fresh(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        mine = adapters.with_rows(adapters.rows.clone())
        held = {name: value.clone() for name, value in memory.items()}
        return descend(mine, held, given, tools)

    own = {"own": torch.arange(6.0).view(3, 2)}
    found, expected = site.run(half(step=fresh), memory=own), site.run()
    assert torch.equal(found.returned.rows, expected.returned.rows)
    assert torch.equal(found.memory["own"], own["own"])
    for name, value in found.moments["main"].items():
        assert torch.equal(value, expected.moments["main"][name])


def test_what_begin_sets_up_is_kept_and_scalars_travel_in_order(site: Site) -> None:
    """A method with a private part in memory and a scalar in its message."""

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return adapters, {"calls": torch.zeros(len(adapters)), **memory}

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        memory["calls"] += given.scalars["weight"]
        return descend(adapters, memory, given, tools)

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        return Message(adapters.rows, {"calls": memory["calls"] + 0.5}), memory

    method = half(begin=begin, step=step, finish=finish)
    weights: dict[str, Any] = {"weight": torch.tensor([1.0, 10.0, 100.0])}
    found = site.run(method, given=Message(site.start.rows, weights), cohort=2)
    assert found.memory["calls"].tolist() == [1, 40, 200]
    assert found.returned.scalars["calls"].tolist() == [1.5, 40.5, 200.5]


# ---------------------------------------------------------------- what a step returns is kept


def test_what_a_step_puts_in_the_place_of_a_memory_is_kept(site: Site) -> None:
    """A new tensor under an old name; clients that have finished keep theirs."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        memory["x"] = memory["x"] + 1
        return descend(adapters, memory, given, tools)

    found = site.run(half(step=step), memory={"x": torch.zeros(3)}, cohort=2)
    assert found.memory["x"].tolist() == [1, 4, 2]


def test_a_name_that_a_step_adds_is_kept(site: Site) -> None:
    """It begins as zero for whoever has finished by then."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        added = {"second": torch.full((len(adapters), 2), 7.0)} if tools.clock.step else {}
        first = memory.get("first", torch.zeros(len(adapters), dtype=torch.int64)) + 1
        return descend(adapters, {**memory, **added, "first": first}, given, tools)

    found = site.run(half(step=step))
    assert found.memory["first"].tolist() == [1, 4, 2]
    assert found.memory["first"].dtype == torch.int64
    assert found.memory["second"].tolist() == [[0, 0], [7, 7], [7, 7]]


def test_a_name_that_a_step_drops_stays_as_it_was(site: Site) -> None:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return descend(adapters, {}, given, tools)

    assert site.run(half(step=step), memory={"x": torch.arange(3.0)}).memory["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(1)])
def test_a_memory_that_changes_its_shape_or_type_is_refused_by_name(site: Site, wrong: Tensor) -> None:
    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return descend(adapters, {"x": wrong[: len(adapters)]}, given, tools)

    with pytest.raises(MethodError, match=r"'local': memory 'x' was .*keeps its type and shape"):
        site.run(half(step=step), memory={"x": torch.zeros(3)})


def test_moments_are_the_optimizers_own_whatever_a_method_calls_its_memory(site: Site) -> None:
    """AdamW counts in `steps` and keeps `moment_1`; a method may use these names as well."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        memory["steps"] += 100
        memory["moment_1"] = memory["moment_1"] - 5
        return descend(adapters, memory, given, tools)

    names = {"steps": torch.full((3,), 1000), "moment_1": torch.zeros(3, 2)}
    found, expected = site.run(half(step=step), memory=names), site.run()
    assert torch.equal(found.returned.rows, expected.returned.rows)
    assert found.moments["main"]["steps"].tolist() == [1, 4, 2]
    assert found.memory["steps"].tolist() == [1100, 1400, 1200]
    assert found.memory["moment_1"][:, 0].tolist() == [-5, -20, -10]


def test_a_second_trained_row_has_moments_of_its_own(site: Site) -> None:
    """A client's own row beside the one that it shares, each as if it were alone."""

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        adapters, _ = descend(adapters, {}, given, tools)
        own = adapters.with_rows(memory["row"])
        _, gradient = tools.grad(own)
        return adapters, {"row": tools.update(own, gradient, of="own").rows}

    other = tiny.adapters(site.start.layout, (2, 1, 2), seed=5).rows
    found = site.run(half(step=step), memory={"row": other})
    alone = {"main": site.run(), "own": site.run(given=Message(other))}
    torch.testing.assert_close(found.returned.rows, alone["main"].returned.rows, **CLOSE)
    torch.testing.assert_close(found.memory["row"], alone["own"].returned.rows, **CLOSE)
    assert found.moments.keys() == alone.keys()
    for of, one in alone.items():
        for name, value in one.moments["main"].items():
            torch.testing.assert_close(found.moments[of][name], value, **CLOSE)
    assert torch.equal(found.losses, alone["main"].losses)  # of the first row that was asked for


def test_only_the_clients_that_are_named_take_an_update_and_the_others_keep_rows_and_moments(site: Site) -> None:
    """Each takes its first 1, 2 and 0 steps alone: weight decay, moments and step counts rest afterwards."""
    limits = torch.tensor([1, 2, 0])

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        _, gradient = tools.grad(adapters)
        return tools.update(adapters, gradient, who=tools.clock.step < memory["limit"]), memory

    def alone(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        return (
            descend(adapters, memory, given, tools) if tools.clock.step < int(memory["limit"]) else (adapters, memory)
        )

    found = site.run(half(step=step), memory={"limit": limits})
    for k in range(3):
        one = site.run(half(step=alone), who=(k,), memory={"limit": limits[k : k + 1]})
        torch.testing.assert_close(found.rows[k], one.rows[0], **CLOSE)
        for name, value in one.moments["main"].items():
            torch.testing.assert_close(found.moments["main"][name][k], value[0], **CLOSE)
    assert found.moments["main"]["steps"].tolist() == limits.tolist()
    assert torch.equal(found.rows[2], site.start.rows[2])


# ---------------------------------------------------------------- what a client sees and sends


def test_what_was_given_is_seen_within_the_clients_rank(site: Site) -> None:
    own = site.start.layout.rank_mask(site.start.ranks)
    seen: list[Tensor] = []

    def watch(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        seen.extend([given.rows.clone(), given.more["other"].clone()])
        return adapters, memory

    dirty = torch.where(own, site.start.rows, 5.0)
    site.run(half(begin=watch), given=Message(dirty, more={"other": dirty + 1}))
    order = [1, 2, 0]  # most steps first
    assert torch.equal(seen[0], (dirty * own)[order])
    assert torch.equal(seen[1], ((dirty + 1) * own)[order])
    assert bool((dirty[1][~own[1]] == 5).all())  # it is only read


def test_columns_that_are_not_trained_keep_what_begin_made_of_them(site: Site) -> None:
    """Neither decay, nor momentum, nor a step of the method's own moves them."""
    layout = site.start.layout
    columns = factor_columns(layout, "B")

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        _, gradient = tools.grad(adapters)
        assert not gradient[:, ~columns].any()
        adapters = tools.update(adapters, gradient)
        return adapters.with_rows(adapters.rows + 0.01), memory

    method = replace(half(step=step), trained=lambda layout, clock: columns)
    found = site.run(method)
    assert torch.equal(found.rows[:, ~columns], site.start.rows[:, ~columns])
    moved = found.rows != site.start.rows
    assert bool((moved | ~(columns & layout.rank_mask(site.start.ranks))).all())
    for name in ("moment_1", "moment_2"):
        assert not found.moments["main"][name][:, ~columns].any()


def test_a_client_keeps_its_row_whatever_it_sends(site: Site) -> None:
    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        return Message(adapters.rows * 0 + 3, more={"other": adapters.rows + 1}), memory

    found, plain = site.run(half(finish=finish), cohort=2), site.run(cohort=2)
    assert torch.equal(found.rows, plain.returned.rows)
    assert bool((found.returned.rows == 3).all())
    assert torch.equal(found.returned.more["other"], plain.returned.rows + 1)


def test_a_client_can_ask_for_its_loss_on_its_validation_split_and_on_the_batch(site: Site) -> None:
    seen: dict[str, list[Tensor]] = {"begin": [], "batch": [], "finish": []}
    losses: list[Tensor] = []

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        seen["begin"].append(tools.loss(adapters))
        with pytest.raises(AssertionError, match="no batch"):
            tools.loss(adapters, on="batch")
        return adapters, memory

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        seen["batch"].append(tools.loss(adapters, on="batch"))
        found, gradient = tools.grad(adapters)
        losses.append(found.double().clone())
        return tools.update(adapters, gradient), memory

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        seen["finish"].append(tools.loss(adapters))
        return Message(adapters.rows), memory

    clients = [*site.clients[:2], replace(site.clients[2], validation=())]
    found = replace(site, clients=clients).run(half(begin=begin, step=step, finish=finish))
    assert torch.equal(found.returned.rows, site.run().returned.rows)
    assert torch.equal(found.losses, site.run().losses)
    order = [1, 2, 0]
    for place, rows in (("begin", site.start.rows), ("finish", found.rows)):
        (measured,) = seen[place]
        assert measured.dtype == torch.float64
        for n, k in enumerate(order):
            own = site.start.take(torch.tensor([k]), rows=rows[k : k + 1])
            expected = measure_loss(
                site.base, lambda ids, own=own: own, [clients[k]], [0], split="validation", cohort=1
            )[0]
            assert float(measured[n]) == pytest.approx(float("nan") if expected is None else expected, nan_ok=True)
    for one, other in zip(seen["batch"], losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
