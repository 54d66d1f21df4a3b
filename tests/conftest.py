"""What every test shares: one thread, no network, the shared data, and a count of what was skipped."""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = ("127.", "::1", "localhost")

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None)  # no test depends on how fast this machine is at the moment
settings.load_profile("steady")
# transformers and datasets read these once, on import: they must stand before the first test module is loaded.
for _switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
    os.environ.setdefault(_switch, "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", metavar="FILE", help="append what tests of faults counted, as JSON lines")
    parser.addoption("--kills", type=int, default=40, metavar="N", help="kills of a study at random instants")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, int, Mapping[str, float]], None]:
    """Write a figure down where `--figures` asks for it: what was done, how often, what came of it."""

    def write(what: str, count: int, found: Mapping[str, float]) -> None:
        if path := request.config.getoption("--figures"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"test": request.node.nodeid, "what": what, "count": count, "found": dict(found)}) + "\n"
                )

    return write


class NetworkBlocked(RuntimeError):
    """A test reached for the network."""


def _refuse_remote(address: Any) -> None:
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host and not str(host).startswith(LOOPBACK):
        raise NetworkBlocked(f"a test reached for '{host}': tests may use AF_UNIX and the loopback only; ship the data")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection and name look-up that would leave this machine."""
    patch = pytest.MonkeyPatch()

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, *arguments: Any) -> Any:
            if self.family != socket.AF_UNIX:
                _refuse_remote(arguments[-1])  # the address comes last in connect, connect_ex and sendto
            return original(self, *arguments)

        return guarded

    resolve = socket.getaddrinfo

    def guarded_resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        _refuse_remote(host)
        return resolve(host, *arguments, **options)

    for name in ("connect", "connect_ex", "sendto"):
        patch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
    patch.setattr(socket, "getaddrinfo", guarded_resolve)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def true_fsync() -> Iterator[Callable[[int], None]]:
    """Let `os.fsync` look at its handle only, here and in forked commands; return the true one, which tests/disk uses.

    What it adds is seen after a loss of power and by no test: a killed process leaves what it wrote to the system.
    A small study calls it some 300 times, at milliseconds each.
    """
    true = os.fsync

    def look(handle: Any) -> None:
        os.fstat(handle if isinstance(handle, int) else handle.fileno())

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", look)
    yield true
    patch.undo()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and data: FEDMIRA_TEST_DATA, else `shared` beside the project."""
    folder = Path(os.environ.get("FEDMIRA_TEST_DATA") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared test data at '{folder}' (set FEDMIRA_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def shared_file(shared: Path) -> Callable[[str], Path]:
    """Find one file or folder below `shared`, or skip with its name."""

    def find(relative: str) -> Path:
        if not (shared / relative).exists():
            pytest.skip(f"the shared test data has no '{relative}'")
        return shared / relative

    return find


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests were skipped and why, so that a green run with missing data cannot pass for a full one."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        place = report.longrepr
        reason = place[2] if isinstance(place, tuple | list) else str(place)
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.write_line(f"tests skipped: {reasons.total()}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that waits most for other processes: no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_real.py")
