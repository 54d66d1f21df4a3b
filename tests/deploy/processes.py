"""Processes of a real federation on this machine, started by the commands that docs/federation.md shows."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedmira.deploy.folders import SiteFolder

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "federation.md"
INIT, CHECK, SHOW, SERVER, SITE, STATUS, AUDIT = (
    line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    fedmira federation")
)


def typed(line: str, folder: Path, *more: str, **changes: str) -> list[str]:
    """Return a command of the page as its reader would type it here, with other names and places."""
    for old, new in changes.items():
        line = line.replace(old, new)
    _, *words = shlex.split(line)
    place = [f"{folder}{word.removeprefix('fed')}" if word.split("/")[0] == "fed" else word for word in words]
    return [sys.executable, "-m", "fedmira", *place, *more]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(words: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a command in a group of its own; methods of the tests are importable in it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("a") as output:
        return subprocess.Popen(words, stdout=output, stderr=output, text=True, start_new_session=True, env=environment)


@contextmanager
def ended_afterwards() -> Iterator[list[subprocess.Popen[str]]]:
    """Give a list of processes; those that still run at the end are ended."""
    started: list[subprocess.Popen[str]] = []
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
