"""One of NVFlare's processes: started, its output kept, started again when it ends, and none left behind."""

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedmira.deploy import channel
from fedmira.deploy.nvflare.kits import ORGANISATION, harden
from fedmira.disk.files import FILE_MODE, NO_LINK, write_atomic
from fedmira.errors import StoreError
from fedmira.model.base.memory import RETURNED_BYTES

log = logging.getLogger(__name__)

_JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # the name of a job's folder
LOG_BYTES = 20_000_000  # of the engine's output, above which a start begins a new file
QUICK_SECONDS = 30.0  # a process that ends sooner has probably not worked at all
RESTART_SECONDS = 2.0  # between starts of a process that ended


@dataclass(eq=False)
class Process:
    """One of the engine's processes, started again whenever it ends, until `stop`."""

    module: str
    kit: Path
    arguments: tuple[str, ...]
    socket: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def clear(self) -> None:
        """Make ready for a start: end what an earlier process has left running, and remove its jobs."""
        harden(self.kit)  # its settings name its own folder, which may have been moved
        end_stale(self._pid_file, self.kit)
        forget_jobs(self.kit)
        if self.log.is_file() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_name(f"old-{self.log.name}"))

    def start(self) -> None:
        """Start the process, and the thread that keeps it alive."""
        self.clear()
        threading.Thread(target=self._keep, daemon=True).start()

    @property
    def _pid_file(self) -> Path:
        return self.kit / "pid"

    def _keep(self) -> None:
        quick = 0  # ends in a row soon after a start: the waits between grow
        while not self.stopping.is_set():
            began = time.monotonic()
            with _append(self.log) as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-u", "-m", self.module, "-m", str(self.kit), *self.arguments],
                    cwd=self.kit,
                    env=_environment(self.socket),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            write_atomic(self._pid_file, str(self.process.pid).encode())
            code = self.process.wait()
            if not self.stopping.is_set():
                quick = quick + 1 if time.monotonic() - began < QUICK_SECONDS else 0
                log.warning(
                    "the engine's process ended (code %d) and is started again; what it wrote is in '%s'",
                    code,
                    self.log,
                )
                end_group(self.process.pid)
                self.stopping.wait(RESTART_SECONDS * 2 ** min(quick, 4))

    def stop(self) -> None:
        """End the process and its children."""
        self.stopping.set()
        if self.process is not None:
            end_group(self.process.pid)
            self.process.wait()
        self._pid_file.unlink(missing_ok=True)


def _append(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, FILE_MODE), "ab")


def _environment(path: Path) -> dict[str, str]:
    """The engine's environment: no code is found in the current folder, and no text of an error leaves a site.

    The memory of frames is the system's again as soon as nobody has them: glibc would keep up to 32 MB of each.
    """
    return {
        **os.environ,
        channel.SOCKET: str(path),
        "NVFLARE_SECURE_LOGGING": "true",
        "PYTHONSAFEPATH": "1",
        "MALLOC_MMAP_THRESHOLD_": str(RETURNED_BYTES),
    }


def end_group(group: int) -> None:
    """Kill a process with all it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_stale(pid_file: Path, kit: Path) -> None:
    """End a process that an earlier one, killed itself, has left behind. A kit that was copied has another's number."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.startswith(b"nvflare.") for word in words) and os.fsencode(kit) in words:
            end_group(pid)


def forget_jobs(kit: Path) -> None:
    """Remove what the engine keeps of earlier jobs; every start submits its own."""
    for path in [*kit.iterdir(), *(kit / "state").glob("*-storage")]:
        if path.is_dir() and not path.is_symlink() and (_JOB.fullmatch(path.name) or path.parent != kit):
            shutil.rmtree(path, ignore_errors=True)


def check_port(port: int) -> None:
    """Raise StoreError if the server cannot listen on its port."""
    for last in (False,) * 20 + (True,):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", port))
                return
            except OSError as error:
                if last or error.errno != errno.EADDRINUSE:  # one that was just ended may still have it
                    raise StoreError(
                        f"the server cannot listen on port {port} ({error.strerror}): end the program that does, or "
                        "found the federation with another port"
                    ) from None
        time.sleep(0.1)


def server_process(kit: Path, path: Path, log_file: Path) -> Process:
    """Return the engine's process of the server."""
    arguments = ("-s", "fed_server.json", "--set", "secure_train=true", f"org={ORGANISATION}", "config_folder=")
    return Process("nvflare.private.fed.app.server.server_train", kit, arguments, path, log_file)


def site_process(kit: Path, name: str, path: Path, log_file: Path) -> Process:
    """Return the engine's process of a site."""
    arguments = (
        "-s",
        "fed_client.json",
        "--set",
        "secure_train=true",
        f"uid={name}",
        f"org={ORGANISATION}",
        "config_folder=",
    )
    return Process("nvflare.private.fed.app.client.client_train", kit, arguments, path, log_file)
