"""Whole rounds on a tiny GPT-2 with mixed ranks: what is merged is what is stored, measured, sent and used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.house import (
    RANKS,
    SCHEDULE,
    TRAIN,
    House,
    Ran,
    base,
    house,
    run,
    spoil,
    without_seconds,
)
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.columns import count_columns, factor_columns
from fedmira.disk.folders import RunFolder
from fedmira.engine import run as rounds
from fedmira.engine.clients import Send
from fedmira.engine.events import Event, Observer, RoundDone, silent
from fedmira.engine.simulated import Simulated
from fedmira.evaluation.measure import measure_loss
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Message, Method, State
from fedmira.methods.wrappers import only

METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "mira": {"lambda": 0.3, "neighbours": "stored", "graph": {"kind": "uniform"}},
}


def play(
    name: str,
    path: Path,
    *,
    of: House | None = None,
    change: Callable[[Method], Method] = lambda m: m,
    observer: Observer = silent,
) -> Ran:
    of = of or house()
    return run(of, change(build(name, METHODS[name], of.cohort())), path, label=name, observer=observer)


def returned(ran: Ran, number: int) -> Tensor:
    """What the clients of a round ended with: rows that reached the merge, or their own where nothing travels."""
    return ran.phases[number].rows if ran.folder.facts.label == "local" else ran.merged[number]


@pytest.fixture(scope="module", params=METHODS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return play(request.param, tmp_path_factory.mktemp(request.param) / "run")


@pytest.fixture(scope="module", params=["local", "mira"])
def personal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return play(request.param, tmp_path_factory.mktemp(request.param) / "run")


@pytest.fixture(scope="module")
def mira(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return play("mira", tmp_path_factory.mktemp("mira") / "run")


def test_every_round_measures_each_client_with_its_own_adapter_before_and_after_the_merge(ran: Ran) -> None:
    personal = len(ran.stored[0]) > 1
    for number, ids in enumerate(SCHEDULE):
        record = ran.records[number]
        for place, k in enumerate(ids):
            stored = ran.stored[number][k if personal else 0]
            for row, key in ((returned(ran, number)[place], "loss_before"), (stored, "loss_after")):
                ranks, scale = torch.tensor(RANKS[k : k + 1]), torch.tensor([3 / RANKS[k]])
                own = Adapters(ran.house.layout, row[None].clone(), ranks, scale).mask_()
                expected = measure_loss(
                    base(),
                    lambda ids, own=own: own,
                    ran.house.clients[k : k + 1],
                    [0],
                    split="validation",
                    cohort=1,
                )
                assert record[key][place] == pytest.approx(expected[0], rel=1e-5), (number, k, key)


def test_a_client_that_comes_back_is_sent_the_row_that_the_last_merge_left_it(personal: Ran) -> None:
    assert torch.equal(personal.sent[1][0], personal.stored[0][1])
    assert torch.equal(personal.sent[2][0], personal.stored[1][0])
    assert torch.equal(personal.sent[2][1], personal.stored[1][1])


def test_the_laplacian_step_reaches_a_client_that_comes_back(mira: Ran) -> None:
    for place, k in enumerate(SCHEDULE[0]):
        assert not torch.equal(mira.stored[0][k], returned(mira, 0)[place])
    assert torch.equal(mira.sent[1][0], mira.stored[0][1])
    assert not torch.equal(mira.sent[1][0], returned(mira, 0)[1])


def test_a_first_time_client_starts_from_the_common_start_whoever_trained_before(personal: Ran) -> None:
    start = personal.house.common_start
    assert torch.equal(personal.sent[0], start[[0, 1]])
    assert torch.equal(personal.sent[1][1], start[2])


def test_silent_clients_keep_their_row(personal: Ran) -> None:
    start = personal.house.common_start
    assert torch.equal(personal.stored[0][[2, 3]], start[[2, 3]])
    assert torch.equal(personal.stored[1][[0, 3]], personal.stored[0][[0, 3]])
    assert torch.equal(personal.rows[2], personal.stored[1][2])
    assert torch.equal(personal.rows[3], start[3])


def test_neither_training_nor_merging_fills_what_is_beyond_a_clients_rank(ran: Ran) -> None:
    own = ran.house.layout.rank_mask(ran.house.ranks)
    for number, ids in enumerate(SCHEDULE):
        assert not returned(ran, number)[~own[list(ids)]].any()
    if len(ran.stored[0]) > 1:
        assert all(not rows[~own].any() for rows in ran.stored)
        assert not ran.rows[~own].any()


def test_a_merge_that_fills_padded_ranks_is_masked_by_the_engine(tmp_path: Path) -> None:
    def fill(method: Method) -> Method:
        def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
            return Change(ids, returned.rows + 0.01)

        return replace(method, merge=merge)

    found = play("mira", tmp_path / "run", change=fill)
    own = found.house.layout.rank_mask(found.house.ranks)
    assert all(not rows[1][~own[1]].any() for rows in found.stored)
    assert not torch.equal(found.stored[0][1], returned(found, 0)[1])


@pytest.mark.parametrize("name", ["local", "mira"])
def test_an_upload_that_is_not_finite_is_silence_and_the_others_go_on(tmp_path: Path, name: str) -> None:
    """Client 0 has the most steps. Where nothing travels, it is the client that finds its own row unfit."""
    found = play(name, tmp_path / "run", change=spoil(1))
    start = found.house.common_start
    assert found.records[0]["refused"] == {"c0": "not_finite"}
    assert found.records[0]["answered"] == ["c1"]
    assert found.records[0]["loss_before"][0] is None
    assert torch.equal(found.stored[0][0], start[0])
    assert not torch.equal(found.stored[0][1], start[1])
    assert torch.equal(found.sent[2][0], found.stored[1][0])  # and it goes on from there


@pytest.mark.parametrize("name", ["local", "fedavg", "mira"])
def test_a_first_round_in_which_every_upload_is_refused_changes_nothing(tmp_path: Path, name: str) -> None:
    found = play(name, tmp_path / "run", change=spoil(1, everybody=True))
    assert found.records[0]["answered"] == []
    assert torch.equal(found.sent[1][0], found.sent[0][1])  # client 1 again, from where it was
    assert len(found.records) == 3


def test_what_is_served_in_the_end_is_what_the_last_checkpoint_holds(ran: Ran) -> None:
    last = ran.stored[-1]
    own = ran.house.layout.rank_mask(torch.tensor(RANKS))
    assert torch.equal(ran.rows, (last if len(last) > 1 else last.expand(4, -1)) * own)


def test_clients_in_smaller_passes_end_close_to_where_they_end_in_one(tmp_path: Path, mira: Ran) -> None:
    found = play("mira", tmp_path / "run", of=house(cohort=1))
    torch.testing.assert_close(found.rows, mira.rows, rtol=1e-3, atol=1e-4)


def test_a_run_repeats_its_bits(tmp_path: Path, ran: Ran) -> None:
    name = ran.folder.facts.label
    assert torch.equal(play(name, tmp_path / "run").rows, ran.rows)


def test_an_absent_client_with_other_data_changes_nothing_for_the_others(tmp_path: Path, mira: Ran) -> None:
    clients = [tiny.client(f"c{k}", train=count, seed=int(k == 3)) for k, count in enumerate(TRAIN)]
    assert clients[3].train != mira.house.clients[3].train
    assert torch.equal(play("mira", tmp_path / "run", of=house(clients=clients)).rows, mira.rows)


@pytest.mark.parametrize("keep", [False, True])
def test_kept_moments_belong_to_their_client_and_go_on_when_it_comes_back(tmp_path: Path, keep: bool) -> None:
    """Client 1 takes 1 step in each of three rounds, client 0 takes 3 steps in two, client 2 takes 2 in one."""
    found = play("local", tmp_path / "run", of=house(keep_optimizer=keep))
    seen = [sorted(phase.moments["main"]["steps"].tolist()) for phase in found.phases]
    assert seen == ([[1, 3], [2, 2], [3, 6]] if keep else [[1, 3], [1, 2], [1, 3]])


def test_a_merge_weighs_clients_by_their_training_examples(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def watch(method: Method) -> Method:
        def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
            seen.append(weights.tolist())
            return method.merge(state, ids, returned, weights, clock)

        return replace(method, merge=merge)

    play("fedavg", tmp_path / "run", change=watch)
    assert seen == [[TRAIN[k] for k in ids] for ids in SCHEDULE]


def test_a_methods_own_learning_rate_is_that_of_its_clients_and_of_its_clock(tmp_path: Path) -> None:
    """With a rate of 0 nobody moves, whatever the config says."""
    seen: list[float] = []

    def still(method: Method) -> Method:
        def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
            seen.append(clock.learning_rate)
            return method.merge(state, ids, returned, weights, clock)

        return replace(method, merge=merge, regime=replace(method.regime, learning_rate=0.0))

    found = play("local", tmp_path / "run", change=still)
    assert torch.equal(found.rows, found.house.common_start)
    assert seen == [0.0] * len(SCHEDULE)


def test_a_client_of_the_last_round_alone_is_tested_with_what_it_has_then(tmp_path: Path) -> None:
    of = house(metrics=["loss"], count=2)
    found = run(of, build("local", {}, of.cohort()), tmp_path / "run", schedule=((0, 1), (1, 3)))
    expected = measure_loss(base(), found.serve, of.clients, range(4), split="test", cohort=8)
    last = {
        row["client"]: float(row["value"]) for row in found.results if (row["round"], row["split"]) == ("2", "test")
    }
    assert [last[client.id] for client in of.clients] == pytest.approx(expected)
    assert last["c3"] != pytest.approx(of.start().test["loss"][3])


def test_everybody_is_validated_in_every_nth_round_and_in_the_last() -> None:
    course = rounds.Course(rounds=5, every=2, seed=0, learning_rate=0.0)
    assert [number for number in range(1, 6) if course.is_due(number)] == [2, 4, 5]


def test_a_shared_row_is_validated_on_everybody_in_the_rounds_that_are_due_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = house()
    evaluation = of.config.evaluation.model_copy(update={"every": 2})
    of = replace(of, config=of.config.model_copy(update={"evaluation": evaluation}))
    asked: list[list[int]] = []
    losses = Simulated.losses

    def noted(self: Simulated, ids: Tensor, send: Send) -> list[float | None]:
        asked.append(ids.tolist())
        return losses(self, ids, send)

    monkeypatch.setattr(Simulated, "losses", noted)
    play("fedavg", tmp_path / "run", of=of)
    assert asked == [[0, 1], [1, 2], [0, 3], [0, 1], [2, 3]]


# ---------------------------------------------------------------- columns that stay with their client


@pytest.fixture(scope="module")
def shared_first_factors(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """FedSA-LoRA: A travels and is averaged, B stays with its client."""
    return play("fedavg", tmp_path_factory.mktemp("only") / "run", change=lambda method: only(method, travels="A"))


def test_columns_that_do_not_travel_stay_with_their_client(shared_first_factors: Ran) -> None:
    """B as the client left it when it last took part; of one that never did, as it began. A as it was averaged."""
    ran = shared_first_factors
    first = factor_columns(ran.house.layout, "A")
    real = ran.house.layout.rank_mask(ran.house.ranks)
    assert torch.equal(ran.sent[1][0][~first], ran.phases[0].rows[1][~first])
    assert torch.equal(ran.sent[2][0][~first], ran.phases[0].rows[0][~first])
    assert torch.equal(ran.sent[2][1][~first], ran.phases[1].rows[0][~first])
    assert torch.equal(ran.sent[1][1][~first], ran.house.common_start[2][~first])
    for number in (1, 2):
        assert torch.equal(ran.sent[number][:, first], ran.stored[number - 1].expand(2, -1)[:, first])
    last = {0: (2, 0), 1: (2, 1), 2: (1, 1)}
    for k, (number, place) in last.items():
        assert torch.equal(ran.rows[k][~first], ran.phases[number].rows[place][~first])
    assert torch.equal(ran.rows[3][~first], ran.house.common_start[3][~first])
    assert torch.equal(ran.rows[:, first], (ran.stored[-1] * real)[:, first])
    assert bool((ran.rows[:3][:, ~first & real[1]] != 0).all())  # each has trained its own
    assert not torch.equal(ran.rows[0][~first], ran.rows[2][~first])


def test_only_what_travels_is_merged_and_counted(shared_first_factors: Ran) -> None:
    """The server has no B of anybody: its own is the common start's."""
    ran = shared_first_factors
    first = factor_columns(ran.house.layout, "A")
    for rows in (*ran.merged, *ran.stored):
        assert torch.equal(rows[:, ~first], ran.house.common_start[:1, ~first].expand(len(rows), -1))
    for record, ids in zip(ran.records, SCHEDULE, strict=True):
        count = count_columns(ran.house.layout, first, ran.house.ranks[list(ids)])
        assert record["bytes_up"] == record["bytes_down"] == 4 * int(count.sum())


def test_what_stays_with_clients_outlives_a_stop(shared_first_factors: Ran, tmp_path: Path) -> None:
    stopped: dict[str, Any] = {"of": house(), "change": lambda method: only(method, travels="A")}

    def stop(event: Event) -> None:
        if isinstance(event, RoundDone) and event.record.round == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        play("fedavg", tmp_path / "run", observer=stop, **stopped)
    assert torch.equal(play("fedavg", tmp_path / "run", **stopped).rows, shared_first_factors.rows)


# ---------------------------------------------------------------- a stop between a round and its record


@pytest.mark.parametrize("name", METHODS)
def test_a_round_that_is_durable_and_was_not_measured_is_measured_after_the_stop(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is applied from its checkpoint, scored, and written as if nothing had happened; no round is played twice."""
    whole = play(name, tmp_path / "whole")
    measured = iter(range(10))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(measured) == 1:
            raise InterruptedError
        return measure(*arguments, **options)

    measure = rounds._measure
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_measure", killed)
        with pytest.raises(InterruptedError):
            play(name, tmp_path / "run")
    assert [record["round"] for record in RunFolder(tmp_path / "run").records()] == [1]
    found = play(name, tmp_path / "run")
    assert len(found.phases) == 1  # of round 3 alone
    assert torch.equal(found.rows, whole.rows)
    assert found.results == whole.results
    assert without_seconds(found.records) == without_seconds(whole.records)
