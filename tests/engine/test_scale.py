"""Many clients: rows in a file give the bits of rows in memory, survive what a run survives, and fill no memory."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study
from tests.small_study import command, differences, outcome, run_folders

from fedmira.adapters import Stored, lora_layout
from fedmira.disk import table
from fedmira.disk.folders import RunFolder
from fedmira.disk.table import Table
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.memory import ClientMemory
from fedmira.methods.base import Change, State
from fedmira.study import handover

CONTRACT = {"config.yaml", "run.json", "clients.json", "graph.json", "metrics.jsonl", "results.csv", "log.txt"}
FOLDERS = {"checkpoints", "adapters"}
STORED = {"name": "mira", "lambda": 0.25, "neighbours": "stored", "graph": {"kind": "uniform"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def save(inputs: tuple[Path, Path], study: Path, **changes: Any) -> Path:
    """A study whose rows, moments and stored neighbours are all read back."""
    methods = [*map(dict, small_study.METHODS), {**STORED, "label": "stored"}]
    changes = {"training": {"keep_optimizer": True}, "methods": methods, **changes}
    return small_study.save_config(study.with_suffix(".yaml"), small_study.settings(*inputs, study, **changes))


@pytest.fixture(scope="module")
def in_memory(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study = tmp_path_factory.mktemp("memory") / "study"
    ended = command("run", save(inputs, study))
    assert ended.code == 0, ended.err
    return outcome(study)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """Every row of several clients goes to a file; the list says which tables were made in this process."""
    monkeypatch.setattr(table, "RAM_BYTES", 0)
    tables: list[Table] = []
    begin = Table.__init__

    def noted(self: Table, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        tables.append(self)

    monkeypatch.setattr(Table, "__init__", noted)
    return tables


@pytest.mark.slow
def test_rows_in_a_file_give_the_bits_of_rows_in_memory_and_the_file_is_gone(
    inputs: tuple[Path, Path], tmp_path: Path, in_memory: dict[str, Any], made: list[Table]
) -> None:
    import fedmira

    study = tmp_path / "study"
    fedmira.run(fedmira.load_config(save(inputs, study)))
    assert differences(outcome(study), in_memory) == []
    # rows of the three personal methods at the server, those that clients keep to themselves in `local`, and two kinds
    # of moments of all four
    assert sum(table.ndim == 2 for table in made if len(table) > 1) == 3 + 1 + 2 * 4
    assert all(table.mapped for table in made if len(table) > 1)
    for run in run_folders(study):
        assert {path.name for path in run.iterdir()} - CONTRACT == FOLDERS


# 45, 75 and 110: in the first run, at its end, and in the second
@pytest.mark.parametrize("count", [pytest.param(count, marks=pytest.mark.slow) for count in (45, 75, 110)])
def test_a_run_with_rows_in_a_file_that_is_killed_goes_on_with_the_same_bits(
    count: int, inputs: tuple[Path, Path], tmp_path: Path, in_memory: dict[str, Any], made: list[Table]
) -> None:
    study = tmp_path / "study"
    assert command("run", save(inputs, study), die_at=count).code == -signal.SIGKILL
    assert {path.name for run in run_folders(study) for path in run.iterdir()} <= CONTRACT | FOLDERS
    ended = command("resume", study)
    assert ended.code == 0, ended.err
    assert differences(outcome(study), in_memory) == []


@pytest.mark.slow
def test_a_disk_that_fills_under_the_rows_stops_a_run_that_can_be_resumed(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    in_memory: dict[str, Any],
    made: list[Table],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, write, calls = tmp_path / "study", os.pwrite, iter(range(1000))

    def full(handle: int, data: Any, offset: int) -> int:
        if next(calls) == 40:
            raise OSError(28, os.strerror(28))
        return write(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        ended = command("run", save(inputs, study))
    assert ended.code == 3, ended.err
    assert "No space left" in ended.err
    assert command("resume", study).code == 0
    assert differences(outcome(study), in_memory) == []


# ---------------------------------------------------------------- memory


CLIENTS, SAMPLED, WIDTH = 400, 20, 1 << 16  # 0.25 MB a row; twice 105 MB together, at the server and with clients


def watched(work: Callable[[], None]) -> int:
    """Do some work in a process of its own; return by how many bytes its anonymous memory grew at most."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        with os.fdopen(reading) as file:
            found = file.read()
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        return int(found)
    code = 1
    torch.set_num_threads(1)
    try:
        before, peak, done = anonymous(), 0, threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.001)

        thread = threading.Thread(target=sample)
        thread.start()
        work()
        done.set()
        thread.join()
        os.write(writing, str(peak - before).encode())
        code = 0
    finally:
        os._exit(code)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def play(path: Path) -> None:
    """Every client once and some twice: deltas, a full checkpoint of all rows, and back from disk."""
    ledger, clients = begin(path)
    for number in range(1, CLIENTS // SAMPLED + 5):
        ids = (torch.arange(SAMPLED) * (CLIENTS // SAMPLED) + number) % CLIENTS
        change = Change(ids, torch.full((SAMPLED, WIDTH), float(number)) + ids[:, None])
        kept = clients.stage(ids, {"row": change.rows + 1})
        commit(path / "checkpoints", ledger, change, kept)
        kept.apply()
        ledger.apply(change)
        ledger.round = number
    assert bool(ledger.table.written.all())
    assert ledger.last_full > CLIENTS // SAMPLED
    found, again = begin(path)
    restore(path / "checkpoints", found, again)  # type: ignore[arg-type]
    assert found.round == ledger.round
    for k in range(0, CLIENTS, SAMPLED):
        ids = torch.arange(k, k + SAMPLED)
        assert torch.equal(found.table[ids], ledger.table[ids])
        assert torch.equal(again.tables["row"][ids], clients.tables["row"][ids])


def begin(path: Path) -> tuple[Ledger, ClientMemory]:
    """A federation of clients whose rows the server has, and who keep one of their own as well."""
    layout = lora_layout([("m", WIDTH // 2, WIDTH // 2)], 1)
    names = tuple(f"c{k}" for k in range(CLIENTS))
    federation = Federation(names, layout, torch.ones(CLIENTS, dtype=torch.int64), 1.0)
    rows = Table(torch.zeros(1, WIDTH), torch.zeros(CLIENTS, dtype=torch.int64), path)
    state = State(Stored(layout, rows, federation.ranks, torch.ones(CLIENTS)))
    validation = torch.full((CLIENTS,), torch.nan, dtype=torch.float64)
    return Ledger(federation, state, validation), ClientMemory(CLIENTS, path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_rows_checkpoints_and_the_way_back_fill_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RAM_BYTES", 1 << 20)
    grown = watched(lambda: play(tmp_path))
    assert grown < 2 * CLIENTS * WIDTH * 4 * 2 / 3, f"{grown / 1e6:.0f} MB"


# ---------------------------------------------------------------- adapters


@pytest.mark.slow
def test_equal_adapters_share_a_read_only_file_where_copies_would_fill_the_disk(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"federation": {"rounds": 1}}
    assert command("run", save(inputs, tmp_path / "copies", **changes)).code == 0
    monkeypatch.setattr(handover, "LINK_BYTES", 0)
    assert command("run", save(inputs, tmp_path / "links", **changes)).code == 0
    assert differences(outcome(tmp_path / "links"), outcome(tmp_path / "copies")) == []
    for study, shared in (("links", True), ("copies", False)):
        for run in run_folders(tmp_path / study):
            drawn = RunFolder(run).records()[0]["clients"]
            names = {path.parent.name: path for path in run.glob("adapters/*/adapter_model.safetensors")}
            common = [path for name, path in names.items() if run.parent.name == "fedavg" or name not in drawn]
            assert len(common) in (3, 6)
            assert len({path.stat().st_ino for path in common}) == (1 if shared else len(common))
            for path in names.values():
                assert (path.stat().st_nlink > 1) == (shared and path in common)
                assert (path.stat().st_mode & 0o222 == 0) == (shared and path in common)


def test_a_file_system_without_links_gets_copies(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, os.strerror(1))

    changes: dict[str, Any] = {"federation": {"rounds": 1}, "methods": [{"name": "fedavg"}]}
    assert command("run", save(inputs, tmp_path / "copies", **changes)).code == 0
    monkeypatch.setattr(handover, "LINK_BYTES", 0)
    monkeypatch.setattr(os, "link", refuse)
    assert command("run", save(inputs, tmp_path / "refused", **changes)).code == 0
    assert differences(outcome(tmp_path / "refused"), outcome(tmp_path / "copies")) == []
