"""What a site knows of its server: whether it is there, and that the study is complete, also after a restart."""

import hashlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedmira.deploy.folders import SiteFolder
from fedmira.disk.files import read_json, write_json

FIRST_SECONDS = 20.0  # without a word of the server until that is said: at the start
LATER_SECONDS = 120.0  # and after it has asked something; others may be at work
LOOK_SECONDS = 30.0  # between looks
CONNECT_SECONDS = 3.0


@dataclass(eq=False)
class Attendance:
    """Says what a site waits for. address: of the server."""

    address: tuple[str, int]
    tell: Callable[[str], None]
    since: float = field(default_factory=time.monotonic)  # that the server has asked for nothing
    shown: str = ""
    _patience: float = FIRST_SECONDS

    def hear(self) -> None:
        """Note that the server has asked for something."""
        if self._patience == FIRST_SECONDS or self.shown:
            self.tell(f"the server at {self._place} is there")
        self.since, self.shown, self._patience = time.monotonic(), "", LATER_SECONDS

    def look(self) -> None:
        """Say what is missing, if nothing was heard for long; once, until it changes."""
        if time.monotonic() - self.since < self._patience:
            return
        found = self._describe()
        if found != self.shown:
            self.tell(found)
        self.shown, self.since = found, time.monotonic() + LOOK_SECONDS - self._patience

    def _describe(self) -> str:
        try:
            socket.create_connection(self.address, timeout=CONNECT_SECONDS).close()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            return (
                f"waiting for the server: nobody answers at {self._place} ({reason}); it may not be started yet, or "
                "have ended with the study: ask its organiser"
            )
        return (
            f"waiting: the server at {self._place} is there and asks this site for nothing; other sites may be missing "
            "or at work, or this site's folder is in use on another machine too"
        )

    @property
    def _place(self) -> str:
        host, port = self.address
        return f"{host}:{port}"


def mark_end(folder: SiteFolder) -> None:
    """Remember that the server has said that this study is complete."""
    write_json(folder.ended, {"time": datetime.now(UTC).isoformat(timespec="seconds"), "study": _study_of(folder)})


def has_ended(folder: SiteFolder) -> bool:
    """Has the server said that the study in this folder is complete? One that was changed since is another."""
    return folder.ended.is_file() and read_json(folder.ended).get("study") == _study_of(folder)


def _study_of(folder: SiteFolder) -> str:
    return hashlib.sha256(folder.study_config.read_bytes() + folder.agreement.read_bytes()).hexdigest()
