"""Ids and names of a run's clients on disk: clients.json has both, and cells of CSV have names."""

import re
from pathlib import Path

from fedmira.disk.files import read_json
from fedmira.errors import StoreError
from fedmira.names import ClientNames, plain_line

_FORMULA = re.compile("'*[=+@\\-\uff1d\uff0b\uff20\uff0d]")


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
