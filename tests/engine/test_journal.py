"""What a round changed is durable, and the ledger put together again from disk is the one that wrote it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.adapters import Layout, lora_layout, start_adapters
from fedmira.disk.checkpoints import checkpoint_rounds, load_chain
from fedmira.disk.folders import RunFolder
from fedmira.disk.table import Rows
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.errors import StoreError
from fedmira.methods.base import Change, State

CLIENTS = 6
EVERYONE = torch.arange(CLIENTS)
LAYOUT: Layout = lora_layout([("q_proj", 4, 4)], 2)


def fresh() -> Ledger:
    """A ledger at the common start, which the seed gives back."""
    start = start_adapters(LAYOUT, torch.full((CLIENTS,), 2), 4.0, torch.Generator().manual_seed(0))
    rows: Any = Rows(start.rows[:1], torch.zeros(CLIENTS, dtype=torch.int64))
    state = State(start.with_rows(rows), {"mean": torch.zeros(2)})
    return Ledger(state, torch.full((CLIENTS,), torch.nan, dtype=torch.float64))


def play(folder: RunFolder, ledger: Ledger, ids: list[int], *, memory: bool = True) -> None:
    """One round: the clients of `ids` get rows, moments and losses that tell who and when."""
    number = ledger.round + 1
    chosen = torch.tensor(ids, dtype=torch.int64)
    rows = torch.full((len(ids), LAYOUT.size), float(number)) + chosen[:, None] / 100
    change = Change(chosen, rows, {"mean": torch.full((2,), float(number))})
    if memory:
        ledger.remember(chosen, {"moment": rows * 2, "steps": torch.full((len(ids),), number)}, CLIENTS)
    ledger.apply(change)
    ledger.validation[chosen] = number / 10
    ledger.round = number
    commit(folder, ledger, change, chosen)


def assert_same(one: Ledger, other: Ledger) -> None:
    assert one.round == other.round
    assert torch.equal(one.state.adapters.rows[EVERYONE], other.state.adapters.rows[EVERYONE])
    assert torch.equal(one.state.shared["mean"], other.state.shared["mean"])
    assert torch.equal(one.validation.nan_to_num(-1), other.validation.nan_to_num(-1))
    assert one.memory.keys() == other.memory.keys()
    for name, value in one.memory.items():
        assert torch.equal(value[EVERYONE], other.memory[name][EVERYONE])
        assert value.dtype == other.memory[name].dtype
    assert one.touched == other.touched
    assert (one.last_full, one.delta_bytes) == (other.last_full, other.delta_bytes)


def restored(folder: RunFolder) -> Ledger:
    ledger = fresh()
    restore(folder, ledger)
    return ledger


def damage(folder: RunFolder, number: int) -> None:
    path = folder.checkpoints / f"round-{number:06d}" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_nothing_on_disk_leaves_the_ledger_at_the_start(tmp_path: Path) -> None:
    assert_same(restored(RunFolder(tmp_path)), fresh())


@settings(max_examples=20, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, CLIENTS - 1), max_size=CLIENTS).map(sorted), min_size=1, max_size=9),
    memory=st.booleans(),
)
def test_after_any_rounds_the_ledger_on_disk_is_the_one_in_memory(
    rounds: list[list[int]], memory: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, ledger = RunFolder(tmp_path_factory.mktemp("run")), fresh()
    for ids in rounds:
        play(folder, ledger, ids, memory=memory)
        assert_same(restored(folder), ledger)


@settings(max_examples=12, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, CLIENTS - 1), min_size=1).map(sorted), min_size=2, max_size=9),
    data=st.data(),
)
def test_from_the_second_round_on_there_is_always_an_older_round_to_go_back_to(
    rounds: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, ledger = RunFolder(tmp_path_factory.mktemp("run")), fresh()
    for ids in rounds:
        play(folder, ledger, ids)
    damaged = data.draw(st.sampled_from(checkpoint_rounds(folder.checkpoints)))
    damage(folder, damaged)
    found = restored(folder)
    assert found.round in (len(rounds), damaged - 1)  # untouched where an intact full one is newer
    expected, other = fresh(), RunFolder(tmp_path_factory.mktemp("shorter"))
    for ids in rounds[: found.round]:
        play(other, expected, ids)
    assert torch.equal(found.state.adapters.rows[EVERYONE], expected.state.adapters.rows[EVERYONE])
    assert torch.equal(found.memory["moment"][EVERYONE], expected.memory["moment"][EVERYONE])


def test_a_full_checkpoint_leaves_the_one_before_it_usable(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    for ids in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]):  # everyone: every checkpoint is full
        play(folder, ledger, ids)
        assert ledger.last_full == ledger.round
    damage(folder, 3)
    assert restored(folder).round == 2


def test_few_clients_of_many_make_a_delta_and_enough_deltas_a_full_one(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [0, 1, 2, 3, 4, 5])
    fulls = []
    for _ in range(8):
        play(folder, ledger, [2])
        fulls.append(ledger.last_full)
    assert fulls == [2, 2, 2, 2, 2, 2, 8, 8]  # the sixth delta would make the deltas as large as the whole


def test_old_checkpoints_are_removed_once_two_full_ones_are_there(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    for _ in range(5):
        play(folder, ledger, [0, 1, 2, 3, 4, 5])
    assert checkpoint_rounds(folder.checkpoints) == [4, 5]


def test_a_first_round_in_which_every_upload_was_refused_is_durable_too(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [], memory=False)
    assert_same(restored(folder), ledger)
    assert restored(folder).round == 1


def test_a_delta_holds_the_losses_that_changed_and_a_full_checkpoint_all(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [0, 1, 2, 3, 4])
    play(folder, ledger, [0, 1, 2, 3, 4])
    play(folder, ledger, [3, 1])
    ledger.validation[4] = torch.nan  # a loss that is no longer known is a change; client 5's was never known
    play(folder, ledger, [2])
    full, *deltas = (checkpoint.files["engine"] for checkpoint in load_chain(folder.checkpoints))
    assert full["validation"].tolist() == pytest.approx([0.2] * 5 + [torch.nan], nan_ok=True)
    assert [delta["ids"].tolist() for delta in deltas] == [[1, 3], [2, 4]]
    assert_same(restored(folder), ledger)


def test_clients_that_were_never_sampled_are_not_stored(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [1, 4], memory=False)
    size = (folder.checkpoints / "round-000001" / "state.safetensors").stat().st_size
    assert 2 * LAYOUT.size * 4 < size < 3 * LAYOUT.size * 4 + 400


def test_going_back_over_a_damaged_round_removes_what_came_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [0, 1, 2, 3, 4, 5])
    for ids in ([0], [1], [2]):
        play(folder, ledger, ids)
    damage(folder, 3)
    found = restored(folder)
    assert found.round == 2
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    assert checkpoint_rounds(folder.checkpoints) == [1, 2]  # else round 4 would follow the new round 3 unseen
    play(folder, found, [1])
    assert restored(folder).round == 3


def test_checkpoints_that_are_all_damaged_are_never_taken_for_a_fresh_start(tmp_path: Path) -> None:
    folder, ledger = RunFolder(tmp_path), fresh()
    play(folder, ledger, [0])
    damage(folder, 1)
    with pytest.raises(StoreError, match="no intact checkpoint"):
        restored(folder)


def test_what_is_recalled_is_a_copy() -> None:
    ledger = fresh()
    ledger.remember(torch.tensor([1]), {"moment": torch.ones(1, 3)}, CLIENTS)
    ledger.recall(torch.tensor([1]))["moment"].zero_()
    assert ledger.recall(torch.tensor([1]))["moment"].sum() == 3


def test_only_the_names_asked_for_are_recalled() -> None:
    ledger = fresh()
    ledger.remember(torch.tensor([1]), {"moment": torch.ones(1, 3), "own": torch.ones(1, 2)}, CLIENTS)
    assert list(ledger.recall(torch.tensor([1]), ["own"])) == ["own"]
