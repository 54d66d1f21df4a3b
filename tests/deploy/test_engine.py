"""Before the engine is started: what an earlier process left, and whether the server's port is free."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmira.deploy import channel
from fedmira.deploy.nvflare import processes
from fedmira.errors import StoreError


def idle(*words: str) -> subprocess.Popen[bytes]:
    """Start a process that does nothing and has these words on its command line."""
    line = [sys.executable, "-c", "import time; time.sleep(600)", *words]
    process = subprocess.Popen(line, start_new_session=True)
    while words[-1].encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # empty while it is replaced
        time.sleep(0.01)
    return process


def test_only_a_process_of_this_very_kit_is_ended(tmp_path: Path) -> None:
    """A folder that was copied brings the number of a process of the folder that it was copied from."""
    kit, copy = tmp_path / "kit", tmp_path / "copy" / "kit"
    process = idle("nvflare.private", "-m", str(kit))
    try:
        (tmp_path / "pid").write_text(str(process.pid))
        processes.end_stale(tmp_path / "pid", copy)
        assert process.poll() is None
        processes.end_stale(tmp_path / "pid", kit)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()


def test_the_folder_of_a_process_that_was_killed_is_removed_by_the_next_one(tmp_path: Path) -> None:
    left = channel.private_folder(tmp_path / "socket")
    channel.listen(left / "s").close()
    new = channel.private_folder(tmp_path / "socket")
    assert not left.exists()
    assert new.is_dir()
    (tmp_path / "socket").write_text(str(tmp_path / "fedmira-mine"), encoding="utf-8")
    (tmp_path / "fedmira-mine").mkdir()
    channel.private_folder(tmp_path / "socket").rmdir()  # a note of somebody else's removes nothing elsewhere
    assert (tmp_path / "fedmira-mine").is_dir()
    new.rmdir()


def test_a_port_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StoreError, match=rf"cannot listen on port {port} \(Address already in use\)"):
            processes.check_port(port)
    processes.check_port(port)


def test_what_the_engine_kept_of_earlier_jobs_is_removed_and_nothing_else(tmp_path: Path) -> None:
    job = "e50774cb-6925-4bdc-b900-bfd5e066eb19"
    for name in (job, "state/jobs-storage/x", "state/snapshot-storage", "startup", "local", "transfer"):
        (tmp_path / name).mkdir(parents=True)
    processes.forget_jobs(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["local", "startup", "state", "transfer"]
