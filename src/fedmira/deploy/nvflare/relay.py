"""What runs inside the engine's jobs: it passes frames between the wire and a Unix socket, and knows nothing of them.

A job names these classes and carries no code. At the server the supervisor is behind the socket, at a site the
resident worker; both outlive the engine's processes.
"""

import gc
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.context import get_call_context, set_call_context

from fedmira.deploy.channel import SOCKET, Data, connect, receive, send

PING_SECONDS = 3.0
PING_TIMEOUT = 10.0
LARGE_BYTES = 1 << 20  # of a frame, from which on it waits for its turn
IN_FLIGHT_BYTES = 1 << 28  # of large frames under way at one time, of all sites; one frame may be larger
TURN_SECONDS = 60.0  # that a frame waits for its turn, at most: a site that hangs must not hold up the others


def leave_out_torch() -> None:
    """Let NVFlare go without torch, which it imports, if it can, to send tensors: ours are bytes by then.

    A process that has torch already keeps it.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


class SiteRelay:
    """At a site: pass a frame to the worker and return its answer.

    Large ones are put and fetched by calls of their own, for which the server waits until it has room. It holds one
    order and one answer at most: a newer call takes the place of one that was given up.
    """

    def __init__(self) -> None:
        leave_out_torch()
        self._order: tuple[str, bytes] = ("", b"")
        self._answer: tuple[str, bytes] = ("", b"")

    @collab.publish  # type: ignore[untyped-decorator]
    def put(self, call: str, frame: bytes) -> bool:
        """Keep a large frame for `deliver`."""
        self._order = (call, frame)
        return True

    @collab.publish  # type: ignore[untyped-decorator]
    def deliver(self, call: str, frame: bytes) -> bytes | int:
        """Return the worker's answer or, if that is large, its size. frame: empty for the one that was put.

        Raises only errors of connections, whose text has no word of the site's data.
        """
        if not frame:
            (put, frame), self._order = self._order, ("", b"")
            if put != call:
                raise ConnectionError("the order is not here any more")
        try:
            with connect(os.environ[SOCKET]) as worker:
                send(worker, {}, frame)
                del frame
                answer = bytes(receive(worker)[1])
        except (OSError, EOFError) as error:
            raise ConnectionError(f"the worker of this site is not there ({type(error).__name__})") from None
        if len(answer) < LARGE_BYTES:
            return answer
        self._answer = (call, answer)
        return len(answer)

    @collab.publish  # type: ignore[untyped-decorator]
    def fetch(self, call: str) -> bytes:
        """Return the large answer to a call, and forget it."""
        (answered, answer), self._answer = self._answer, ("", b"")
        if answered != call:
            raise ConnectionError("the answer is not here any more")
        return answer

    @collab.publish  # type: ignore[untyped-decorator]
    def ping(self) -> bool:
        """Is this site's part of the job alive?"""
        return True


class Turns:
    """Lets so many bytes of large frames be under way that this process stays small: the engine copies each some times.

    Who has waited for TURN_SECONDS goes on anyway.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.taken_bytes = limit_bytes, 0
        self._given = threading.Condition()

    def take(self, size_bytes: int) -> None:
        """Wait until there is room, if the frame is large."""
        if size_bytes < LARGE_BYTES:
            return
        with self._given:
            self._given.wait_for(
                lambda: not self.taken_bytes or self.taken_bytes + size_bytes <= self.limit_bytes, TURN_SECONDS
            )
            self.taken_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Give the room back that `take` gave."""
        if size_bytes < LARGE_BYTES:
            return
        gc.collect()  # the engine's calls are cycles, and hold their frames until somebody looks
        with self._given:
            self.taken_bytes -= size_bytes
            self._given.notify_all()


class CallFailed(Exception):
    """A call of a site had no result. kind: the type of its failure, never the failure's text."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class ServerRelay:
    """At the server: pass the supervisor's frames to sites, each with its own deadline, and answers back."""

    def __init__(self) -> None:
        leave_out_torch()

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Serve until the supervisor closes the socket, or the job ends."""
        names = [client.name for client in collab.clients]
        with connect(os.environ[SOCKET]) as connection:
            supervisor = SupervisorSide(connection, get_call_context())
            supervisor.say({"sites": names, "job": collab.fl_ctx.get_job_id()})
            threading.Thread(target=supervisor.read, daemon=True).start()
            while not collab.is_aborted:
                try:
                    request = supervisor.requests.get(timeout=PING_SECONDS)
                except queue.Empty:
                    for name in names:
                        threading.Thread(target=supervisor.ping, args=(name,), daemon=True).start()
                    continue
                if request is None:
                    return
                threading.Thread(target=supervisor.carry, args=request, daemon=True).start()
                del request  # its frame is large


class SupervisorSide:
    """The relay's connection to the supervisor, and what is done for it: a thread for each call of a site."""

    def __init__(self, connection: socket.socket, context: Any) -> None:
        self._connection, self._context = connection, context
        self._saying = threading.Lock()
        self._turns = Turns(IN_FLIGHT_BYTES)
        self.requests: queue.Queue[tuple[dict[str, Any], list[Data]] | None] = queue.Queue()

    def read(self) -> None:
        """Take requests as long as there are any, large ones in their turn; None at the end."""
        try:
            while True:
                note, frame = receive(self._connection, self._turns.take)
                self.requests.put((note, [frame]))
                del frame
        except (OSError, EOFError, ValueError):
            self.requests.put(None)

    def say(self, note: dict[str, Any], frame: bytes = b"") -> None:
        """Send the supervisor something; one that is gone needs nothing."""
        try:
            with self._saying:
                send(self._connection, note, frame)
        except OSError:
            return

    def ping(self, site: str) -> None:
        try:
            alive = self._ask(site, time.monotonic() + PING_TIMEOUT, "ping") is True
        except CallFailed:
            alive = False
        self.say({"ping": site, "alive": alive})

    def carry(self, note: dict[str, Any], frames: list[Data]) -> None:
        """Pass one frame to its site and the answer, or the kind of failure, to the supervisor.

        frames: a list of one, which is emptied, so that the frame is not held while the site computes.
        """
        site, call, until = note["site"], str(note["id"]), time.monotonic() + note["seconds"]
        answered = {"id": note["id"], "site": site, "failure": ""}
        try:
            frame: Data = frames.pop()
            size = len(frame)
            try:
                if size >= LARGE_BYTES:
                    self._ask(site, until, "put", call, frame)
                    frame = b""
            finally:
                self._turns.give(size)
            answer = self._ask(site, until, "deliver", call, frame)
            if not isinstance(answer, int):
                self._pass_on(answered, answer)
                return
            self._turns.take(answer)
            try:
                self._pass_on(answered, self._ask(site, until, "fetch", call))
            finally:
                self._turns.give(answer)
        except CallFailed as failed:
            self.say({**answered, "failure": failed.kind})

    def _pass_on(self, answered: dict[str, Any], answer: Any) -> None:
        if not isinstance(answer, bytes | bytearray):
            raise CallFailed("TypeError")
        self.say(answered, bytes(answer))

    def _ask(self, site: str, until: float, what: str, *arguments: Any) -> Any:
        """Call a site and wait. Raises CallFailed."""
        set_call_context(self._context)  # of the job; each thread has its own
        group = collab.get_clients([site])(timeout=max(until - time.monotonic(), 1.0), blocking=False)
        for value, failure in _outcomes(getattr(group, what)(*arguments)):
            if failure:
                raise CallFailed(failure)
            return value
        raise CallFailed("late")


def _outcomes(calls: Any) -> Iterator[tuple[Any, str]]:
    """Yield what a call returned, or the type of its failure; never the failure's text."""
    for _, value in calls:
        yield value, ""
    for _, failure in calls.failures.items():
        yield None, type(getattr(failure, "cause", failure)).__name__
