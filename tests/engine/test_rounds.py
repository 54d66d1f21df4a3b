"""Whole rounds on a tiny GPT-2 with mixed ranks: what is merged is what is stored, measured, sent and served."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.config.sections import Config
from fedmira.data.batches import ClientData
from fedmira.disk.folders import RunFolder
from fedmira.engine.federation import Federation, common_start
from fedmira.engine.ledger import Ledger, restore
from fedmira.engine.run import run_rounds
from fedmira.engine.scoring import score_start
from fedmira.evaluation.measure import measure_loss
from fedmira.methods import build
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, State
from fedmira.model.base.load import Base

RANKS = (2, 1, 2, 1)
TRAIN = (5, 2, 3, 4)
SCHEDULE = ((0, 1), (1, 2), (0, 1))  # client 3 never; 2 once; 0 pauses; 1 always
SEED = 3
METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "mira": {"lambda": 0.3, "neighbours": "stored", "graph": {"kind": "uniform"}},
}


@functools.cache
def base() -> Base:
    return tiny.base("gpt2", targets=["c_attn"], dtype=torch.float32)


def config(**training: Any) -> Config:
    return Config.model_validate(
        {
            "seeds": [SEED],
            "output_dir": "unused",
            "model": {"base_model": "tiny", "dtype": "float32", "device": "cpu"},
            "lora": {"r": 2, "lora_alpha": 3},
            "data": {"path": "unused"},
            "federation": {"rounds": len(SCHEDULE)},
            "training": {"local_epochs": 1, "batch_size": 2, "learning_rate": 0.02, **training},
            "methods": [{"name": "local"}],
        }
    )


def federation(*, cohort: int = 8, clients: Sequence[ClientData] | None = None, **training: Any) -> Federation:
    own = clients or [tiny.client(f"c{k}", train=count) for k, count in enumerate(TRAIN)]
    return Federation(config(**training), base(), tuple(own), tiny.layout(base(), 2), torch.tensor(RANKS), cohort)


@dataclass(frozen=True, eq=False)
class Ran:
    federation: Federation
    folder: RunFolder
    serve: Callable[[Tensor], Adapters]
    ledgers: list[Tensor]  # all rows of the state after each round
    sent: list[Tensor]  # rows that each round's clients were sent
    returned: list[Tensor]  # rows that reached each round's merge

    @property
    def rows(self) -> Tensor:
        return self.serve(torch.arange(len(self.federation))).rows

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.folder.records()


def play(
    name: str, path: Path, *, of: Federation | None = None, change: Callable[[Method], Method] = lambda m: m
) -> Ran:
    house = of or federation()
    schedule = tuple(np.array(ids) for ids in SCHEDULE)
    cohort = Cohort(
        tuple(client.id for client in house.clients),
        tuple(len(client.train) for client in house.clients),
        ({},) * len(house),
        schedule,
        SEED,
    )
    method = change(build(name, METHODS[name], cohort))
    sent: list[Tensor] = []
    returned: list[Tensor] = []

    def send(state: State, ids: Tensor, clock: Clock) -> Message:
        message = method.send(state, ids, clock)
        sent.append(message.rows.clone())
        return message

    def merge(state: State, ids: Tensor, uploads: Message, weights: Tensor, clock: Clock) -> Change:
        returned.append(uploads.rows.clone())
        return method.merge(state, ids, uploads, weights, clock)

    folder = RunFolder(path)
    folder.create(house.config, {"label": name, "seed": SEED}, {})
    watched = replace(method, send=send, merge=merge)
    rows: list[Tensor] = []

    def observer(event: str, facts: Mapping[str, object]) -> None:
        if event == "round":  # what is durable now is what the round left behind
            state = method.init(common_start(house, SEED, len(house) if method.personal else 1), Clock(0))
            ledger = Ledger(state, torch.zeros(len(house), dtype=torch.float64))
            restore(folder, ledger)
            rows.append(ledger.state.adapters.rows[torch.arange(len(ledger.state.adapters))])

    start = score_start(house, observer)
    serve = run_rounds(house, watched, schedule, folder, seed=SEED, start=start, observer=observer).serve
    return Ran(house, folder, serve, rows, sent, returned)


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
    personal = len(ran.ledgers[0]) > 1
    for number, ids in enumerate(SCHEDULE):
        record = ran.records[number]
        for place, k in enumerate(ids):
            stored = ran.ledgers[number][k if personal else 0]
            for row, key in ((ran.returned[number][place], "loss_before"), (stored, "loss_after")):
                ranks, scale = torch.tensor(RANKS[k : k + 1]), torch.tensor([3 / RANKS[k]])
                own = Adapters(ran.federation.layout, row[None].clone(), ranks, scale).mask_()
                expected = measure_loss(
                    base(),
                    lambda ids, own=own: own,
                    ran.federation.clients[k : k + 1],
                    [0],
                    split="validation",
                    cohort=1,
                )
                assert record[key][place] == pytest.approx(expected[0], rel=1e-5), (number, k, key)


def test_a_client_that_comes_back_is_sent_the_row_that_the_last_merge_left_it(personal: Ran) -> None:
    assert torch.equal(personal.sent[1][0], personal.ledgers[0][1])
    assert torch.equal(personal.sent[2][0], personal.ledgers[1][0])
    assert torch.equal(personal.sent[2][1], personal.ledgers[1][1])


def test_the_laplacian_step_reaches_a_client_that_comes_back(mira: Ran) -> None:
    for place, k in enumerate(SCHEDULE[0]):
        assert not torch.equal(mira.ledgers[0][k], mira.returned[0][place])
    assert torch.equal(mira.sent[1][0], mira.ledgers[0][1])
    assert not torch.equal(mira.sent[1][0], mira.returned[0][1])


def test_a_first_time_client_starts_from_the_common_start_whoever_trained_before(personal: Ran) -> None:
    start = common_start(personal.federation, SEED, 4).rows[torch.arange(4)]
    assert torch.equal(personal.sent[0], start[[0, 1]])
    assert torch.equal(personal.sent[1][1], start[2])


def test_silent_clients_keep_their_row(personal: Ran) -> None:
    start = common_start(personal.federation, SEED, 4).rows[torch.arange(4)]
    assert torch.equal(personal.ledgers[0][[2, 3]], start[[2, 3]])
    assert torch.equal(personal.ledgers[1][[0, 3]], personal.ledgers[0][[0, 3]])
    assert torch.equal(personal.rows[2], personal.ledgers[1][2])
    assert torch.equal(personal.rows[3], start[3])


def test_neither_training_nor_merging_fills_what_is_beyond_a_clients_rank(ran: Ran) -> None:
    own = ran.federation.layout.rank_mask(ran.federation.ranks)
    for number, ids in enumerate(SCHEDULE):
        assert not ran.returned[number][~own[list(ids)]].any()
    if len(ran.ledgers[0]) > 1:
        assert all(not rows[~own].any() for rows in ran.ledgers)
        assert not ran.rows[~own].any()


def test_a_merge_that_fills_padded_ranks_is_masked_by_the_engine(tmp_path: Path) -> None:
    def fill(method: Method) -> Method:
        def merge(state: State, ids: Tensor, returned: Message, weights: Tensor, clock: Clock) -> Change:
            return Change(ids, returned.rows + 0.01)

        return replace(method, merge=merge)

    found = play("local", tmp_path / "run", change=fill)
    own = found.federation.layout.rank_mask(found.federation.ranks)
    assert all(not rows[1][~own[1]].any() for rows in found.ledgers)
    assert not torch.equal(found.ledgers[0][1], found.returned[0][1])


def test_an_upload_that_is_not_finite_is_silence_and_the_others_go_on(tmp_path: Path) -> None:
    def spoil(method: Method) -> Method:
        def finish(adapters: Adapters, memory: Any, given: Message, tools: Any) -> Any:
            rows = adapters.rows.clone()
            if tools.clock.round == 1:
                rows[0] = float("nan")  # the first in the stack has the most steps: client 0
            return Message(rows), memory

        return replace(method, finish=finish)

    found = play("local", tmp_path / "run", change=spoil)
    start = common_start(found.federation, SEED, 4).rows[torch.arange(4)]
    assert found.records[0]["refused"] == {"c0": "not_finite"}
    assert found.records[0]["answered"] == ["c1"]
    assert found.records[0]["loss_before"][0] is None
    assert torch.equal(found.ledgers[0][0], start[0])
    assert not torch.equal(found.ledgers[0][1], start[1])


@pytest.mark.parametrize("name", ["local", "fedavg"])
def test_a_first_round_in_which_every_upload_is_refused_changes_nothing(tmp_path: Path, name: str) -> None:
    def spoil(method: Method) -> Method:
        def finish(adapters: Adapters, memory: Any, given: Message, tools: Any) -> Any:
            return Message(adapters.rows * (float("nan") if tools.clock.round == 1 else 1)), memory

        return replace(method, finish=finish)

    found = play(name, tmp_path / "run", change=spoil)
    assert found.records[0]["answered"] == []
    assert torch.equal(found.sent[1][0], found.sent[0][1])  # client 1 again, from where it was
    assert len(found.records) == 3


def test_what_is_served_in_the_end_is_what_the_last_checkpoint_holds(ran: Ran) -> None:
    last = ran.ledgers[-1]
    own = ran.federation.layout.rank_mask(torch.tensor(RANKS))
    assert torch.equal(ran.rows, (last if len(last) > 1 else last.expand(4, -1)) * own)


def test_clients_in_smaller_passes_end_close_to_where_they_end_in_one(tmp_path: Path, mira: Ran) -> None:
    found = play("mira", tmp_path / "run", of=federation(cohort=1))
    torch.testing.assert_close(found.rows, mira.rows, rtol=1e-3, atol=1e-4)


def test_a_run_repeats_its_bits(tmp_path: Path, ran: Ran) -> None:
    name = ran.folder.facts["label"]
    assert torch.equal(play(name, tmp_path / "run").rows, ran.rows)


def test_an_absent_client_with_other_data_changes_nothing_for_the_others(tmp_path: Path, mira: Ran) -> None:
    clients = [tiny.client(f"c{k}", train=count, seed=int(k == 3)) for k, count in enumerate(TRAIN)]
    assert clients[3].train != mira.federation.clients[3].train
    assert torch.equal(play("mira", tmp_path / "run", of=federation(clients=clients)).rows, mira.rows)


@pytest.mark.parametrize("keep", [False, True])
def test_kept_moments_belong_to_their_client_and_go_on_when_it_comes_back(tmp_path: Path, keep: bool) -> None:
    """Client 1 takes 1 step in each of three rounds, client 0 takes 3 steps in two, client 2 takes 2 in one."""
    seen: list[list[int]] = []

    def watch(method: Method) -> Method:
        def finish(adapters: Adapters, memory: Any, given: Message, tools: Any) -> Any:
            seen.append(sorted(memory["steps"].tolist()))
            return method.finish(adapters, memory, given, tools)

        return replace(method, finish=finish)

    play("local", tmp_path / "run", of=federation(keep_optimizer=keep), change=watch)
    assert seen == ([[1, 3], [2, 2], [3, 6]] if keep else [[1, 3], [1, 2], [1, 3]])
