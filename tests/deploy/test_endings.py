"""What is said while nothing happens, at the end of a study, and when a command is started again after it."""

import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation
from tests.small_study import command

from fedmira.deploy import channel
from fedmira.deploy.attendance import Attendance, has_ended
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.members import order, untold
from fedmira.deploy.server import Server, is_over
from fedmira.deploy.settings import FederationSettings, check, read_agreement
from fedmira.deploy.wire import decode
from fedmira.deploy.worker import Worker
from fedmira.engine.events import silent
from fedmira.errors import ConfigError, StoreError

LONG_AGO = -1e6


class Partly(Loopback):
    """A link to sites of which some are away."""

    away: frozenset[str] = frozenset()

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.workers) - self.away


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServerFolder, Partly, Server, list[str]]:
    """A study whose last site was away at the end."""
    here = tmp_path_factory.mktemp("ended")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")
    raw: Mapping[str, Any] = small_study.settings(
        base, data, here / "unused", federation={"rounds": 1, "participation": 1.0}, methods=[{"name": "fedavg"}]
    )
    folder = write_federation(here / "federation", raw, data)
    link, said = Partly({name: folder.site(name) for name in SITES}), list[str]()
    for worker in link.workers.values():
        worker.tell = said.append
    server = Server(folder, link, said.append, silent)
    server.members.gather()
    assert not is_over(folder)
    server.carry_out()
    link.away = frozenset(SITES[2:])
    server.members.goodbye()
    return folder, link, server, said


def start_up_files(folder: Path, name: str) -> None:
    """Write of the engine's files what is read before it is started."""
    startup = folder / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    facts = {"servers": [{"service": {"target": "localhost:8002"}}]}
    (startup / name).write_text(json.dumps(facts), encoding="utf-8")


def test_a_site_shows_its_rounds(ended: tuple[ServerFolder, Partly, Server, list[str]]) -> None:
    assert sum(line.startswith("fedavg, seed 3: round 1: train loss ") for line in ended[3]) == len(SITES)


def test_a_site_that_knows_the_end_says_so_when_it_is_started_again(
    ended: tuple[ServerFolder, Partly, Server, list[str]],
) -> None:
    folder = ended[0].site(SITES[0])
    start_up_files(folder.kit, "fed_client.json")
    done = command("federation", "site", folder.path)
    assert done.code == 0, done.err
    assert f"the study is complete; the adapters are in {folder.adapters}" in done.err
    assert "study: complete" in command("federation", "status", folder.path).out


def test_another_study_in_the_folder_of_a_site_has_not_ended(
    ended: tuple[ServerFolder, Partly, Server, list[str]],
) -> None:
    site = ended[0].site(SITES[1])
    text = site.study_config.read_text(encoding="utf-8")
    assert has_ended(site)
    site.study_config.write_text(text + "# more rounds\n", encoding="utf-8")
    assert not has_ended(site)
    site.study_config.write_text(text, encoding="utf-8")
    assert has_ended(site)


def test_a_server_that_is_started_again_waits_for_those_who_do_not_know_the_end(
    ended: tuple[ServerFolder, Partly, Server, list[str]],
) -> None:
    folder, link, server, said = ended
    (late,) = SITES[2:]
    assert is_over(folder)
    assert untold(folder, SITES) == [late]
    assert not has_ended(folder.site(late))
    assert any(f"{late} could not be told" in line for line in said)

    def come_back(line: str) -> None:
        said.append(line)
        if f"waiting for {late}" in line:
            link.away = frozenset()

    server.members.tell = come_back
    server.members.part()
    assert has_ended(folder.site(late))
    start_up_files(folder.kit, "fed_server.json")
    done = command("federation", "server", folder.path)
    assert done.code == 0, done.err
    assert "the study is complete, and every site knows it" in done.err
    assert "report.html" in done.out


def test_a_server_whose_address_was_changed_in_its_settings_alone_is_not_started(
    ended: tuple[ServerFolder, Partly, Server, list[str]],
) -> None:
    folder = ended[0]
    start_up_files(folder.kit, "fed_server.json")
    text = folder.settings.read_text(encoding="utf-8")
    folder.settings.write_text(text.replace('"localhost"', '"localhost", "port": 9000'), encoding="utf-8")
    done = command("federation", "server", folder.path)
    folder.settings.write_text(text, encoding="utf-8")
    assert done.code == 2
    assert "found localhost:9000; the certificates and the kit of every site have localhost:8002" in done.err


def test_a_member_that_was_taken_out_is_listed(ended: tuple[ServerFolder, Partly, Server, list[str]]) -> None:
    folder = ended[0]
    text = folder.settings.read_text(encoding="utf-8")
    folder.settings.write_text(text.replace(f', "{SITES[2]}"', ""), encoding="utf-8")
    assert f"taken out: {SITES[2]}" in command("federation", "status", folder.path).out
    folder.settings.write_text(text, encoding="utf-8")


def test_orders_are_carried_out_by_whoever_works_and_not_by_the_thread_that_takes_them(
    ended: tuple[ServerFolder, Partly, Server, list[str]], tmp_path: Path
) -> None:
    """Else Ctrl-C would end the process while a thread is in torch's code, which aborts."""
    _, link, _, _ = ended
    worker = Worker(link.folders[SITES[0]], link.workers[SITES[0]].site)
    assert not worker.work(0.01)
    handled: list[threading.Thread] = []
    handle = worker.handle

    def note(data: bytes | bytearray) -> bytes:
        handled.append(threading.current_thread())
        return handle(data)

    worker.handle = note  # type: ignore[method-assign]
    place = channel.private_folder()
    with channel.listen(place / "s") as listener:
        threading.Thread(target=worker.listen, args=(listener,), daemon=True).start()
        with channel.connect(str(place / "s")) as connection:
            channel.send(connection, {}, order("hello"))
            assert worker.work(400.0)
            answer = decode(channel.receive(connection)[1])
    (place / "s").unlink()
    place.rmdir()
    assert answer.header["card"]["name"] == SITES[0]
    assert handled == [threading.current_thread()]


def test_a_site_says_once_that_nobody_answers_and_that_the_server_is_there() -> None:
    said: list[str] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
        attendance = Attendance(("127.0.0.1", port), said.append)
        attendance.look()
        assert said == []  # it has only begun
        for _ in range(2):
            attendance.since = LONG_AGO
            attendance.look()
        assert len(said) == 1
        assert f"nobody answers at 127.0.0.1:{port}" in said[0]
        server.listen()
        for _ in range(2):
            attendance.since = LONG_AGO
            attendance.look()
        assert len(said) == 2
        assert "asks this site for nothing" in said[1]
        attendance.hear()
        attendance.hear()
        assert said[2:] == [f"the server at 127.0.0.1:{port} is there"]
        attendance.since = time.monotonic() - 60  # others may be at work
        attendance.look()
        assert len(said) == 3


def test_an_agreement_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is missing; copy it again from the server's folder"):
        read_agreement(tmp_path / "agreement.json")


@pytest.mark.parametrize("name", ["server", "members", "Start"])
def test_a_site_cannot_have_the_name_of_a_file_of_the_server(name: str) -> None:
    raw = {"name": "f", "server": {"host": "hub"}, "sites": ["a", name]}
    with pytest.raises(ConfigError, match="needs another"):
        check(raw, FederationSettings, "federation")
