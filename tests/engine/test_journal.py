"""What a round changed is durable, and the ledger put together again from disk is the one that wrote it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmira.adapters import Layout, lora_layout
from fedmira.disk.checkpoints import checkpoint_rounds, load_chain
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.memory import ClientMemory, Staged
from fedmira.errors import StoreError
from fedmira.methods import build
from fedmira.methods.base import Change, Cohort, State

CLIENTS = 6
EVERYONE = torch.arange(CLIENTS)
LAYOUT: Layout = lora_layout([("q_proj", 4, 4)], 2)


@dataclass(eq=False)
class House:
    """The server's side of a run and its clients': as much of both as checkpoints hold."""

    ledger: Ledger
    memory: ClientMemory

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.memory.restore(files)


def fresh() -> House:
    """At the common start, which the seed gives back."""
    names = tuple(f"c{k}" for k in range(CLIENTS))
    federation = Federation(names, LAYOUT, torch.full((CLIENTS,), 2), 4.0)
    stored = federation.start(0, build("local", {}, Cohort(names, (1,) * CLIENTS, ({},) * CLIENTS, (), 0)))
    state = State(stored, {"mean": torch.zeros(2)})
    ledger = Ledger(federation, state, torch.full((CLIENTS,), torch.nan, dtype=torch.float64))
    return House(ledger, ClientMemory(CLIENTS))


def decide(house: House, ids: list[int], *, memory: bool = True) -> tuple[Change, Staged]:
    """One round, not yet durable: the clients of `ids` get rows and moments that tell who and when."""
    number = house.ledger.round + 1
    chosen = torch.tensor(ids, dtype=torch.int64)
    rows = torch.full((len(ids), LAYOUT.size), float(number)) + chosen[:, None] / 100
    kept = {"moments/main/moment": rows * 2, "moments/main/steps": torch.full((len(ids),), number)} if memory else {}
    return Change(chosen, rows, {"mean": torch.full((2,), float(number))}), house.memory.stage(chosen, kept)


def play(folder: Path, house: House, ids: list[int], *, memory: bool = True) -> None:
    """One round: durable, then applied, then measured."""
    ledger = house.ledger
    change, kept = decide(house, ids, memory=memory)
    commit(folder, ledger, change, kept, {"round": ledger.round + 1, "clients": ids})
    kept.apply()
    ledger.apply(change)
    ledger.round += 1
    ledger.validation[change.ids] = ledger.round / 10


def assert_same(found: House, house: House) -> None:
    """What was restored is what was made durable; losses are those measured before the newest round."""
    one, other = found.ledger, house.ledger
    assert one.round == other.round
    assert torch.equal(one.table[EVERYONE], other.table[EVERYONE])
    assert torch.equal(one.table.written, other.table.written)
    assert torch.equal(one.state.shared["mean"], other.state.shared["mean"])
    assert torch.equal(one.validation.nan_to_num(-1), other.saved.nan_to_num(-1))
    assert torch.equal(one.saved.nan_to_num(-1), other.saved.nan_to_num(-1))
    assert (one.last_full, one.delta_bytes) == (other.last_full, other.delta_bytes)
    assert found.memory.tables.keys() == house.memory.tables.keys()
    for name, value in found.memory.tables.items():
        assert torch.equal(value[EVERYONE], house.memory.tables[name][EVERYONE])
        assert value.dtype == house.memory.tables[name].dtype
    assert found.memory.remembered == house.memory.remembered


def restored(folder: Path) -> House:
    house: Any = fresh()
    facts = restore(folder, house.ledger, house)
    assert facts.get("round", 0) == house.ledger.round  # of the newest round
    found: House = house
    return found


def damage(folder: Path, number: int) -> None:
    path = folder / f"round-{number:06d}" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_nothing_on_disk_leaves_the_ledger_at_the_start(tmp_path: Path) -> None:
    assert_same(restored(tmp_path), fresh())


@settings(max_examples=20, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, CLIENTS - 1), max_size=CLIENTS).map(sorted), min_size=1, max_size=9),
    memory=st.booleans(),
)
def test_after_any_rounds_the_ledger_on_disk_is_the_one_in_memory(
    rounds: list[list[int]], memory: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, house = tmp_path_factory.mktemp("run"), fresh()
    for ids in rounds:
        play(folder, house, ids, memory=memory)
        assert_same(restored(folder), house)


@settings(max_examples=12, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, CLIENTS - 1), min_size=1).map(sorted), min_size=2, max_size=9),
    data=st.data(),
)
def test_from_the_second_round_on_there_is_always_an_older_round_to_go_back_to(
    rounds: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, house = tmp_path_factory.mktemp("run"), fresh()
    for ids in rounds:
        play(folder, house, ids)
    damaged = data.draw(st.sampled_from(checkpoint_rounds(folder)))
    damage(folder, damaged)
    found = restored(folder)
    assert found.ledger.round in (len(rounds), damaged - 1)  # untouched where an intact full one is newer
    expected, other = fresh(), tmp_path_factory.mktemp("shorter")
    for ids in rounds[: found.ledger.round]:
        play(other, expected, ids)
    assert torch.equal(found.ledger.table[EVERYONE], expected.ledger.table[EVERYONE])
    moment = "moments/main/moment"
    assert torch.equal(found.memory.tables[moment][EVERYONE], expected.memory.tables[moment][EVERYONE])


def test_a_full_checkpoint_leaves_the_one_before_it_usable(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    for ids in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):  # everyone: every checkpoint is full
        play(folder, house, ids)
        assert house.ledger.last_full == house.ledger.round
    damage(folder, 3)
    assert restored(folder).ledger.round == 2


def test_few_clients_of_many_make_a_delta_and_enough_deltas_a_full_one(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    play(folder, house, [0, 1, 2, 3, 4, 5])
    fulls = []
    for _ in range(8):
        play(folder, house, [2])
        fulls.append(house.ledger.last_full)
    assert fulls == [2, 2, 2, 2, 2, 2, 8, 8]  # the sixth delta would make the deltas as large as the whole


def test_old_checkpoints_are_removed_once_two_full_ones_are_there(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    for _ in range(5):
        play(folder, house, [0, 1, 2, 3, 4, 5])
    assert checkpoint_rounds(folder) == [4, 5]


def test_a_first_round_in_which_every_upload_was_refused_is_durable_too(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    play(folder, house, [], memory=False)
    assert_same(restored(folder), house)
    assert restored(folder).ledger.round == 1


def test_a_delta_holds_the_losses_that_changed_and_a_full_checkpoint_all(tmp_path: Path) -> None:
    """A round is durable before it is measured: a checkpoint has the losses measured after the round before it."""
    folder, house = tmp_path, fresh()
    play(folder, house, [0, 1, 2, 3, 4])
    play(folder, house, [0, 1, 2, 3, 4])
    play(folder, house, [3, 1])
    house.ledger.validation[4] = torch.nan  # a loss that is no longer known is a change; client 5's was never known
    play(folder, house, [2])
    full, *deltas = (checkpoint.files["engine"] for checkpoint in load_chain(folder))
    assert full["validation"].tolist() == pytest.approx([0.1] * 5 + [torch.nan], nan_ok=True)
    assert [delta["ids"].tolist() for delta in deltas] == [[0, 1, 2, 3, 4], [1, 3, 4]]
    assert deltas[1]["validation"].tolist() == pytest.approx([0.3, 0.3, torch.nan], nan_ok=True)
    assert_same(restored(folder), house)


def test_clients_that_were_never_sampled_are_not_stored(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    play(folder, house, [1, 4], memory=False)
    size = (folder / "round-000001" / "state.safetensors").stat().st_size
    assert 2 * LAYOUT.size * 4 < size < 3 * LAYOUT.size * 4 + 400


def test_going_back_over_a_damaged_round_removes_what_came_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, house = tmp_path, fresh()
    play(folder, house, [0, 1, 2, 3, 4, 5])
    for ids in ([0], [1], [2]):
        play(folder, house, ids)
    damage(folder, 3)
    found = restored(folder)
    assert found.ledger.round == 2
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    assert checkpoint_rounds(folder) == [1, 2]  # else round 4 would follow the new round 3 unseen
    play(folder, found, [1])
    assert restored(folder).ledger.round == 3


def test_checkpoints_that_are_all_damaged_are_never_taken_for_a_fresh_start(tmp_path: Path) -> None:
    folder, house = tmp_path, fresh()
    play(folder, house, [0])
    damage(folder, 1)
    with pytest.raises(StoreError, match="no intact checkpoint"):
        restored(folder)


def test_the_bytes_of_deltas_include_what_methods_keep_of_each_client(tmp_path: Path) -> None:
    """Two clients: a row, three float32 and an int64 of each; the same whether counted on writing or on reading."""

    def with_tables() -> House:
        house = fresh()
        tables = {"sketch": torch.zeros(CLIENTS, 3), "seen": torch.zeros(CLIENTS, dtype=torch.int64)}
        house.ledger.state = replace(house.ledger.state, tables=tables)
        return house

    house, each = with_tables(), 4 * LAYOUT.size + 3 * 4 + 8
    for ids in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 4]):
        change, kept = decide(house, ids, memory=False)
        values = {"sketch": torch.ones(len(ids), 3), "seen": torch.ones(len(ids), dtype=torch.int64)}
        change = replace(change, tables=values)
        commit(tmp_path, house.ledger, change, kept)
        house.ledger.apply(change)
        house.ledger.round += 1
    assert house.ledger.delta_bytes == 2 * each
    found: Any = with_tables()
    restore(tmp_path, found.ledger, found)
    assert found.ledger.delta_bytes == 2 * each
    assert found.ledger.state.tables["sketch"].sum() == 6 * 3


# ---------------------------------------------------------------- durable before it is applied


def test_a_round_is_durable_before_anything_of_it_is_applied(tmp_path: Path) -> None:
    """Full and delta: what the checkpoint holds is not yet so in memory."""
    house = fresh()
    for ids in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 5]):
        rows, written = house.ledger.table[EVERYONE].clone(), house.ledger.table.written.clone()
        shared, remembered = house.ledger.state.shared["mean"].clone(), set(house.memory.remembered)
        kept_before = {name: value[EVERYONE].clone() for name, value in house.memory.tables.items()}
        change, kept = decide(house, ids)
        commit(tmp_path, house.ledger, change, kept)
        assert house.ledger.round == load_chain(tmp_path)[-1].round - 1
        assert torch.equal(house.ledger.table[EVERYONE], rows)
        assert torch.equal(house.ledger.table.written, written)
        assert torch.equal(house.ledger.state.shared["mean"], shared)
        assert house.memory.remembered == remembered
        for name, value in kept_before.items():
            assert torch.equal(house.memory.tables[name][EVERYONE], value)
        found: Any = fresh()
        restore(tmp_path, found.ledger, found)
        kept.apply()
        house.ledger.apply(change)
        house.ledger.round += 1
        assert_same(found, house)


def test_what_will_be_reads_as_it_is_once_it_is_applied() -> None:
    house = fresh()
    state = replace(house.ledger.state, tables={"seen": torch.zeros(CLIENTS, 2)})
    ledger = Ledger(house.ledger.federation, state, house.ledger.validation)
    ids = torch.tensor([4, 1])
    change = Change(ids, torch.ones(2, LAYOUT.size), {"mean": torch.ones(2)}, {"seen": torch.full((2, 2), 7.0)})
    ahead = ledger.after(change)
    before = ledger.table[EVERYONE].clone()
    assert not ledger.state.tables["seen"].any()
    found = ahead.adapters.rows[EVERYONE]
    assert torch.equal(ledger.table[EVERYONE], before)
    ledger.apply(change)
    assert torch.equal(ledger.table[EVERYONE], found)
    assert torch.equal(ledger.state.tables["seen"], ahead.tables["seen"])
    assert torch.equal(ledger.state.shared["mean"], ahead.shared["mean"])
    assert torch.equal(found[ids], change.rows)


def test_where_clients_keep_their_own_a_checkpoint_has_the_servers_side_alone(tmp_path: Path) -> None:
    house = fresh()
    change, _ = decide(house, [1, 2], memory=False)
    commit(tmp_path, house.ledger, change, None)
    (found,) = load_chain(tmp_path)
    assert found.files.keys() == {"state", "engine"}


# ---------------------------------------------------------------- what clients keep


def test_what_is_recalled_is_a_copy() -> None:
    memory, one = ClientMemory(CLIENTS), torch.tensor([1])
    memory.stage(one, {"method/own": torch.ones(1, 3)}).apply()
    memory.recall("method", one)["own"].zero_()
    assert memory.recall("method", one)["own"].sum() == 3


def test_only_the_names_of_an_owner_are_recalled() -> None:
    """A method may call its memory what an optimizer calls its moments."""
    memory, one = ClientMemory(CLIENTS), torch.tensor([1])
    values = {"method/steps": torch.ones(1, 3), "moments/main/steps": torch.ones(1), "moments/own/steps": 2 + one}
    memory.stage(one, values).apply()
    assert torch.equal(memory.recall("method", one)["steps"], torch.ones(1, 3))
    assert memory.recall("moments/main", one)["steps"].tolist() == [1]
    assert memory.recall("moments/own", one)["steps"].tolist() == [3]
    assert memory.recall("nobody", one) == {}


def test_who_never_trained_has_what_is_first() -> None:
    memory, both = ClientMemory(CLIENTS), torch.tensor([1, 2])
    first = {"own": torch.full((2, 3), 5.0)}
    assert torch.equal(memory.recall("method", both, first=first)["own"], first["own"])
    memory.stage(both[:1], {"method/own": torch.ones(1, 3)}).apply()
    found = memory.recall("method", both, first=first)["own"]
    assert found[:, 0].tolist() == [1, 5]
    found.zero_()
    assert bool((first["own"] == 5).all())


def test_what_is_staged_counts_once_it_is_applied() -> None:
    memory, one = ClientMemory(CLIENTS), torch.tensor([1])
    staged = memory.stage(one, {"method/own": torch.ones(1, 3)})
    assert not memory.recall("method", one)["own"].any()
    assert memory.remembered == set()
    assert (staged.bytes_of_all, staged.bytes_of_round) == (12, 12)
    staged.apply()
    assert memory.remembered == {1}
    later = memory.stage(torch.tensor([1, 4]), {"method/own": torch.full((2, 3), 2.0)})
    assert (later.bytes_of_all, later.bytes_of_round) == (24, 24)
    assert memory.stage(torch.tensor([4]), {"method/own": torch.ones(1, 3)}).bytes_of_all == 24
    whole = later.files(full=True)["memory"]
    assert torch.as_tensor(whole["ids"]).tolist() == [1, 4]
    rows: Any = whole["method/own"]
    assert torch.cat(list(rows.blocks()))[:, 0].tolist() == [2, 2]
    assert memory.recall("method", one)["own"][0, 0] == 1


def test_clients_that_keep_nothing_need_no_file() -> None:
    staged = ClientMemory(CLIENTS).stage(torch.tensor([1]), {})
    assert staged.files(full=True) == staged.files(full=False) == {}
    staged.apply()
    assert staged.memory.remembered == set()
