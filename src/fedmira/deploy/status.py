"""How far a federation has come, read from a folder: nothing is started, and nobody is asked."""

from pathlib import Path
from typing import Any

from fedmira.deploy.attendance import has_ended
from fedmira.deploy.audit import read_audit
from fedmira.deploy.folders import ServerFolder, SiteFolder, open_folder
from fedmira.deploy.settings import read_federation, read_site
from fedmira.disk.files import read_json
from fedmira.disk.folders import StudyFolder


def describe(path: Path) -> dict[str, Any]:
    """Return facts by name. Raises StoreError if the folder is neither a server's nor a site's."""
    folder = open_folder(path)
    facts = _server(folder) if isinstance(folder, ServerFolder) else _site(folder)
    lines = list(read_audit(folder.audit))
    if lines:
        last = lines[-1]
        facts["last message"] = f"{last['time']}, {last['what']} of round {last['round']} to {last['to']}"
        facts["sent"] = f"{len(lines)} messages, {sum(line['bytes'] for line in lines)} bytes"
    return facts


def _server(folder: ServerFolder) -> dict[str, Any]:
    settings = read_federation(folder.settings)
    joined = sorted(path.stem for path in folder.cards.glob("*.json") if path.stem in settings.sites)
    facts: dict[str, Any] = {
        "federation": f"{settings.name}, at {settings.server.host}:{settings.server.port}",
        "joined": ", ".join(joined) or "no site yet",
    }
    members = read_json(folder.members) if folder.members.is_file() else []
    if gone := [name for name in members if name not in settings.sites]:
        facts["taken out"] = ", ".join(gone)
    if waiting := [name for name in settings.sites if name not in joined]:
        facts["never joined"] = ", ".join(waiting)
    if folder.study.is_dir():
        for run in StudyFolder(folder.study).runs():
            found, records = run.facts, run.records()
            heard = ", ".join(records[-1]["answered"]) if records else ""
            last = f"; the last with {heard}" if heard else ""
            facts[f"{found.label} seed {found.seed}"] = f"{found.state}, {len(records)} of {found.rounds} rounds{last}"
    return facts


def _site(folder: SiteFolder) -> dict[str, Any]:
    settings = read_site(folder.settings)
    facts: dict[str, Any] = {
        "site": settings.name,
        "metrics leave the site": "yes" if settings.share_metrics else "no",
    }
    if has_ended(folder):
        facts["study"] = "complete"
    for place in sorted(folder.state.glob("*/seed-*")):
        rounds = sorted(int(path.name.removeprefix("round-")) for path in place.glob("round-*"))
        facts[f"{place.parent.name} {place.name.replace('-', ' ')}"] = (
            f"trained in round {rounds[-1]}" if rounds else "begun"
        )
    return facts
