"""The two long-running commands: a federation's server, and one site of it."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmira.deploy import channel
from fedmira.deploy.attendance import Attendance, has_ended
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.members import untold
from fedmira.deploy.nvflare.engine import Supervisor
from fedmira.deploy.nvflare.kits import address_of, check_installed
from fedmira.deploy.nvflare.processes import site_process
from fedmira.deploy.server import Server, is_over
from fedmira.deploy.settings import FederationSettings, read_federation
from fedmira.deploy.site import open_site
from fedmira.deploy.worker import Worker
from fedmira.disk.files import make_folder
from fedmira.disk.folders import held, logging_to
from fedmira.engine.events import Observer
from fedmira.errors import ConfigError, StoreError
from fedmira.model.base.memory import return_freed_memory

log = logging.getLogger(__name__)

Tell = Callable[[str], None]

PARTING_SECONDS = 2.0  # until the engine has passed on a site's last answer


def run_server(folder: ServerFolder, *, tell: Tell, observer: Observer) -> Path:
    """Carry out a federation's study from where it is, and return its folder; the engine is started and stopped here.

    Raises StoreError if the engine is not installed, the kit is missing, or another server has the folder.
    """
    check_installed()
    return_freed_memory()
    _check_kit(folder.kit, f"make it again: fedmira federation init {folder.path} --renew")
    settings = read_federation(folder.settings)
    _check_address(folder, settings)
    with held(folder.path), _logging(folder.log):
        if is_over(folder) and not untold(folder, settings.sites):
            tell("the study is complete, and every site knows it")
            return folder.study
        log_file = folder.log.with_name("engine.txt")
        with Supervisor(folder.kit, folder.admin, folder.job, settings.name, log_file, inbox=folder.inbox) as link:
            server = Server(folder, link, tell, observer)
            if is_over(folder):
                server.members.part()
            else:
                server.members.gather()
                server.carry_out()
                server.members.goodbye()
        return folder.study


def run_site(folder: SiteFolder, *, tell: Tell) -> None:
    """Serve the site's data to the federation until its study is complete.

    The base and the data are loaded once, in this process; it prints its number, which stays the same whatever happens
    to the engine's. Raises what open_site does, StoreError if the engine or the kit is missing.
    """
    check_installed()
    _check_kit(
        folder.kit,
        "copy the organiser's whole folder or, where this site makes its own key, run 'fedmira federation site DIR "
        "--request' and then '--accept'",
    )
    with held(folder.path), _logging(folder.log):
        if has_ended(folder):
            tell(f"{_describe_end(folder)}. To wait for the server all the same, remove '{folder.ended}'")
            return
        site = open_site(folder)
        client = site.client
        tell(
            f"site {site.settings.name}: {len(client.train)} training, {len(client.validation)} validation, "
            f"{len(client.test)} test examples; base loaded by process {os.getpid()}"
        )
        worker = Worker(folder, site, tell)
        place = channel.private_folder(folder.kit / "socket")
        listener = channel.listen(place / "s")
        threading.Thread(target=worker.listen, args=(listener,), daemon=True).start()
        process = site_process(folder.kit, site.settings.name, place / "s", folder.log.with_name("engine.txt"))
        process.start()
        try:
            _work(worker, Attendance(address_of(folder.kit), tell))
            time.sleep(PARTING_SECONDS)
        finally:
            process.stop()
            listener.close()
            shutil.rmtree(place, ignore_errors=True)
        tell(_describe_end(folder))


def _work(worker: Worker, attendance: Attendance) -> None:
    """Carry out orders to the end of the study; show what is waited for, and why the server does not take this site."""
    shown = ""
    while not worker.ended:
        if worker.work(0.5):
            attendance.hear()
        else:
            attendance.look()
        if worker.refused != shown:
            shown = worker.refused
            if shown:
                worker.tell(f"the server does not take this site: {shown}")


def _describe_end(folder: SiteFolder) -> str:
    if folder.adapters.is_dir():
        return f"the study is complete; the adapters are in {folder.adapters}"
    return "the study is complete; this site took no part in it"


def _check_address(folder: ServerFolder, settings: FederationSettings) -> None:
    """Raise ConfigError if federation.yaml was given another address than the certificates and the sites have."""
    host, port = address_of(folder.kit)
    if (settings.server.host, settings.server.port) != (host, port):
        raise ConfigError(
            [
                f"server: found {settings.server.host}:{settings.server.port}; the certificates and the kit of every "
                f"site have {host}:{port}: write that again, or found a new federation"
            ],
            str(folder.settings),
        )


def _check_kit(kit: Path, remedy: str) -> None:
    if not (kit / "startup").is_dir():
        raise StoreError(f"'{kit}' has no start-up files of the engine: {remedy}")


@contextmanager
def _logging(path: Path) -> Iterator[None]:
    """Send FedMira's log records to a file; what the engine's session warns of stays off the terminal."""
    make_folder(path.parent)
    quiet = logging.NullHandler()
    logging.getLogger().addHandler(quiet)
    try:
        with logging_to(path):
            yield
    finally:
        logging.getLogger().removeHandler(quiet)
