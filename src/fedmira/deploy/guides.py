"""The texts of a federation's folder: commented settings, and what each party does in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml

from fedmira.config.sections import Config
from fedmira.config.yaml_text import Dumper
from fedmira.deploy.settings import Agreement, FederationSettings

_SITES = "Sites: "  # begins the paragraph of the server's page that names them
_TEXTS = Path(__file__).parent / "texts"


def write_federation(settings: FederationSettings) -> str:
    """Return federation.yaml, with comments."""
    return _fill("federation.yaml", settings=settings)


def write_site(name: str, config: Config) -> str:
    """Return site.yaml, with every key and its meaning; how data is read is filled in as in the study."""
    elsewhere = config.model.base_model.startswith("/")
    return _fill("site.yaml", name=name, data=config.data, elsewhere=elsewhere, base_model=config.model.base_model)


def write_site_guide(name: str, settings: FederationSettings, agreement: Agreement, *, own_key: bool) -> str:
    """Return README.md of a site: what to do in which order, its network, what leaves it."""
    return _fill("site.md", name=name, settings=settings, agreement=agreement, own_key=own_key)


def write_server_guide(settings: FederationSettings, fingerprint: str, *, own_keys: bool) -> str:
    """Return README.md of the server's folder: what is sent to whom by which channel, and what comes next."""
    return _fill("server.md", settings=settings, fingerprint=fingerprint, own_keys=own_keys)


def list_sites(page: str, settings: FederationSettings, *, own_keys: bool) -> str:
    """Return the server's page with the sites of now, and with what a new one gets; other lines stay as they are."""
    fresh = write_server_guide(settings, "", own_keys=own_keys).split("\n\n")
    sites = next(part for part in fresh if part.startswith(_SITES))
    sent = fresh[fresh.index("## Send") + 1 : fresh.index(sites)]
    parts = page.split("\n\n")
    place = next((number for number, part in enumerate(parts) if part.startswith(_SITES)), None)
    if place is None:  # its owner has written it anew
        return page
    if sent[0] not in parts:
        sent.insert(0, f"Sites that were added with{'' if own_keys else 'out'} `--own-keys`:")
        parts[place:place] = sent
        place += len(sent)
    return "\n\n".join([*parts[:place], sites, *parts[place + 1 :]])


def _fill(template: str, **values: Any) -> str:
    texts = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEXTS),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return texts.get_template(template).render(yaml=_on_one_line, **values)


def _on_one_line(value: Any) -> str:
    """Write a value as YAML on one line."""
    return yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=1e9).strip()[1:-1]
