"""What carries frames inside the engine's jobs: large ones in turn, and nothing is answered with what was given up."""

import mmap
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedmira[deploy]'")

from fedmira.deploy import channel
from fedmira.deploy.channel import SPILLED_BYTES
from fedmira.deploy.nvflare import relay
from fedmira.deploy.nvflare.relay import LARGE_BYTES, SiteRelay, Turns

LARGE = bytes(LARGE_BYTES)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteRelay]:
    """A site's relay, whose worker answers an order with itself."""
    folder = channel.private_folder()
    listener = channel.listen(folder / "s")
    monkeypatch.setenv(channel.SOCKET, str(folder / "s"))

    def serve() -> None:
        while True:
            try:
                connection = channel.accept(listener)
            except OSError:
                return
            with connection:
                channel.send(connection, {}, channel.receive(connection)[1])

    threading.Thread(target=serve, daemon=True).start()
    yield SiteRelay()
    listener.close()
    (folder / "s").unlink()
    folder.rmdir()


def test_a_small_answer_comes_at_once_and_a_large_one_is_fetched_once(site: SiteRelay) -> None:
    assert site.deliver("1", b"small") == b"small"
    assert site.put("2", LARGE)
    assert site.deliver("2", b"") == LARGE_BYTES
    assert site.fetch("2") == LARGE
    with pytest.raises(ConnectionError, match="not here any more"):
        site.fetch("2")


def test_an_order_or_an_answer_of_another_call_is_not_given_out(site: SiteRelay) -> None:
    site.put("1", LARGE)
    site.put("2", LARGE)
    with pytest.raises(ConnectionError, match="the order is not here"):
        site.deliver("1", b"")
    site.put("3", LARGE)
    site.deliver("3", b"")
    with pytest.raises(ConnectionError, match="the answer is not here"):
        site.fetch("2")


def test_a_site_without_its_worker_says_so_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(channel.SOCKET, str(tmp_path / "none"))
    with pytest.raises(ConnectionError, match=r"the worker of this site is not there \(FileNotFoundError\)"):
        SiteRelay().deliver("1", b"order")


def test_a_large_frame_may_be_received_into_a_file_and_a_small_one_never_is(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    large = bytes(range(256)) * (2 * SPILLED_BYTES // 256) + b"end"
    for frame, kind in ((large, mmap.mmap), (b"small", bytearray), (b"", bytearray)):
        sender = threading.Thread(target=channel.send, args=(one, {"id": 1}, frame))
        sender.start()
        note, found = channel.receive(other, spill=tmp_path)
        sender.join()
        assert (note, bytes(found)) == ({"id": 1}, frame)
        assert isinstance(found, kind)
    assert list(tmp_path.iterdir()) == []
    one.sendall(bytes(7) + b"\x02" + bytes(4) + b"\x00\x40\x00\x00{}half a frame")
    one.close()
    with pytest.raises(EOFError):
        channel.receive(other, spill=tmp_path)


def waits(turns: Turns, size: int) -> threading.Thread:
    thread = threading.Thread(target=turns.take, args=(size,), daemon=True)
    thread.start()
    time.sleep(0.1)
    return thread


def test_large_frames_wait_until_there_is_room_and_small_ones_do_not() -> None:
    turns = Turns(2 * LARGE_BYTES)
    turns.take(LARGE_BYTES)
    turns.take(LARGE_BYTES)
    third = waits(turns, LARGE_BYTES)
    assert third.is_alive()
    turns.take(LARGE_BYTES - 1)
    assert turns.taken_bytes == 2 * LARGE_BYTES
    turns.give(LARGE_BYTES)
    third.join(10)
    assert not third.is_alive()


def test_a_frame_larger_than_all_the_room_goes_alone() -> None:
    turns = Turns(LARGE_BYTES)
    turns.take(5 * LARGE_BYTES)
    second = waits(turns, 5 * LARGE_BYTES)
    assert second.is_alive()
    turns.give(5 * LARGE_BYTES)
    second.join(10)
    assert turns.taken_bytes == 5 * LARGE_BYTES


def test_who_has_waited_long_goes_on_so_that_one_site_cannot_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "TURN_SECONDS", 0.05)
    turns = Turns(LARGE_BYTES)
    turns.take(LARGE_BYTES)
    turns.take(LARGE_BYTES)
    assert turns.taken_bytes == 2 * LARGE_BYTES
