"""Names of clients as people read, type and compare them; ids, which name folders, where a run has no other names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property

from fedmira.errors import StoreError

SHOWN_LETTERS = 60
LISTED = 8  # clients in an error

_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_MIDNIGHT = re.compile(r"(\d)[ t]00:00(?::00(?:\.0+)?)?(?:z|\+00:00)?$")
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_QUOTES = "\u2018\u2019\u201b\u02bc\u00b4`"
_SAME_SIGN = str.maketrans({**dict.fromkeys(_DASHES, "-"), **dict.fromkeys(_QUOTES, "'")})


def plain_line(name: str) -> str:
    """Return a name in printable characters, so that it cannot control a terminal or break a line; others become ?."""
    return "".join(
        letter if letter.isprintable() else " " if unicodedata.category(letter) == "Zs" else "?" for letter in name
    )


def writable(text: str, encoding: str | None) -> str:
    """Return a text as a stream of this encoding writes it: `\\u6771` for a letter that it does not have.

    A table must know this before it counts columns. None: the stream takes every letter.
    """
    return text if encoding is None else text.encode(encoding, "backslashreplace").decode(encoding)


def shown_name(name: str) -> str:
    """Return a name in a form that fits one line of an error."""
    plain = plain_line(name)
    return plain if len(plain) <= SHOWN_LETTERS else f"{plain[: SHOWN_LETTERS - 3]}..."


def spoken(name: str) -> str:
    """Return a form that is equal for two spellings that a person types for the same name.

    Upper and lower case, the forms of Unicode (composed or not, full width), and spaces at the ends or repeated make no
    difference.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(letter for letter in folded if unicodedata.category(letter) != "Cf").split())


def folded(name: str) -> str:
    """Return a form that is equal for two values that may be the same client, written in two ways.

    As `spoken`, and without any space; dashes and apostrophes of all kinds are equal; a whole number is equal with and
    without decimals and leading zeros (1, 1.0, 001), a date with and without midnight.
    """
    text = spoken(name).translate(_SAME_SIGN)
    text = re.sub(r"\s", "", _MIDNIGHT.sub(r"\1", text))
    if number := _WHOLE.fullmatch(text):
        sign, digits = number.groups()
        return digits if sign != "-" or digits == "0" else f"-{digits}"
    return text


def lookalikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of distinct names that have one `folded` form, in order of first appearance."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        groups.setdefault(folded(name), {})[name] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]


def told_apart(names: Sequence[str]) -> list[str]:
    """Return names as they can be shown side by side: letter by letter in ASCII where they would look the same."""
    shown = [shown_name(name) for name in names]
    visible = [unicodedata.normalize("NFC", name) for name in shown]
    return [
        name.encode("unicode_escape").decode() if visible.count(visible[index]) > 1 else shown[index]
        for index, name in enumerate(names)
    ]


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
        """Return the id, of these, of the client with that id or name; None if there is none: see `finder`."""
        return self.finder(client_ids)(wanted)

    def finder(self, client_ids: Iterable[str]) -> Callable[[str], str | None]:
        """Return a function that finds clients, of these, by id or name: text -> id, or None if there is none.

        Exactly the id or the name comes first; then a name that differs in case, form of Unicode or spaces only.
        The function raises StoreError naming the candidates if several clients may be meant.
        """
        ids = list(client_ids)
        exact: dict[str, dict[str, None]] = {}
        for client_id in ids:
            for text in (client_id, self.name(client_id)):
                exact.setdefault(text, {})[client_id] = None

        @cache
        def alike() -> Mapping[str, Mapping[str, None]]:
            forms: dict[str, dict[str, None]] = {}
            for client_id in ids:
                for text in (client_id, self.name(client_id), self.shown(client_id)):
                    forms.setdefault(spoken(text), {})[client_id] = None
            forms.pop("", None)
            return forms

        def find(wanted: str) -> str | None:
            matches = list(exact.get(wanted) or alike().get(spoken(wanted)) or ())
            if len(matches) > 1:
                raise StoreError(
                    f"client '{shown_name(wanted)}' may be one of {len(matches)}: {self.listed(matches)}; give the id "
                    "in brackets, or the name exactly as it is in the data"
                )
            return matches[0] if matches else None

        return find

    def near(self, wanted: str, client_ids: Iterable[str]) -> str:
        """Return " (did you mean ...?)" for the client whose name or id is most like a text, or an empty string."""
        forms = {spoken(text): client_id for client_id in client_ids for text in (client_id, self.name(client_id))}
        match = get_close_matches(spoken(wanted), list(forms), n=1, cutoff=0.6)
        return f" (did you mean {self.shown(forms[match[0]])}?)" if match else ""


ONLY_IDS = ClientNames({})  # of clients that have no other names
