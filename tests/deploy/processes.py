"""Processes of a real federation on this machine, started by the commands that docs/federation.md shows."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fedmira.cli.main import main as cli_main
from fedmira.deploy.folders import SiteFolder

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "federation.md"
INIT, CHECK, SHOW, SERVER, SITE, STATUS, AUDIT = (
    line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    fedmira federation")
)


def arguments(line: str, folder: Path, *more: str, **changes: str) -> list[str]:
    """Return the arguments of a command of the page as its reader would type it here, with other names and places."""
    for old, new in changes.items():
        line = line.replace(old, new)
    _, *words = shlex.split(line)
    place = [f"{folder}{word.removeprefix('fed')}" if word.split("/")[0] == "fed" else word for word in words]
    return [*place, *more]


def typed(line: str, folder: Path, *more: str, **changes: str) -> list[str]:
    """Return a command of the page that begins with the interpreter."""
    return [sys.executable, "-m", "fedmira", *arguments(line, folder, *more, **changes)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(words: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a command in a group of its own; methods of the tests are importable in it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("a") as output:
        return subprocess.Popen(words, stdout=output, stderr=output, text=True, start_new_session=True, env=environment)


@dataclass
class Forked:
    """A command in a process that was forked, with what a Popen has of the same names."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} still runs after {seconds:.0f} s")
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fork(words: list[str], log: Path, *, before: Callable[[], None] = lambda: None) -> Forked:
    """Start `fedmira WORDS` as `start` does, without importing torch once more, which takes a process seconds.

    before: is called in the new process, which it may change.
    """
    process = os.fork()
    if process:
        return Forked(process)
    code = 97
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)  # mends torch's pool after the fork
        sys.argv = ["fedmira", *words]
        before()
        cli_main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def ended_afterwards() -> Iterator[list[subprocess.Popen[str] | Forked]]:
    """Give a list of processes; those that still run at the end are ended."""
    started: list[subprocess.Popen[str] | Forked] = []
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


def fill_in(site: SiteFolder, *, data: Path, base: Path) -> None:
    """Edit site.yaml as a site does: where its data and its base are."""
    changed: dict[str, Any] = yaml.safe_load(site.settings.read_text())
    changed["data"]["path"] = str(data)
    site.settings.write_text(yaml.safe_dump({**changed, "base_model": str(base), "threads": 1}))
