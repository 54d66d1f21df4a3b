"""What a socket carries and what processes hold: a forwarder that counts bytes, and a watch on a tree of processes."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PIECE = 1 << 18  # bytes read at once
SAMPLE_S = 0.05


@dataclass(eq=False)
class Forwarder:
    """Passes connections on to `port` of this machine, unread, and counts: bytes `up` to it and `down` from it."""

    port: int
    up: int = 0
    down: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Forwarder":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.own_port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.port))
            except OSError:  # it is not there yet: sites try again
                site.close()
                continue
            for one in (site, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(site, server, self._count_up), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, site, self._count_down), daemon=True).start()

    def _count_up(self, count: int) -> None:
        with self.lock:
            self.up += count

    def _count_down(self, count: int) -> None:
        with self.lock:
            self.down += count

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, count: Callable[[int], None]) -> None:
        buffer = bytearray(PIECE)
        view = memoryview(buffer)
        with contextlib.suppress(OSError):
            while got := source.recv_into(buffer):
                target.sendall(view[:got])
                count(got)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


OURS, ENGINE, JOB = "fedmira federation server", "NVFlare's server", "NVFlare's job"


def role_of(words: list[str]) -> str | None:
    """Which of the server's processes has this command line? None for one that lives for a moment."""
    line = " ".join(words)
    if "runner_process" in line:
        return JOB
    return ENGINE if "server_train" in line else OURS if "fedmira" in line else None


@dataclass(eq=False)
class Watch:
    """Samples the anonymous memory of a process and all below it, by role, until `stop`.

    before: at the last moment before `begun` was true. peaks: the most of each role, and of all at one moment.
    """

    process: int
    begun: Callable[[], bool]
    before: Mapping[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    together: int = 0
    _going: bool = True

    def start(self) -> None:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._going = False
        self._thread.join()

    def _sample(self) -> None:
        roles: dict[int, str] = {}
        looked, begun = 0.0, False
        while self._going:
            if time.monotonic() - looked > 10 * SAMPLE_S:
                roles, looked = self._processes(), time.monotonic()
            now: dict[str, int] = {}
            for process, role in roles.items():
                now[role] = now.get(role, 0) + anonymous_bytes(process)
            begun = begun or self.begun()
            if not begun:
                self.before = now
            for role, size in now.items():
                self.peaks[role] = max(self.peaks.get(role, 0), size)
            self.together = max(self.together, sum(now.values()))
            time.sleep(SAMPLE_S)

    def _processes(self) -> dict[int, str]:
        found: dict[int, str] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.process)
            for one in (whole, *whole.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if (role := role_of(one.cmdline())) is not None:
                        found[one.pid] = role
        return found


def anonymous_bytes(process: int) -> int:
    """Return the bytes of a process that are in no file; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return 1024 * int(lines["RssAnon"].split()[0]) if "RssAnon" in lines else 0
