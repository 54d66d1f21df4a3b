"""What runs inside the engine's jobs: it passes frames between the wire and a Unix socket, and knows nothing of them.

A job names these classes and carries no code. At the server the supervisor is behind the socket, at a site the
resident worker; both outlive the engine's processes.
"""

import os
import queue
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from nvflare.collab import collab

from fedmira.deploy.channel import SOCKET, connect, receive, send

PING_SECONDS = 3.0
PING_TIMEOUT = 10.0


def leave_out_torch() -> None:
    """Let NVFlare go without torch, which it imports, if it can, to send tensors: ours are bytes by then.

    A process that has torch already keeps it.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


class SiteRelay:
    """At a site: pass a frame to the worker and return its answer."""

    def __init__(self) -> None:
        leave_out_torch()

    @collab.publish  # type: ignore[untyped-decorator]
    def deliver(self, frame: bytes) -> bytes:
        """Raises only errors of connections, whose text has no word of the site's data."""
        try:
            with connect(os.environ[SOCKET]) as worker:
                send(worker, {}, frame)
                return bytes(receive(worker)[1])
        except (OSError, EOFError) as error:
            raise ConnectionError(f"the worker of this site is not there ({type(error).__name__})") from None

    @collab.publish  # type: ignore[untyped-decorator]
    def ping(self) -> bool:
        """Is this site's part of the job alive?"""
        return True


class ServerRelay:
    """At the server: pass the supervisor's frames to sites, each with its own deadline, and answers back."""

    def __init__(self) -> None:
        leave_out_torch()

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Serve until the supervisor closes the socket, or the job ends."""
        names = [client.name for client in collab.clients]
        with connect(os.environ[SOCKET]) as supervisor:
            answers: queue.Queue[tuple[dict[str, Any], bytes | bytearray]] = queue.Queue()
            answers.put(({"sites": names, "job": collab.fl_ctx.get_job_id()}, b""))
            requests: queue.Queue[tuple[dict[str, Any], bytearray] | None] = queue.Queue()
            threading.Thread(target=_read, args=(supervisor, requests), daemon=True).start()
            threading.Thread(target=_write, args=(supervisor, answers), daemon=True).start()
            while not collab.is_aborted:
                try:
                    request = requests.get(timeout=PING_SECONDS)
                except queue.Empty:
                    for name in names:
                        calls = collab.get_clients([name])(timeout=PING_TIMEOUT, blocking=False).ping()
                        threading.Thread(target=_heard, args=(name, calls, answers), daemon=True).start()
                    continue
                if request is None:
                    return
                note, frame = request
                # called here, where the job's context is; waited for in a thread
                calls = collab.get_clients([note["site"]])(timeout=note["seconds"], blocking=False).deliver(frame)
                threading.Thread(target=_wait, args=(note, calls, answers), daemon=True).start()


def _read(supervisor: socket.socket, requests: "queue.Queue[tuple[dict[str, Any], bytearray] | None]") -> None:
    try:
        while True:
            requests.put(receive(supervisor))
    except (OSError, EOFError, ValueError):
        requests.put(None)


def _write(supervisor: socket.socket, answers: "queue.Queue[tuple[dict[str, Any], bytes]]") -> None:
    try:
        while True:
            note, frame = answers.get()
            send(supervisor, note, frame)
    except OSError:
        return


def _outcomes(calls: Any) -> Iterator[tuple[Any, str]]:
    """Yield what a call returned, or the type of its failure; never the failure's text."""
    for _, value in calls:
        yield value, ""
    for _, failure in calls.failures.items():
        yield None, type(getattr(failure, "cause", failure)).__name__


def _wait(note: dict[str, Any], calls: Any, answers: "queue.Queue[tuple[dict[str, Any], bytes]]") -> None:
    for value, failure in _outcomes(calls):
        failed = failure or ("" if isinstance(value, bytes | bytearray) else "TypeError")
        answers.put(({"id": note["id"], "site": note["site"], "failure": failed}, b"" if failed else bytes(value)))


def _heard(name: str, calls: Any, answers: "queue.Queue[tuple[dict[str, Any], bytes]]") -> None:
    for value, failure in _outcomes(calls):
        answers.put(({"ping": name, "alive": value is True and not failure}, b""))
