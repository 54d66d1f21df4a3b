"""Ids and names of a run's clients: ids name folders, people read and type names. clients.json has both."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from fedmira.data.names import plain_line, shown_name, spoken
from fedmira.disk.files import read_json
from fedmira.errors import StoreError

LISTED = 8  # clients in an error

_FORMULA = re.compile("'*[=+@\\-\uff1d\uff0b\uff20\uff0d]")


@dataclass(frozen=True)
class ClientNames:
    """The clients of a run. by_id: id -> name in the data, for every client."""

    by_id: Mapping[str, str]

    def name(self, client_id: str) -> str:
        """Return a client's name; its id where the run has no other."""
        return self.by_id.get(client_id, client_id)

    def shown(self, client_id: str) -> str:
        """Return a client's name for one line of text, with the id where it differs: `Charité (Charit--32dd02a2)`."""
        name = self.name(client_id)
        return client_id if name == client_id else f"{shown_name(name)} ({client_id})"

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """Each id's name for tables and pages; with the id only where two clients' names would look the same."""
        looks = {
            client_id: " ".join(unicodedata.normalize("NFC", plain_line(name)).split())
            for client_id, name in self.by_id.items()
        }
        count = Counter(looks.values())
        alike = {client_id for client_id, look in looks.items() if count[look] > 1}
        return {
            client_id: f"{name} ({client_id})" if client_id in alike and name != client_id else name
            for client_id, name in self.by_id.items()
        }

    def listed(self, client_ids: Iterable[str]) -> str:
        """List clients for an error, at most LISTED of them; an empty string if there are none."""
        ids = sorted(client_ids)
        return ", ".join(map(self.shown, ids[:LISTED])) + (", ..." if len(ids) > LISTED else "")

    def find(self, wanted: str, client_ids: Iterable[str]) -> str | None:
        """Return the id, of these, of the client with that id or name; None if there is none.

        Exactly the id or the name comes first; then a name that differs in case, form of Unicode or spaces only.
        Raises StoreError naming the candidates if several clients may be meant.
        """
        ids = list(client_ids)
        matches = [client_id for client_id in ids if wanted in (client_id, self.name(client_id))]
        if not matches:
            form = spoken(wanted)
            matches = [
                client_id
                for client_id in ids
                if form and form in (spoken(client_id), spoken(self.name(client_id)), spoken(self.shown(client_id)))
            ]
        if len(matches) > 1:
            raise StoreError(
                f"client '{shown_name(wanted)}' may be one of {len(matches)}: {self.listed(matches)}; give the id in "
                "brackets, or the name exactly as it is in the data"
            )
        return matches[0] if matches else None

    def near(self, wanted: str, client_ids: Iterable[str]) -> str:
        """Return " (did you mean ...?)" for the client whose name or id is most like a text, or an empty string."""
        forms = {spoken(text): client_id for client_id in client_ids for text in (client_id, self.name(client_id))}
        match = get_close_matches(spoken(wanted), list(forms), n=1, cutoff=0.6)
        return f" (did you mean {self.shown(forms[match[0]])}?)" if match else ""


def as_cell(name: str) -> str:
    """Return a name as a cell of CSV: one line, and text for a spreadsheet too, which runs what begins with = + - @."""
    plain = plain_line(name)
    return f"'{plain}" if _FORMULA.match(plain) else plain


def from_cell(cell: str) -> str:
    """Return the name that `as_cell` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_client_names(run: Path) -> ClientNames:
    """Read the names of a run's clients; none if the folder has no clients.json. Raises StoreError if it is damaged."""
    path = run / "clients.json"
    stored = read_json(path) if path.is_file() else {}
    if not isinstance(stored, dict):
        raise StoreError(f"'{path}' holds a {type(stored).__name__}: clients.json is an object; restore it from a copy")
    return ClientNames(
        {
            client_id: str(facts.get("name", client_id)) if isinstance(facts, dict) else client_id
            for client_id, facts in stored.items()
        }
    )
