"""The two long-running commands: a federation's server, and one site of it."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmira.deploy import channel
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.nvflare.engine import Supervisor, site_process
from fedmira.deploy.nvflare.kits import check_installed
from fedmira.deploy.server import Server
from fedmira.deploy.settings import read_federation
from fedmira.deploy.site import open_site
from fedmira.deploy.worker import Worker
from fedmira.disk.files import make_folder
from fedmira.disk.folders import held, logging_to
from fedmira.engine.events import Observer
from fedmira.errors import StoreError
from fedmira.model.base.memory import return_freed_memory

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


def run_server(folder: ServerFolder, *, tell: Tell, observer: Observer) -> Path:
    """Carry out a federation's study from where it is, and return its folder; the engine is started and stopped here.

    Raises StoreError if the engine is not installed, the kit is missing, or another server has the folder.
    """
    check_installed()
    return_freed_memory()
    _check_kit(folder.kit, f"make it again: fedmira federation init {folder.path} --renew")
    name = read_federation(folder.settings).name
    with held(folder.path), _logging(folder.log):
        log_file = folder.log.with_name("engine.txt")
        with Supervisor(folder.kit, folder.admin, folder.job, name, log_file, inbox=folder.inbox) as link:
            server = Server(folder, link, tell, observer)
            server.members.gather()
            study = server.carry_out()
            server.members.goodbye()
        return study.path


def run_site(folder: SiteFolder, *, tell: Tell) -> None:
    """Serve the site's data to the federation until its study is complete.

    The base and the data are loaded once, in this process; it prints its number, which stays the same whatever happens
    to the engine's. Raises what open_site does, StoreError if the engine or the kit is missing.
    """
    check_installed()
    _check_kit(folder.kit, "copy the organiser's whole folder, or run 'fedmira federation site DIR --accept'")
    with held(folder.path), _logging(folder.log):
        site = open_site(folder)
        client = site.client
        tell(
            f"site {site.settings.name}: {len(client.train)} training, {len(client.validation)} validation, "
            f"{len(client.test)} test examples; base loaded by process {os.getpid()}"
        )
        worker = Worker(folder, site)
        place = channel.private_folder()
        listener = channel.listen(place / "s")
        threading.Thread(target=worker.serve, args=(listener,), daemon=True).start()
        process = site_process(folder.kit, site.settings.name, place / "s", folder.log.with_name("engine.txt"))
        process.start()
        try:
            _wait(worker, tell)
        finally:
            process.stop()
            listener.close()
            shutil.rmtree(place, ignore_errors=True)
        tell(f"the study is complete; the adapters are in {folder.adapters}")


def _wait(worker: Worker, tell: Tell) -> None:
    """Wait for the end of the study; show why the server does not take this site, if it does not."""
    shown = ""
    while not worker.ended.wait(0.5):
        if worker.refused != shown:
            shown = worker.refused
            tell(f"the server does not take this site: {shown}")


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
