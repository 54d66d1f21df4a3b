"""Who takes part in a federation: the sites that have joined once, in that order, and what each said of itself.

Until all sites of federation.yaml have joined, the study waits. From then on the list in `server/cards/members.json`
only grows: a site that is added later joins the study where it is. One that is taken out of federation.yaml is no
longer asked for anything.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmira.deploy.channel import Data
from fedmira.deploy.folders import ServerFolder
from fedmira.deploy.joining import SiteCard, read_card, why_not
from fedmira.deploy.link import Failure, Link
from fedmira.deploy.settings import Agreement, FederationSettings, read_agreement, read_federation
from fedmira.deploy.wire import Frame, decode
from fedmira.disk.files import make_folder, read_json, write_json
from fedmira.errors import ConfigError, WireError

log = logging.getLogger(__name__)

HELLO_SECONDS = 60.0  # a site that says nothing in this time is asked again later
POLL_SECONDS = 0.5

Tell = Callable[[str], None]


@dataclass(eq=False)
class Members:
    """The members of one federation. names: in the order of joining; cards: what each said when it joined last."""

    folder: ServerFolder
    link: Link
    tell: Tell
    names: tuple[str, ...] = ()
    cards: dict[str, SiteCard] = field(default_factory=dict)
    _listed: FederationSettings | None = None
    _read_at: int = 0  # st_mtime_ns of federation.yaml when it was read
    _asked: dict[str, float] = field(default_factory=dict)
    _dismissed: set[str] = field(default_factory=set)  # members that are told that they are on the list no more

    @property
    def settings(self) -> FederationSettings:
        """federation.yaml as it is now; as it was, while what is there now cannot be read."""
        changed = self.folder.settings.stat().st_mtime_ns
        if self._listed is None or changed != self._read_at:
            try:
                self._listed = read_federation(self.folder.settings)
            except ConfigError as error:
                if self._listed is None:
                    raise
                log.warning("federation.yaml cannot be read, and what it said before holds: %s", error)
            self._read_at = changed
        return self._listed

    @property
    def agreement(self) -> Agreement:
        """What all agreed; a site that is added brings its rank."""
        return read_agreement(self.folder.agreement)

    @property
    def listed(self) -> Link:
        """The link to those members that are in federation.yaml."""
        return ListedLink(self.link, lambda: frozenset(self.settings.sites))

    def gather(self) -> None:
        """Wait until every site has joined once, now or in an earlier run of the server, and one is connected."""
        make_folder(self.folder.cards)
        self.folder.told.unlink(missing_ok=True)
        self.names = self._stored_names()
        known = self.names or self.settings.sites
        self.cards = {name: card for name in known if (card := self._stored_card(name)) is not None}
        shown: set[str] | None = None
        while True:
            wanted = self.names or tuple(self.settings.sites)
            there = self.link.sites & frozenset(wanted)
            self._greet_due(sorted(there))
            missing = set(wanted) - set(self.cards)
            if not missing and there:
                break
            if missing != shown:
                self.tell(f"waiting for {', '.join(sorted(missing)) or 'a site to connect'}")
                shown = missing
            time.sleep(POLL_SECONDS)
        if not self.names:
            self._keep(wanted)

    def arrivals(self) -> list[str]:
        """Greet sites that were added to federation.yaml since; return those that are connected and fit."""
        self._dismiss()
        new = [name for name in self.settings.sites if name not in self.names]
        if not new:
            return []
        self._greet_due([name for name in new if name in self.link.sites])
        return [name for name in new if name in self.cards]

    def admit(self, name: str) -> None:
        """Make a site that has arrived a member."""
        self._keep((*self.names, name))

    def refuse(self, name: str, reason: str) -> None:
        """Tell a site that has arrived why it cannot take part."""
        self.cards.pop(name, None)
        self.tell(f"site {name} cannot take part: {reason}")
        log.warning("site '%s' cannot take part: %s", name, reason)
        self._call({name: order("refused", reason=reason)})

    def _dismiss(self) -> None:
        """Tell members that were taken out of federation.yaml, once."""
        listed = set(self.settings.sites)
        self._dismissed -= listed
        for name in sorted((self.link.sites & set(self.names)) - listed - self._dismissed):
            self._dismissed.add(name)
            self.tell(f"site {name} is not in federation.yaml any more: it is asked for nothing")
            self._call({name: order("refused", reason="its organiser has taken it out of the federation")})

    def goodbye(self) -> None:
        """Tell the sites that are there that the study is complete; say who does not know it."""
        away = self._tell_end(untold(self.folder, self.settings.sites))
        if away:
            self.tell(
                f"{', '.join(away)} could not be told that the study is complete; start the server again to tell it"
            )

    def part(self) -> None:
        """Wait until every site knows that the study is complete."""
        shown: list[str] = []
        while away := self._tell_end(untold(self.folder, self.settings.sites)):
            if away != shown:
                self.tell(f"the study is complete; waiting for {', '.join(away)} to say so (Ctrl-C: do not wait)")
                shown = away
            time.sleep(POLL_SECONDS)

    def _tell_end(self, names: Sequence[str]) -> list[str]:
        """Tell those of the sites that are there that the study is complete; return the others."""
        heard = self._call({name: order("end") for name in names if name in self.link.sites})
        if heard:
            known = read_json(self.folder.told) if self.folder.told.is_file() else []
            write_json(self.folder.told, sorted({*known, *heard}))
        return [name for name in names if name not in heard]

    def _call(self, frames: Mapping[str, bytes]) -> set[str]:
        """Send orders whose answers say nothing; return the sites that answered."""
        return {name for name, answer in self.link.call(frames, HELLO_SECONDS) if not isinstance(answer, Failure)}

    def _greet_due(self, names: Sequence[str]) -> None:
        """Ask sites for their cards, each at most once in a while."""
        now = time.monotonic()
        due = [name for name in names if now - self._asked.get(name, -math.inf) >= HELLO_SECONDS]
        for name, answer in self.link.call({name: order("hello") for name in due}, HELLO_SECONDS):
            self._asked[name] = time.monotonic()
            found = self._card_in(answer, name)
            if isinstance(found, str):
                self.refuse(name, found)
                continue
            self.cards[name] = found
            write_json(self.folder.cards / f"{name}.json", asdict(found))
            self.tell(f"site {name} has joined: {found.examples['train']} training examples")

    def _card_in(self, answer: Data | Failure, name: str) -> SiteCard | str:
        """Return the card in an answer, or why the site cannot take part."""
        if isinstance(answer, Failure):
            return f"no answer ({answer.kind})"
        try:
            card = read_card(decode(answer).header.get("card"))
        except WireError as error:
            return str(error)
        return why_not(card, name, self.agreement) or card

    def _stored_card(self, name: str) -> SiteCard | None:
        path = self.folder.cards / f"{name}.json"
        if not path.is_file():
            return None
        card = read_card(read_json(path))
        return card if why_not(card, name, self.agreement) is None else None

    def _stored_names(self) -> tuple[str, ...]:
        return tuple(read_json(self.folder.members)) if self.folder.members.is_file() else ()

    def _keep(self, names: Sequence[str]) -> None:
        write_json(self.folder.members, list(names))
        self.names = tuple(names)


@dataclass(frozen=True)
class ListedLink:
    """A link that asks only sites that are on a list, which may change."""

    link: Link
    listed: Callable[[], frozenset[str]]

    @property
    def sites(self) -> frozenset[str]:
        return self.link.sites & self.listed()

    def call(self, frames: Mapping[str, Data], seconds: float) -> Iterator[tuple[str, Data | Failure]]:
        listed = self.listed()
        for name in frames:
            if name not in listed:
                yield name, Failure("unlisted")
        yield from self.link.call(_Some(frames, [name for name in frames if name in listed]), seconds)


@dataclass(frozen=True)
class _Some(Mapping[str, Data]):
    """Some of a mapping's frames, which are made when they are looked up."""

    frames: Mapping[str, Data]
    names: Sequence[str]

    def __getitem__(self, name: str) -> Data:
        return self.frames[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def untold(folder: ServerFolder, names: Sequence[str]) -> list[str]:
    """Return those of the sites that do not know yet that the study is complete."""
    known = read_json(folder.told) if folder.told.is_file() else []
    return [name for name in names if name not in known]


def order(what: str, **more: Any) -> bytes:
    """Return an order that is about no run."""
    header = {"order": what, "run_id": "", "round": 0, "learning_rate": 0.0, "counted": 0, **more}
    return Frame({**header, "nonce": secrets.token_hex(8)}).encode()
