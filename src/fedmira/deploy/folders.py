"""The folders of a federation: the server's, with a part to send to each site, and a site's own.

DIR/              federation.yaml study.yaml agreement.json README.md
DIR/ca/           the authority that signs certificates; stays here, and is backed up
DIR/server/       kit/ admin/ study/ cards/ told.json inbox/ job/ audit.jsonl log.txt
DIR/sites/NAME/   what is sent to a site, and all that a site writes:
                  site.yaml study.yaml agreement.json README.md kit/ state/ adapters/ ended.json audit.jsonl log.txt
"""

from dataclasses import dataclass
from pathlib import Path

from fedmira.errors import StoreError

FEDERATION, SITE, STUDY, AGREEMENT = "federation.yaml", "site.yaml", "study.yaml", "agreement.json"


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / FEDERATION

    @property
    def study_config(self) -> Path:
        return self.path / STUDY

    @property
    def agreement(self) -> Path:
        return self.path / AGREEMENT

    @property
    def authority(self) -> Path:
        return self.path / "ca"

    @property
    def kit(self) -> Path:
        """The engine's files of the server."""
        return self.path / "server" / "kit"

    @property
    def admin(self) -> Path:
        """The engine's files of whoever submits jobs: the server itself."""
        return self.path / "server" / "admin"

    @property
    def study(self) -> Path:
        """The study, as a simulation writes one."""
        return self.path / "server" / "study"

    @property
    def cards(self) -> Path:
        """What each site said of itself when it joined."""
        return self.path / "server" / "cards"

    @property
    def members(self) -> Path:
        """Names of the sites that take part, in the order in which they joined."""
        return self.cards / "members.json"

    @property
    def told(self) -> Path:
        """Names of the sites that know that the study is complete."""
        return self.path / "server" / "told.json"

    @property
    def inbox(self) -> Path:
        """Answers of the round under way, durable before they count."""
        return self.path / "server" / "inbox"

    @property
    def job(self) -> Path:
        return self.path / "server" / "job"

    @property
    def audit(self) -> Path:
        return self.path / "server" / "audit.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "server" / "log.txt"

    def site(self, name: str) -> "SiteFolder":
        """What is sent to a site."""
        return SiteFolder(self.path / "sites" / name)


@dataclass(frozen=True)
class SiteFolder:
    """A site's folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / SITE

    @property
    def study_config(self) -> Path:
        return self.path / STUDY

    @property
    def agreement(self) -> Path:
        return self.path / AGREEMENT

    @property
    def kit(self) -> Path:
        return self.path / "kit"

    @property
    def request(self) -> Path:
        """The site's own key and its request for a certificate, where it makes its key itself."""
        return self.path / "request"

    @property
    def state(self) -> Path:
        """What the site remembers of every run, durable before it answers."""
        return self.path / "state"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def ended(self) -> Path:
        """Of which study the server has said that it is complete."""
        return self.path / "ended.json"

    @property
    def audit(self) -> Path:
        """What left the site."""
        return self.path / "audit.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"


def open_server(path: Path) -> ServerFolder:
    """Return the folder of a server. Raises StoreError if it is not one."""
    found = open_folder(path)
    if isinstance(found, ServerFolder):
        return found
    raise StoreError(f"'{path}' is a site's folder; the server's has {FEDERATION}. For a site: fedmira federation site")


def open_site_folder(path: Path) -> SiteFolder:
    """Return the folder of a site. Raises StoreError if it is not one."""
    found = open_folder(path)
    if isinstance(found, SiteFolder):
        return found
    raise StoreError(f"'{path}' is the server's folder; a site's has {SITE}. For the server: fedmira federation server")


def open_folder(path: Path) -> ServerFolder | SiteFolder:
    """Return the folder of a server or of a site. Raises StoreError if it is neither."""
    if (path / FEDERATION).is_file():
        return ServerFolder(path.resolve())
    if (path / SITE).is_file():
        return SiteFolder(path.resolve())
    raise StoreError(
        f"'{path}' is not a federation's folder: it has neither {FEDERATION} (the server's, made by 'fedmira "
        f"federation init') nor {SITE} (a site's, sent by the server's organiser)"
    )
