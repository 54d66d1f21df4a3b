"""The server's side of NVFlare: its process, its job, and calls to the sites that are in it.

The engine freezes who takes part when a job starts, and a job dies with any of its processes. So jobs are short-lived
here: the supervisor submits a new one whenever the job has ended, or a site has come back that is not in it. Calls
under way are sent again; sites answer the same call twice with the same bytes.
"""

import contextlib
import io
import itertools
import json
import logging
import queue
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.deploy import channel
from fedmira.deploy.channel import Data
from fedmira.deploy.link import Failure
from fedmira.deploy.nvflare.kits import address_of
from fedmira.deploy.nvflare.processes import check_port, server_process
from fedmira.disk.files import make_folder, write_json

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
JOB_SECONDS = 60.0  # from submission until the job's server part has to be there
RETRY_SECONDS = 1.0  # between tries to reach a site
HEARD_SECONDS = 60.0  # since the last heartbeat of a site that is there
ALONE_SECONDS = 30.0  # until the server's own port must answer
ABSENT_PINGS = 2  # in a row without an answer: the site's part of the job is gone


def write_job(folder: Path, name: str) -> None:
    """Write a job that names the installed relays, and has no code."""
    if folder.is_dir():
        shutil.rmtree(folder)
    config = folder / "app" / "config"
    make_folder(config)
    write_json(
        folder / "meta.json",
        {"name": name, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1, "mandatory_clients": []},
    )
    relay = "fedmira.deploy.nvflare.relay"
    write_json(
        config / "config_fed_server.json",
        {
            "format_version": 2,
            "workflows": [
                {
                    "id": "controller",
                    "path": "nvflare.collab.runtime.controller.CollabController",
                    "args": {"server_obj_id": "_server", "sync_task_timeout": 60},
                }
            ],
            "components": [{"id": "_server", "path": f"{relay}.ServerRelay", "args": {}}],
        },
    )
    write_json(
        config / "config_fed_client.json",
        {
            "format_version": 2,
            "executors": [
                {
                    "tasks": ["*"],
                    "executor": {
                        "path": "nvflare.collab.runtime.executor.CollabExecutor",
                        "args": {"client_obj_id": "_client"},
                    },
                }
            ],
            "components": [{"id": "_client", "path": f"{relay}.SiteRelay", "args": {}}],
        },
    )


@dataclass(eq=False)
class _Call:
    """One site's frame, one of `frames`, until it is answered. sent: to which connection of the relay."""

    site: str
    frames: Mapping[str, Data]
    until: float
    answers: "queue.Queue[tuple[str, Data | Failure]]"
    sent: int = -1
    retry_at: float = 0.0


class Supervisor:
    """The server's side of the link: the engine's server, its job, the calls under way. inbox: for large answers."""

    def __init__(self, kit: Path, admin: Path, job: Path, name: str, log_file: Path, *, inbox: Path) -> None:
        self._admin, self._job, self._name, self._inbox = admin, job, name, inbox
        self._folder = channel.private_folder(kit / "socket")
        self._listener = channel.listen(self._folder / "s")
        self._process = server_process(kit, self._folder / "s", log_file)
        self._lock = threading.RLock()
        self._sending = threading.Lock()  # one frame at a time goes to the relay
        self._relay: socket.socket | None = None
        self._number = 0  # of the relay's connection
        self._members: frozenset[str] = frozenset()
        self._silent: dict[str, int] = {}  # member -> pings in a row without an answer
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count()
        self._ended = threading.Event()
        self._connected: dict[str, float] = {}  # site -> when the engine heard of it last
        self._lost: dict[str, float] = {}  # member whose part of the job is gone -> when that was noticed

    def __enter__(self) -> "Supervisor":
        try:
            write_job(self._job, self._name)
            make_folder(self._inbox)
            self._process.clear()
            check_port(address_of(self._process.kit)[1])
            self._process.start()
        except BaseException:
            self.__exit__()
            raise
        for work in (self._accept, self._supervise):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock:
            if self._relay is not None:
                self._relay.close()
        self._process.stop()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def sites(self) -> frozenset[str]:
        with self._lock:
            return frozenset(name for name in self._members if name not in self._lost)

    def call(self, frames: Mapping[str, Data], seconds: float) -> Iterator[tuple[str, Data | Failure]]:
        answers: queue.Queue[tuple[str, Data | Failure]] = queue.Queue()
        until = time.monotonic() + seconds
        with self._lock:
            numbers = {next(self._ids): _Call(site, frames, until, answers) for site in frames}
            self._calls.update(numbers)
        waiting = set(frames)
        try:
            while waiting:
                self._send_due()
                left = until - time.monotonic()
                if left <= 0:
                    break
                try:
                    site, answer = answers.get(timeout=min(left, RETRY_SECONDS))
                except queue.Empty:
                    continue
                if site in waiting:
                    waiting.discard(site)
                    yield site, answer
                del answer  # else it would be held until the next one is there
        finally:
            with self._lock:
                for number in numbers:
                    self._calls.pop(number, None)
        for site in sorted(waiting):
            yield site, Failure("late")

    def _send_due(self) -> None:
        """Send the calls that the newest relay has not got, to sites that are in its job.

        Not under the lock: the relay reads a large frame when it has room for it, and answers come meanwhile.
        """
        with self._sending:
            while (due := self._next_due()) is not None:
                relay, note, call = due
                frame = call.frames[call.site]  # made now, which fails where the disk is full
                try:
                    channel.send(relay, note, frame)
                except OSError:
                    return  # the relay is gone; the next one gets the call

    def _next_due(self) -> tuple[socket.socket, dict[str, Any], _Call] | None:
        now = time.monotonic()
        with self._lock:
            if self._relay is None:
                return None
            for number, call in self._calls.items():
                if call.sent == self._number or call.site not in self._members or now < call.retry_at:
                    continue
                call.sent = self._number
                return self._relay, {"id": number, "site": call.site, "seconds": max(call.until - now, 1.0)}, call
        return None

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection = channel.accept(self._listener)
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Read what one relay says until it is gone."""
        number = -1
        try:
            note, _ = channel.receive(connection)
            with self._lock:
                self._number += 1
                number = self._number
                self._relay, self._members = connection, frozenset(note["sites"])
                self._silent, self._lost = {}, {}
            log.info("the engine's job runs with %s", ", ".join(sorted(self._members)) or "no site")
            while True:
                # no name here holds a frame until the next one is there
                self._heard(*channel.receive(connection, spill=self._inbox))
        except OSError as error:  # of the relay, or the disk is full
            if not self._ended.is_set():
                log.warning("the link to the engine's job has ended: %s", error.strerror)
        except (EOFError, ValueError, KeyError):
            pass
        finally:
            with self._lock:
                if self._number == number:
                    self._relay, self._members = None, frozenset()
            connection.close()

    def _heard(self, note: dict[str, Any], frame: Data) -> None:
        with self._lock:
            if "ping" in note:
                self._pinged(note["ping"], alive=note["alive"])
                return
            call = self._calls.get(note["id"])
            if call is None:
                log.warning("an answer of site '%s' came after its round had closed: it is dropped", note["site"])
                return
            if note["failure"]:  # of the engine, or the site's worker is not there: tried again until the deadline
                call.sent, call.retry_at = -1, time.monotonic() + RETRY_SECONDS
                return
            del self._calls[note["id"]]
            call.answers.put((call.site, frame))

    def _pinged(self, site: str, *, alive: bool) -> None:
        self._silent[site] = 0 if alive else self._silent.get(site, 0) + 1
        if alive:
            self._lost.pop(site, None)
        elif self._silent[site] == ABSENT_PINGS:
            self._lost[site] = time.time()

    def _supervise(self) -> None:
        """Keep a job running that has every site in it which is there."""
        session: Any = None
        job, submitted = "", 0.0
        alone_since: float | None = time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            try:
                if session is None:
                    if not _is_listening(self._admin):
                        alone_since = self._warn_alone(alone_since)
                        continue
                    alone_since = None
                    session = _open_session(self._admin)
                info = session.get_system_info()
                with self._lock:
                    heard = {client.name: float(client.last_connect_time or 0) for client in info.client_info}
                    self._connected = {name: at for name, at in heard.items() if time.time() - at < HEARD_SECONDS}
                    relay, members = self._relay is not None, self._members
                    back = {name for name, at in self._lost.items() if self._connected.get(name, at) > at}
                    newcomers = (set(self._connected) - members) | back
                if not self._connected:
                    continue
                waited = time.monotonic() - submitted
                if job and relay and newcomers and waited > POLL_SECONDS:
                    log.info("%s joins: the engine's job is started anew", ", ".join(sorted(newcomers)))
                    with contextlib.suppress(Exception):
                        session.abort_job(job)
                    self._drop_relay()
                    job = ""
                ended = bool(job) and str(session.get_job_status(job)).startswith("FINISHED")
                if not job or ended or (not relay and waited > JOB_SECONDS):
                    job, submitted = session.submit_job(str(self._job)), time.monotonic()
            except Exception as error:  # the engine's session raises many kinds; its server may just be starting
                log.debug("the engine does not answer (%s)", type(error).__name__)
                with contextlib.suppress(Exception):
                    session.close()
                session, job = None, ""
        with contextlib.suppress(Exception):
            session.close()

    def _warn_alone(self, since: float | None) -> float | None:
        """Warn, once, if this machine does not reach its own port by the name that the sites use."""
        if since is None or time.monotonic() - since < ALONE_SECONDS:
            return since
        host, port = (_admin_facts(self._admin)[name] for name in ("host", "port"))
        log.warning(
            "this machine does not reach its own server at %s:%s: if the name leads to a router, write '127.0.0.1 %s' "
            "into /etc/hosts here; what the engine says is in '%s'",
            host, port, host, self._process.log,
        )  # fmt: skip
        return None

    def _drop_relay(self) -> None:
        with self._lock:
            if self._relay is not None:
                with contextlib.suppress(OSError):
                    self._relay.shutdown(socket.SHUT_RDWR)
                self._relay, self._members = None, frozenset()


def _admin_facts(admin: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((admin / "startup" / "fed_admin.json").read_text())["admin"]
    return facts


def _is_listening(admin: Path) -> bool:
    """Is the engine's server there? A session that is opened too early prints, and waits, for seconds."""
    facts = _admin_facts(admin)
    try:
        socket.create_connection((facts["host"], facts["port"]), timeout=5.0).close()
    except OSError:
        return False
    return True


def _open_session(admin: Path) -> Any:
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it connects
        return new_secure_session(_admin_facts(admin)["username"], str(admin), timeout=10.0)
