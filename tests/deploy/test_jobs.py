"""The engine itself, started from kits: it runs a job that names FedMira's relays, and none that brings code."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedmira.deploy import channel
from fedmira.deploy.nvflare import engine, kits, processes
from fedmira.deploy.nvflare.kits import Party
from fedmira.deploy.settings import ServerAddress

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedmira[deploy]'")

pytestmark = pytest.mark.slow  # the engine takes half a minute to start

SITE = "a"
SECONDS = 120.0  # far more than it takes; a busy machine is slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: Callable[[], Any]) -> Any:
    """Return the first true answer."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if answer := what():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"nothing in {SECONDS:.0f} s")


@dataclass(frozen=True)
class Running:
    """A server and a site of NVFlare, started as FedMira starts them, and a session of the admin."""

    session: Any
    relays: socket.socket  # where the relays of a job report

    def submit(self, job: Path) -> str:
        return str(self.session.submit_job(str(job)))

    def end_of(self, job: str) -> str:
        """Wait for the end of a job; return how NVFlare calls it."""

        def ended() -> str:
            status = str(self.session.get_job_status(job))
            return status if status.startswith(("FINISHED", "FAILED")) else ""

        return str(wait_for(ended))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("jobs")
    address = ServerAddress(host="localhost", port=free_port())
    kits.make_authority(folder / "ca", federation="trial", server=address, encrypted=True)
    server, admin, site = folder / "server", folder / "admin", folder / "site"
    parties = {server: Party("localhost", "server"), admin: Party(kits.ADMIN, "admin"), site: Party(SITE, "client")}
    kits.make_kits(folder / "ca", parties, federation="trial")
    kits.harden(admin)
    private = channel.private_folder()
    relays = channel.listen(private / "s")
    engines = (
        processes.server_process(server, private / "s", folder / "server.txt"),
        processes.site_process(site, SITE, private / "s", folder / "site.txt"),
    )
    for process in engines:
        process.start()
    try:
        wait_for(lambda: engine._is_listening(admin))
        session = wait_for(lambda: opened(admin))
        wait_for(lambda: [one.name for one in session.get_system_info().client_info] == [SITE])
        yield Running(session, relays)
        session.close()
    finally:
        for process in engines:
            process.stop()
        relays.close()
        (private / "s").unlink()
        private.rmdir()


def opened(admin: Path) -> Any:
    """A session of the admin, None while the server is not ready."""
    try:
        return engine._open_session(admin)
    except Exception:  # NVFlare raises many kinds while its server starts
        return None


def test_code_that_comes_with_a_job_is_not_run(running: Running, tmp_path: Path) -> None:
    """Python itself would run sitecustomize.py, at the start of each process that has the job's folder in its path."""
    engine.write_job(tmp_path / "job", "brings-code")
    mark, custom = tmp_path / "mark", tmp_path / "job" / "app" / "custom"
    custom.mkdir()
    (custom / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    assert running.end_of(running.submit(tmp_path / "job")) == "FINISHED:FAILED_TO_RUN"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("party", "end"),
    [
        pytest.param("server", "FINISHED:EXECUTION_EXCEPTION", marks=pytest.mark.slow),
        pytest.param("client", "FINISHED:ABNORMAL", marks=pytest.mark.slow),
    ],
)
def test_a_class_that_is_not_fedmiras_is_not_made(party: str, end: str, running: Running, tmp_path: Path) -> None:
    engine.write_job(tmp_path / "job", "names-another-class")
    mark = tmp_path / "mark"
    config = tmp_path / "job" / "app" / "config" / f"config_fed_{party}.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["components"].append({"id": "x", "path": "subprocess.Popen", "args": {"args": ["touch", str(mark)]}})
    config.write_text(json.dumps(content), encoding="utf-8")
    assert running.end_of(running.submit(tmp_path / "job")) == end
    assert not mark.exists()


def test_a_job_that_names_the_relays_runs(running: Running, tmp_path: Path) -> None:
    engine.write_job(tmp_path / "job", "relays")
    job = running.submit(tmp_path / "job")
    running.relays.settimeout(SECONDS)
    with channel.accept(running.relays) as relay:
        note, _ = channel.receive(relay)
    assert note == {"sites": [SITE], "job": job}
