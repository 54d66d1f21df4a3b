"""The two long-running commands: a federation's server, and one site of it."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedmira.deploy import channel
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.nvflare.engine import Supervisor, site_process
from fedmira.deploy.nvflare.kits import check_installed
from fedmira.deploy.server import Server
from fedmira.deploy.settings import read_federation
from fedmira.deploy.site import open_site
from fedmira.deploy.worker import Worker
from fedmira.disk.files import FILE_MODE, NO_LINK, make_folder
from fedmira.engine.events import Observer
from fedmira.errors import StoreError

log = logging.getLogger(__name__)

LOCK = ".lock"
Tell = Callable[[str], None]


def run_server(folder: ServerFolder, *, tell: Tell, observer: Observer) -> Path:
    """Carry out a federation's study from where it is, and return its folder; the engine is started and stopped here.

    Raises StoreError if the engine is not installed, the kit is missing, or another server has the folder.
    """
    check_installed()
    _check_kit(folder.kit, "run 'fedmira federation init' again")
    name = read_federation(folder.settings).name
    with _held(folder.path), _logging(folder.log):
        with Supervisor(folder.kit, folder.admin, folder.job, name, folder.log.with_name("engine.txt")) as link:
            server = Server(folder, link, tell, observer)
            study = server.carry_out(server.gather())
            server.goodbye()
        return study.path


def run_site(folder: SiteFolder, *, tell: Tell) -> None:
    """Serve the site's data to the federation until its study is complete.

    The base and the data are loaded once, in this process; it prints its number, which stays the same whatever happens
    to the engine's. Raises what open_site does, StoreError if the engine or the kit is missing.
    """
    check_installed()
    _check_kit(folder.kit, "copy the organiser's whole folder, or run 'fedmira federation site DIR --accept'")
    with _held(folder.path), _logging(folder.log):
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
def _held(folder: Path) -> Iterator[None]:
    """Keep the folder to this process. Raises StoreError if another one has it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(f"'{folder}' is in use by another process: stop it, or wait until it has ended") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _logging(path: Path) -> Iterator[None]:
    """Send FedMira's log records to a file, readable by its owner only."""
    make_folder(path.parent)
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, FILE_MODE)
    handler = logging.StreamHandler(os.fdopen(opened, "a", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fedmira")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    quiet = logging.NullHandler()  # else what the engine's session warns of goes to the terminal
    logging.getLogger().addHandler(quiet)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(quiet)
        logger.removeHandler(handler)
        handler.close()
        handler.stream.close()
