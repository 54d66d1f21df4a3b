"""Durable files: the old one or the new one, never half of one; and the way back from a damaged checkpoint."""

import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmira.disk import checkpoints, table
from fedmira.disk.checkpoints import checkpoint_rounds, load_chain, prune, save_checkpoint
from fedmira.disk.files import append_lines, read_json, write_atomic, write_json
from fedmira.disk.table import Overlay, Picked, Table, stacked
from fedmira.errors import ShapeError, StoreError

FULL, DELTA = True, False


def save(folder: Path, number: int, *, full: bool) -> None:
    files = {"state": {"rows": torch.full((3, 4), float(number))}, "engine": {"validation": torch.arange(3.0)}}
    save_checkpoint(folder, number, files, full=full)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Rounds 1 (full), 2, 3 (full), 4, 5."""
    for number, full in ((1, FULL), (2, DELTA), (3, FULL), (4, DELTA), (5, DELTA)):
        save(tmp_path, number, full=full)
    return tmp_path


def rounds(folder: Path) -> list[int]:
    return [checkpoint.round for checkpoint in load_chain(folder)]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# ---------------------------------------------------------------- atomic writes


def fail(code: int) -> Callable[..., Any]:
    def raise_error(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return raise_error


class FullDisk:
    """A file of which only the first `room` bytes reach the disk."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: self.room])
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    opened = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *rest, **more: FullDisk(opened(*rest, **more), room))


def assert_old_or_new(folder: Path, old: bytes | None, new: bytes) -> None:
    """Nothing but the file is there, and it is whole."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found in ([{"a.json": new}] + ([{}] if old is None else [{"a.json": old}]))


def test_a_file_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", b"new")
    assert_old_or_new(tmp_path, None, b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("room", range(6))
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_disk_that_fills_at_any_byte_leaves_the_old_file(
    room: int, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old is not None:
        (tmp_path / "a.json").write_bytes(old)
    with monkeypatch.context() as patch:
        fill_disk(patch, room)
        with pytest.raises(StoreError):
            write_atomic(tmp_path / "a.json", b"longer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({} if old is None else {"a.json": old})


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_error_at_any_step_leaves_the_old_file_or_the_new_one(
    step: str, code: int, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old is not None:
        (tmp_path / "a.json").write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail(code))
        with pytest.raises(StoreError):
            write_atomic(tmp_path / "a.json", b"new")
    assert_old_or_new(tmp_path, old, b"new")


def test_a_full_disk_is_reported_with_path_bytes_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, 0)
    with pytest.raises(StoreError, match=r"cannot write '.*a.json' \(7 bytes\): No space left.*fedmira resume"):
        write_atomic(tmp_path / "a.json", b"7 bytes")


def test_a_disk_that_even_refuses_to_clean_up_is_still_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    monkeypatch.setattr(os, "unlink", fail(errno.EROFS))
    with pytest.raises(StoreError, match="cannot write"):
        write_atomic(tmp_path / "a.json", b"new")


def test_the_file_is_synced_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def noted_rename(old: Any, new: Any) -> None:
        order.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    write_atomic(tmp_path / "a.json", b"new")
    assert order == ["file", "rename", "folder"]


def test_appended_lines_end_each_in_one_line_break(tmp_path: Path) -> None:
    append_lines(tmp_path / "a.csv", ["x", "é"])
    append_lines(tmp_path / "a.csv", ["y"])
    assert (tmp_path / "a.csv").read_bytes() == "x\né\ny\n".encode()


def test_a_full_disk_while_appending_is_reported_with_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, 1)
    with pytest.raises(StoreError, match=r"cannot append to '.*a.csv' \(4 bytes\): No space left"):
        append_lines(tmp_path / "a.csv", ["abc"])


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 0.1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, 0.1, None]}


def test_json_that_is_missing_or_damaged_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"a": 1')
    with pytest.raises(StoreError, match="is damaged"):
        read_json(tmp_path / "a.json")


# ---------------------------------------------------------------- rows of all clients


START = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
KINDS = torch.tensor([0, 1, 1, 0])
ALL = torch.arange(4)


@pytest.fixture(params=["memory", "file"])
def client_rows(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    found = Table(START, KINDS, tmp_path if request.param == "file" else None)
    assert found.mapped == (request.param == "file")
    return found


def test_a_row_that_was_never_written_reads_as_its_own_start(client_rows: Table) -> None:
    assert torch.equal(client_rows[torch.tensor([3, 1, 1])], START[[0, 1, 1]])
    client_rows.write(torch.tensor([1]), torch.tensor([[7.0, 8.0, 9.0]]))
    assert client_rows[ALL].tolist() == [[1, 2, 3], [7, 8, 9], [4, 5, 6], [1, 2, 3]]


def test_rows_come_back_in_the_order_they_are_asked_for(client_rows: Table) -> None:
    values = torch.arange(12.0).view(4, 3)
    client_rows.write(torch.tensor([2, 0, 3, 1]), values)
    assert torch.equal(client_rows[torch.tensor([2, 0, 3, 1])], values)
    assert torch.equal(client_rows[torch.tensor([0, 0, 1], dtype=torch.int32)], values[[1, 1, 3]])


def test_what_is_read_is_a_copy(client_rows: Table) -> None:
    for k in (torch.tensor([0]), torch.tensor([1])):
        client_rows.write(torch.tensor([1]), torch.full((1, 3), 7.0))
        before = client_rows[ALL]
        client_rows[k].zero_()
        client_rows.numpy()[k.numpy(), 0:2][:] = 0
        assert torch.equal(client_rows[ALL], before)


def test_columns_are_those_of_the_rows(client_rows: Table) -> None:
    client_rows.write(torch.tensor([1]), torch.tensor([[7.0, 8.0, 9.0]]))
    for ids in ([2, 1, 0], [1, 1], [3]):
        expected = client_rows[torch.tensor(ids)][:, 1:3].numpy()
        assert np.array_equal(client_rows.numpy()[np.array(ids), 1:3], expected)


@pytest.mark.parametrize("ids", [0, [0, 1], slice(None), torch.tensor(0), torch.tensor([True] * 4)])
def test_all_rows_are_never_read_at_once(ids: Any, client_rows: Table) -> None:
    with pytest.raises(ShapeError, match=r"take rows\[ids\]"):
        client_rows[ids]
    with pytest.raises(AttributeError, match=r"no 'sum'.*take rows\[ids\]"):
        client_rows.sum(dim=0)


@pytest.mark.parametrize("block_bytes", [1, 24, 1 << 20])
def test_the_mean_is_over_all_rows_whether_written_or_not(
    block_bytes: int, client_rows: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1 + 7 + 4 + 1) / 4, (2 + 8 + 5 + 2) / 4, (3 + 9 + 6 + 3) / 4, a block at a time."""
    monkeypatch.setattr(table, "BLOCK_BYTES", block_bytes)
    client_rows.write(torch.tensor([1]), torch.tensor([[7.0, 8.0, 9.0]]))
    found = client_rows.mean()
    assert found.tolist() == [[3.25, 4.25, 5.25]]
    assert found.dtype == client_rows.dtype


def test_a_mean_is_added_up_with_more_digits_than_rows_have() -> None:
    """2^24 + 1 + 1 + ... in float32 stays where it is."""
    found = Table(torch.tensor([[2.0**24], [1.0], [0.0]]), torch.tensor([0] + [1] * 1024 + [2] * 1023))
    assert found.mean().item() == (2**24 + 1024) / 2048


# ---------------------------------------------------------------- rows as they will be


@pytest.fixture(params=["table", "tensor"])
def changed(request: pytest.FixtureRequest, client_rows: Table) -> Overlay:
    """Rows [1, 2, 3], [7, 8, 9], [4, 5, 6], [1, 2, 3], of which 3 and 1 are to be replaced."""
    client_rows.write(torch.tensor([1]), torch.tensor([[7.0, 8.0, 9.0]]))
    source = client_rows if request.param == "table" else client_rows[ALL]
    return Overlay(source, torch.tensor([3, 1]), torch.tensor([[30.0, 31.0, 32.0], [10.0, 11.0, 12.0]]))


REPLACED = [[1, 2, 3], [10, 11, 12], [4, 5, 6], [30, 31, 32]]


def test_rows_to_be_replaced_read_as_they_will_be_and_the_others_as_they_are(changed: Overlay) -> None:
    assert changed[ALL].tolist() == REPLACED
    for ids in ([3], [0, 2], [1, 3, 1, 0], []):
        assert changed[torch.tensor(ids, dtype=torch.int64)].tolist() == [REPLACED[k] for k in ids]
    assert (len(changed), changed.shape, changed.dtype) == (4, torch.Size((4, 3)), torch.float32)


def test_reading_ahead_changes_nothing(changed: Overlay) -> None:
    before = changed.source[ALL].clone()
    changed[ALL].zero_()
    changed.mean().zero_()
    changed.numpy()[ALL.numpy(), 0:2][:] = 0
    assert torch.equal(changed.source[ALL], before)
    assert changed.values.tolist() == [REPLACED[3], REPLACED[1]]
    assert changed[ALL].tolist() == REPLACED


def test_means_columns_and_blocks_are_of_the_rows_as_they_will_be(changed: Overlay) -> None:
    assert changed.mean().tolist() == [[45 / 4, 49 / 4, 53 / 4]]
    ids = np.array([2, 3, 1])
    assert changed.numpy()[ids, 1:3].tolist() == [REPLACED[k][1:] for k in ids]
    assert torch.cat(list(Picked(changed, torch.tensor([3, 0])).blocks())).tolist() == [REPLACED[3], REPLACED[0]]


def test_a_table_written_over_reads_as_its_overlay_did(client_rows: Table) -> None:
    ids, values = torch.tensor([2, 0]), torch.tensor([[5.0, 5.0, 5.0], [6.0, 6.0, 6.0]])
    ahead = Overlay(client_rows, ids, values)[ALL]
    assert not client_rows.written.any()
    client_rows.write(ids, values)
    assert torch.equal(client_rows[ALL], ahead)


def test_a_file_of_rows_has_no_name_and_no_room_for_what_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "RAM_BYTES", 1 << 20)
    found = Table(torch.zeros(1, 1 << 18), torch.zeros(1000, dtype=torch.int64), tmp_path)  # 1 MB a row
    found.write(torch.tensor([500]), torch.ones(1, 1 << 18))
    assert found.mapped
    assert found[torch.tensor([500, 2])].sum(dim=1).tolist() == [1 << 18, 0]
    assert list(tmp_path.iterdir()) == []
    assert found._file is not None
    assert os.fstat(found._file.fileno()).st_blocks * 512 < 3 << 20


def test_tensors_are_joined_in_a_file_without_a_name_where_they_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [torch.arange(6.0).view(1, 6), torch.arange(12.0).view(2, 6).T.contiguous().T, torch.ones(1, 6)]
    for limit in (1 << 20, 0):
        monkeypatch.setattr(table, "BLOCK_BYTES", limit)
        assert torch.equal(stacked(values, tmp_path), torch.cat(values))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        stacked(values, tmp_path / "absent")


def test_who_needs_the_memory_has_fewer_rows_in_it(tmp_path: Path) -> None:
    found = Table(START, KINDS, tmp_path, ram_bytes=4 * 12 - 1)
    assert found.mapped
    assert torch.equal(found[ALL], START[KINDS])
    assert not Table(START, KINDS, tmp_path, ram_bytes=4 * 12).mapped


def test_few_rows_stay_in_memory(tmp_path: Path) -> None:
    assert not Table(START, KINDS, tmp_path).mapped


def test_a_disk_that_fills_under_a_file_of_rows_is_an_error_and_not_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    found = Table(START, KINDS, tmp_path)
    write, calls = os.pwrite, iter(range(100))

    def little(handle: int, data: Any, offset: int) -> int:
        return write(handle, data[:5], offset) if next(calls) < 6 else fail(errno.ENOSPC)()

    monkeypatch.setattr(os, "pwrite", little)
    found.write(torch.tensor([0]), torch.full((1, 3), 7.0))  # 12 bytes in three parts
    assert found[torch.tensor([0])].tolist() == [[7, 7, 7]]
    with pytest.raises(OSError, match="No space left"):
        found.write(torch.tensor([1, 2]), torch.full((2, 3), 7.0))
    assert torch.equal(found[torch.tensor([1, 2])], START[[1, 1]])  # what was not written whole does not count


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("block_bytes", [1, 12, 30, 1 << 20])
def test_rows_are_written_a_block_at_a_time_and_come_back_in_order(
    block_bytes: int, client_rows: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "BLOCK_BYTES", block_bytes)
    client_rows.write(torch.tensor([1, 3]), torch.tensor([[7.0, 8.0, 9.0], [1.0, 0.0, 1.0]]))
    ids = torch.tensor([3, 0, 1])
    save_checkpoint(tmp_path / "saved", 1, {"state": {"ids": ids, "rows": Picked(client_rows, ids)}}, full=True)
    (found,) = load_chain(tmp_path / "saved")
    assert torch.equal(found.files["state"]["rows"], client_rows[ids])
    assert torch.equal(found.files["state"]["ids"], ids)


@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
def test_every_kind_of_number_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = {"odd": torch.tensor([True]), "a": torch.arange(6).view(2, 3).to(dtype), "none": torch.empty(0, 3)}
    save_checkpoint(tmp_path, 1, {"state": values}, full=True)
    (found,) = load_chain(tmp_path)
    assert found.files["state"].keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(found.files["state"][name], value)
        assert found.files["state"][name].dtype == value.dtype


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    save_checkpoint(tmp_path, 7, {"state": {"rows": values.T, "ids": torch.arange(3)}}, full=True)
    (found,) = load_chain(tmp_path)
    assert torch.equal(found.files["state"]["rows"], values.T)
    assert torch.equal(found.files["state"]["ids"], torch.arange(3))
    assert (found.round, found.full) == (7, True)


def test_facts_of_a_round_come_back_as_they_were(tmp_path: Path) -> None:
    facts = {"clients": ["é", "b"], "train_loss": [0.1, None], "notes": {"groups": 2}, "unmoved": False}
    save_checkpoint(tmp_path, 1, {"state": {"rows": torch.zeros(2)}}, full=True, facts=facts)
    save_checkpoint(tmp_path, 2, {"state": {"rows": torch.zeros(2)}}, full=False)
    first, second = load_chain(tmp_path)
    assert (first.facts, second.facts) == (facts, {})


def test_a_checkpoint_of_the_schema_before_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "SCHEMA", checkpoints.SCHEMA - 1)
        save(tmp_path, 1, full=True)
    with pytest.raises(StoreError):
        load_chain(tmp_path)


def test_the_size_of_a_checkpoint_is_that_of_its_tensor_files(tmp_path: Path) -> None:
    size = save_checkpoint(tmp_path, 1, {"state": {"rows": torch.zeros(9)}}, full=True)
    assert size == (tmp_path / "round-000001" / "state.safetensors").stat().st_size


def test_without_checkpoints_there_is_no_chain(tmp_path: Path) -> None:
    assert load_chain(tmp_path) == []
    assert load_chain(tmp_path / "none") == []


def test_the_chain_is_the_newest_full_checkpoint_and_the_deltas_after_it(chain: Path) -> None:
    assert rounds(chain) == [3, 4, 5]


def test_a_delta_counts_only_where_the_round_before_it_is_there(chain: Path) -> None:
    shutil.rmtree(chain / "round-000004")
    assert rounds(chain) == [3]


def test_a_folder_without_a_manifest_does_not_count(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    (chain / "round-000005" / "manifest.json").unlink()
    assert rounds(chain) == [3, 4]
    assert caplog.records == []


def test_a_folder_that_is_not_a_checkpoint_does_not_count(chain: Path) -> None:
    shutil.copytree(chain / "round-000005", chain / "round-000005.bak")
    assert rounds(chain) == [3, 4, 5]


def test_an_unfinished_checkpoint_is_replaced_by_a_new_one(chain: Path) -> None:
    (chain / "round-000005" / "manifest.json").unlink()
    (chain / "round-000005" / "old.safetensors").write_bytes(b"old")
    save(chain, 5, full=False)
    assert rounds(chain) == [3, 4, 5]
    assert not (chain / "round-000005" / "old.safetensors").exists()


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [([5], [3, 4]), ([4], [3]), ([4, 5], [3]), ([3], [1, 2]), ([3, 5], [1, 2]), ([2, 3], [1]), ([1], [3, 4, 5])],
)
def test_a_damaged_checkpoint_resumes_from_the_round_before_it(
    damaged: list[int], expected: list[int], chain: Path
) -> None:
    for number in damaged:
        flip(chain / f"round-{number:06d}" / "state.safetensors", 700)
    assert rounds(chain) == expected


def test_going_back_is_logged(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(chain / "round-000005" / "state.safetensors", 700)
    load_chain(chain)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("round-000005' is damaged (state.safetensors does not match its sha256)" in line for line in said)
    assert any("resuming from round 4" in line for line in said)


def test_if_every_full_checkpoint_is_damaged_loading_is_refused(chain: Path) -> None:
    for number in (1, 3):
        flip(chain / f"round-{number:06d}" / "state.safetensors", 700)
    with pytest.raises(StoreError, match=r"no intact checkpoint in .*: 5 found"):
        load_chain(chain)


@pytest.fixture(scope="module")
def one_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    save(folder, 1, full=True)
    save(folder, 2, full=False)
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_flipped_in_any_file_of_a_checkpoint_is_found(
    data: st.DataObject, one_chain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = data.draw(st.sampled_from(sorted((one_chain / "round-000002").iterdir())))
    whole = path.read_bytes()
    caplog.clear()
    try:
        flip(path, data.draw(st.integers(0, 8 * len(whole) - 1)))
        assert rounds(one_chain) == [1]
        assert any(record.levelno == logging.WARNING for record in caplog.records)
    finally:
        path.write_bytes(whole)


def test_every_byte_of_a_manifest_counts(one_chain: Path) -> None:
    path = one_chain / "round-000002" / "manifest.json"
    whole = path.read_bytes()
    try:
        for place in range(len(whole)):
            path.write_bytes(whole)
            flip(path, 8 * place + place % 8)
            assert rounds(one_chain) == [1], place
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"sha256": 1}', b"\xff\xfe", b"9"])
def test_a_manifest_that_is_not_a_manifest_is_damage_and_not_a_crash(content: bytes, chain: Path) -> None:
    (chain / "round-000005" / "manifest.json").write_bytes(content)
    assert rounds(chain) == [3, 4]


def test_a_file_cut_short_or_lost_is_found(chain: Path) -> None:
    path = chain / "round-000005" / "engine.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert rounds(chain) == [3, 4]
    path.unlink()
    assert rounds(chain) == [3, 4]


def test_a_checkpoint_copied_to_another_rounds_name_is_refused(chain: Path) -> None:
    shutil.rmtree(chain / "round-000005")
    shutil.copytree(chain / "round-000001", chain / "round-000005")
    assert rounds(chain) == [3, 4]


def test_a_newer_schema_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "SCHEMA", checkpoints.SCHEMA + 1)
        save(tmp_path, 1, full=True)
    with pytest.raises(StoreError):
        load_chain(tmp_path)


def test_pruning_removes_what_is_older_and_nothing_else(chain: Path) -> None:
    prune(chain, 3)
    assert checkpoint_rounds(chain) == [3, 4, 5]
    assert sorted(path.name for path in chain.iterdir()) == ["round-000003", "round-000004", "round-000005"]


def test_pruning_can_remove_what_is_newer(chain: Path) -> None:
    prune(chain, keep_from=0, keep_to=4)
    assert checkpoint_rounds(chain) == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_at_any_step_of_a_checkpoint_leaves_the_one_before(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, full=True)
    name, count = ("fsync", "replace")[seed % 2], seed // 2
    original, calls = getattr(os, name), iter(range(100))

    def deadly(*arguments: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, deadly)
        with suppress(KeyboardInterrupt):
            save(tmp_path, 2, full=random.Random(seed).random() < 0.5)
    assert rounds(tmp_path)[-1] in (1, 2)
    assert json.loads((tmp_path / "round-000001" / "manifest.json").read_bytes())["round"] == 1


def test_rows_of_another_type_are_converted_when_they_are_written_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    rows = Table(START, KINDS, tmp_path)
    rows.write(torch.tensor([1]), torch.full((1, 3), 7.0, dtype=torch.float64))
    assert rows[torch.tensor([1, 2])].tolist() == [[7, 7, 7], [4, 5, 6]]


def test_a_crash_while_pruning_leaves_no_gap(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "rmtree", fail(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        prune(chain, keep_from=0, keep_to=2)
    assert checkpoint_rounds(chain) == [1, 2, 3, 4]
