"""Names of clients as people read and compare them: on one line, and which ones a reader takes for the same."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

SHOWN_LETTERS = 60

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
