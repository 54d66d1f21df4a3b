"""Schedules of the learning rate are transformers', each client at its own place in them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from tests.engine.house import house
from tests.engine.house import run as play
from torch import Tensor
from transformers import get_scheduler

from fedmira.adapters import Adapters
from fedmira.adapters.optim import adamw, sgd
from fedmira.data.batches import Batch, collate
from fedmira.engine.phase import PhaseResult, local_phase, plan_steps
from fedmira.engine.rates import Schedule, by_client
from fedmira.engine.tools import Moments, Training
from fedmira.methods import build
from fedmira.methods.base import Clock, Cohort, Memory, Message, Method, Regime, Tools, descend
from fedmira.methods.wrappers import wrap
from fedmira.model.passes import gradients

TRAIN = (2, 7, 4)  # examples: 1, 4 and 2 steps of two in one epoch
COHORT = Cohort(("c0", "c1", "c2"), TRAIN, ({}, {}, {}), (), 0)
LOCAL = build("local", {}, COHORT)
BASE = tiny.base("gpt2", targets=["c_attn"])
CLIENTS = [tiny.client(f"c{k}", train=count) for k, count in enumerate(TRAIN)]
START = tiny.adapters(tiny.layout(BASE, 2), (2, 1, 2))
CLOSE = {"rtol": 1e-8, "atol": 1e-10}
KINDS: Mapping[str, Mapping[str, float]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_min_lr": {"min_lr": 0.004},
}
EPOCH = Training(
    adamw(weight_decay=0.1), 0.02, 2, None, 1, 0.5, True, 0.0, seed=3, schedule=Schedule("linear", rounds=3, warmup=2)
)


def phase(
    *,
    training: Training = EPOCH,
    method: Method = LOCAL,
    who: tuple[int, ...] = (0, 1, 2),
    rows: Tensor | None = None,
    moments: Moments | None = None,
    number: int = 2,
) -> PhaseResult:
    index = torch.tensor(who)
    start = START.take(index) if rows is None else START.take(index, rows=rows)
    return local_phase(
        BASE,
        method,
        [CLIENTS[k] for k in who],
        start,
        Message(start.rows),
        method.client.start(start),
        moments,
        training=training,
        clock=Clock(number),
        cohort=8,
    )


# ---------------------------------------------------------------- the numbers


def rates(schedule: Schedule, rounds: int, steps: int = 1, peak: float = 1.0) -> list[float]:
    return [
        schedule.at(peak, round_number=number, step=step, steps=steps)
        for number in range(1, rounds + 1)
        for step in range(steps)
    ]


def test_over_rounds_every_step_of_a_round_has_one_rate() -> None:
    assert rates(Schedule("linear", "rounds", rounds=4), 4, steps=2) == [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_over_the_run_rates_fall_step_by_step() -> None:
    assert rates(Schedule("linear", "run", rounds=2), 2, steps=2) == [1, 0.75, 0.5, 0.25]


def test_over_steps_every_phase_begins_anew() -> None:
    assert rates(Schedule("linear", "steps", rounds=9), 2, steps=2) == [1, 0.5, 1, 0.5]


def test_a_warm_up_over_rounds_has_no_round_that_is_trained_for_nothing() -> None:
    assert rates(Schedule("constant_with_warmup", "rounds", rounds=5, warmup=3), 5) == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("warmup", [3, 0.5])
def test_a_warm_up_is_a_number_of_steps_or_a_share_of_all(warmup: float) -> None:
    assert rates(Schedule("constant_with_warmup", rounds=3, warmup=warmup), 3, steps=2) == [0, 1 / 3, 2 / 3, 1, 1, 1]


def test_cosine_over_rounds_is_that_of_openfedllm() -> None:
    """min + (max - min) / 2 (1 + cos(pi t / T)), t from 0: cosine_learning_rate of its utils."""
    found = rates(Schedule("cosine_with_min_lr", "rounds", rounds=7, min_lr=1e-6), 7, peak=5e-5)
    expected = [1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * t / 7)) for t in range(7)]
    assert found == pytest.approx(expected, rel=1e-12)


@given(
    kind=st.sampled_from(list(KINDS)),
    rounds=st.integers(1, 6),
    steps=st.integers(1, 6),
    warmup=st.one_of(st.integers(0, 9), st.floats(0, 0.9)),
)
def test_the_rates_of_a_run_are_those_of_one_training_of_as_many_steps(
    kind: str, rounds: int, steps: int, warmup: float
) -> None:
    total, peak = rounds * steps, 0.01
    schedule = Schedule(kind, rounds=rounds, warmup=warmup, **KINDS[kind])  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    first = int(warmup) if warmup >= 1 else math.ceil(total * warmup)
    judge = get_scheduler(kind, optimizer, first, total, dict(KINDS[kind]))
    expected = []
    for _ in range(total):
        expected.append(judge.get_last_lr()[0])
        optimizer.step()
        judge.step()
    assert rates(schedule, rounds, steps, peak) == expected
    mean = [schedule.mean(peak, round_number=number, steps=steps) for number in range(1, rounds + 1)]
    assert steps * math.fsum(mean) == pytest.approx(math.fsum(expected), rel=1e-12)
    again = replace(schedule, rounds=rounds + 3)
    assert schedule.depends_on_rounds or rates(again, rounds, steps, peak) == expected


def test_clients_at_one_rate_share_a_number_and_others_have_a_column() -> None:
    assert by_client([0.5, 0.5], torch.device("cpu")) == 0.5
    assert by_client([0.5, 0.25], torch.device("cpu")).tolist() == [[0.5], [0.25]]  # type: ignore[union-attr]


# ---------------------------------------------------------------- in a local phase


@pytest.mark.parametrize("over", ["run", "steps", "rounds"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_is_trained_as_torch_and_transformers_train_it(kind: str, over: str) -> None:
    """Two rounds of four steps, moments kept: one plain loop with AdamW and get_scheduler."""
    warmup = 0 if kind in ("constant", "cosine_with_min_lr") or over == "rounds" else 3
    schedule = Schedule(kind, over, rounds=2, warmup=warmup, **KINDS[kind])  # type: ignore[arg-type]
    training = replace(EPOCH, max_grad_norm=None, schedule=schedule)
    first = phase(training=training, who=(1,), number=1)
    second = phase(training=training, who=(1,), number=2, rows=first.rows, moments=first.moments)
    assert first.steps.tolist() == [4]

    row = START.rows[1:2].clone().requires_grad_()
    judge = torch.optim.AdamW([row], lr=0.02, weight_decay=0.1)

    def schedule_of(total: int) -> Any:
        return get_scheduler(kind, judge, warmup, total, dict(KINDS[kind]))

    alone, into = START.take(torch.tensor([1])), torch.zeros_like(row)
    scheduler = schedule_of({"run": 8, "steps": 4, "rounds": 2}[over])
    for number in (1, 2):
        if over == "steps" and number == 2:
            judge.param_groups[0]["lr"] = judge.param_groups[0]["initial_lr"]
            scheduler = schedule_of(4)
        for chosen in plan_steps(CLIENTS[1], training, number):
            batch = tiny_batch(chosen.tolist())
            gradients(BASE, alone.with_rows(row.detach()), batch, into=into)
            row.grad = into * START.layout.rank_mask(alone.ranks)
            judge.step()
            if over != "rounds":
                scheduler.step()
        if over == "rounds":
            scheduler.step()
    torch.testing.assert_close(second.rows, row.detach(), **CLOSE)
    assert float((second.rows - START.rows[1]).abs().max()) > 0.02


def tiny_batch(chosen: list[int]) -> Batch:
    return collate([[CLIENTS[1].train[i] for i in chosen]], pad_id=BASE.pad_id)


METHODS: Mapping[str, tuple[Method, Training]] = {
    "adamw": (LOCAL, EPOCH),
    "sgd": (LOCAL, replace(EPOCH, optimizer=sgd(momentum=0.9, weight_decay=0.1))),
    "proximal": (wrap(LOCAL, [("proximal", {"mu": 0.5})]), EPOCH),
    "half of the columns": (wrap(LOCAL, [("only", {"trained": "B", "travels": "B"})]), EPOCH),
    "fedsophia": (build("fedsophia", {"weight_decay": 0.1, "tau": 2}, COHORT), EPOCH),
}


@pytest.mark.parametrize("over", ["run", "steps"])
@pytest.mark.parametrize("name", METHODS)
def test_a_client_among_others_of_other_lengths_has_the_rates_it_has_alone(name: str, over: str) -> None:
    method, training = METHODS[name]
    training = replace(training, schedule=replace(EPOCH.schedule, over=over, warmup=1))  # type: ignore[arg-type]
    together = phase(method=method, training=training)
    for k in range(3):
        alone = phase(method=method, training=training, who=(k,))
        torch.testing.assert_close(alone.rows[0], together.rows[k], **CLOSE)
    plain = phase(method=method, training=replace(training, schedule=Schedule()))
    assert not torch.allclose(plain.rows[1], together.rows[1])


def seen_by(method: Method, training: Training = EPOCH) -> dict[str, list[Any]]:
    """The learning rates that each part of a client's half is given, in a phase of all three clients."""
    seen: dict[str, list[Any]] = {"begin": [], "step": [], "finish": []}

    def note(name: str, tools: Tools) -> None:
        rate = tools.clock.learning_rate
        seen[name].append(rate[:, 0].tolist() if isinstance(rate, Tensor) else rate)

    def begin(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        note("begin", tools)
        return adapters, memory

    def step(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
        note("step", tools)
        return descend(adapters, memory, given, tools)

    def finish(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Message, Memory]:
        note("finish", tools)
        return Message(adapters.rows), memory

    phase(
        method=replace(method, client=replace(method.client, begin=begin, step=step, finish=finish)), training=training
    )
    return seen


def test_a_methods_clock_has_the_rate_of_each_client_and_at_the_end_their_mean() -> None:
    """Round 2 of 2; clients in the order of the pass take 4, 2 and 1 steps."""
    seen = seen_by(LOCAL, replace(EPOCH, learning_rate=1.0, schedule=Schedule("linear", rounds=2)))
    assert seen["step"] == [0.5, [0.375, 0.25], 0.25, 0.125]
    assert seen["begin"] == [0.5]
    assert seen["finish"] == [[(0.5 + 0.375 + 0.25 + 0.125) / 4, (0.5 + 0.25) / 2, 0.5]]


def test_without_a_schedule_a_methods_clock_has_the_configs_number() -> None:
    seen = seen_by(LOCAL, replace(EPOCH, schedule=Schedule()))
    assert seen == {"begin": [0.02], "step": [0.02] * 4, "finish": [0.02]}


# ---------------------------------------------------------------- in a run

COSINE = {"lr_scheduler_type": "cosine", "learning_rate": 0.05}


def test_a_round_notes_its_mean_rate_and_only_where_a_schedule_changes_it(tmp_path: Path) -> None:
    built = build("local", {}, house().cohort())
    linear = house(lr_scheduler_type="linear", lr_scheduler_over="rounds", learning_rate=0.1, count=2)
    found = play(linear, built, tmp_path / "linear", schedule=[(0, 1), (1, 2)])
    assert [record["notes"]["learning_rate"] for record in found.records] == pytest.approx([0.1, 0.05])
    plain = play(house(count=1), built, tmp_path / "plain", schedule=[(0, 1)])
    assert plain.records[0]["notes"] == {}


def test_a_methods_own_learning_rate_has_the_same_factors(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "linear", "lr_scheduler_over": "rounds", "count": 2}
    built = build("local", {}, house().cohort())
    own = replace(built, regime=Regime(learning_rate=0.06))
    found = play(house(learning_rate=0.01, **settings), own, tmp_path / "own", schedule=[(0, 1), (1, 2)])
    same = play(house(learning_rate=0.06, **settings), built, tmp_path / "same", schedule=[(0, 1), (1, 2)])
    assert [record["notes"]["learning_rate"] for record in found.records] == pytest.approx([0.06, 0.03])
    assert torch.equal(found.rows, same.rows)


def test_a_pool_follows_the_schedule_by_its_own_steps(tmp_path: Path) -> None:
    """Two equal clients of two steps each: the pool takes four, as one client of four steps does."""
    same = [replace(tiny.client("c0", train=4), id=name, name=name) for name in ("c0", "c1")]
    settings = {**COSINE, "local_epochs": None, "count": 2}
    of = house(clients=same, local_steps=2, **settings)
    found = play(of, build("pooled", {}, of.cohort()), tmp_path / "pool", schedule=[(0, 1), (0, 1)])
    rates = [record["notes"]["learning_rate"] for record in found.records]
    assert rates == pytest.approx(
        [sum(0.025 * (1 + math.cos(math.pi * (4 * t + i) / 8)) for i in range(4)) / 4 for t in range(2)]
    )


@pytest.mark.parametrize(("over", "same"), [("run", True), ("rounds", True), ("steps", False)])
def test_what_is_tuned_after_the_last_round_has_the_full_rate_unless_phases_have_a_schedule(
    over: str, same: bool, tmp_path: Path
) -> None:
    """No round trains (rate 0 would keep the start): the common start is tuned, with and without a schedule."""
    tuned = []
    for name, settings in (("scheduled", {**COSINE, "lr_scheduler_over": over}), ("plain", {"learning_rate": 0.05})):
        of = house(count=1, **settings)
        method = wrap(build("fedavg", {}, of.cohort([(0,)])), [("tuned_after", {"steps": 2})])
        still = replace(method, client=replace(method.client, step=first_round_rests))
        tuned.append(play(of, still, tmp_path / name, schedule=[(0,)]).rows)
    assert torch.equal(tuned[0], tuned[1]) == same
    assert float((tuned[0] - house().common_start).abs().max()) > 1e-3


def first_round_rests(adapters: Adapters, memory: Memory, given: Message, tools: Tools) -> tuple[Adapters, Memory]:
    return (adapters, memory) if tools.clock.round == 1 else descend(adapters, memory, given, tools)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_ratio": 0.2, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, {"warmup": 0.2, "min_lr_rate": 0.1}),
        ({"warmup_steps": 3, "lr_scheduler_kwargs": {"min_lr": 1e-3}}, {"warmup": 3, "min_lr": 1e-3}),
        ({"lr_scheduler_over": "rounds", "lr_scheduler_kwargs": {"min_lr": 0}}, {"over": "rounds", "min_lr": 0}),
    ],
)
def test_the_config_gives_the_schedule(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    of = house(count=7, lr_scheduler_type="cosine_with_min_lr", **settings)
    assert of.training.schedule == Schedule("cosine_with_min_lr", rounds=7, **expected)
