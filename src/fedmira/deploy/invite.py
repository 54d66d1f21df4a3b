"""Found a federation, add a site to it, renew the server's certificates, and sign those of sites with their own keys.

A folder is built beside the place where it will be and renamed when it is complete: an interrupted command leaves
nothing. What is refused is refused before anything is written.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmira.config.edits import set_value
from fedmira.config.sections import Config
from fedmira.config.yaml_text import dump_config, read_config
from fedmira.deploy import guides
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.nvflare import kits
from fedmira.deploy.settings import (
    NAME,
    Agreement,
    FederationSettings,
    check,
    read_agreement,
    read_federation,
)
from fedmira.disk.files import FOLDER_MODE, make_folder, write_atomic, write_json
from fedmira.disk.folders import held
from fedmira.errors import ConfigError, StoreError, nearest

if TYPE_CHECKING:
    from fedmira.deploy.terms import Terms

LEAST_SITES = 2


@dataclass(frozen=True)
class Invitation:
    """What was made. sites: those that are new, name -> folder to send. fingerprint: of the root certificate."""

    folder: Path
    settings: FederationSettings
    sites: Mapping[str, Path]
    fingerprint: str
    notes: Sequence[str]
    own_keys: bool


@dataclass(frozen=True)
class Signed:
    """A signed request. path: what is sent back. digest: sha256 of the request, which the site should confirm."""

    site: str
    path: Path
    digest: str
    fingerprint: str


def describe_federation(
    folder: Path, *, server: str, sites: Sequence[str], name: str | None = None, **others: Any
) -> FederationSettings:
    """Check what a federation is to be. server: HOST or HOST:PORT. name: None = that of the folder.

    others: keys of federation.yaml that are not None. Raises ConfigError that lists every fault.
    """
    named = re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name).strip("-_")[:64] or "federation"
    given = {key: value for key, value in others.items() if value is not None}
    raw = {"name": name or named, "server": _address(server), "sites": list(sites), **given}
    settings = check(raw, FederationSettings, "federation")
    if len(settings.sites) < LEAST_SITES:
        raise ConfigError(
            [f"sites: found {len(settings.sites)}; a federation needs at least {LEAST_SITES}: --sites A,B"],
            "federation",
        )
    return settings


def check_free(folder: Path) -> None:
    """Raise StoreError if a federation cannot be founded in a folder, since something is there."""
    if (folder / "federation.yaml").is_file():
        raise StoreError(
            f"'{folder}' is a federation already; choose another folder, or add a site: fedmira federation init "
            f"{folder} --add-site NAME"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"'{folder}' is not an empty folder; choose another")


def found(folder: Path, config: Config, settings: FederationSettings, *, own_keys: bool) -> Invitation:
    """Make a federation in a new folder: authority, kits, and a folder to send to each site.

    Raises ConfigError, ModelError or StoreError before anything is there.
    """
    check_free(folder)
    kits.check_installed()
    from fedmira.deploy.terms import settle  # with torch

    terms = settle(config, federation=settings.name, sites=settings.sites)
    target = folder.resolve()
    with _new_folder(target) as built:
        server = ServerFolder(built)
        fingerprint = kits.make_authority(
            server.authority, federation=settings.name, server=settings.server, encrypted=settings.tls == "mutual"
        )
        parties = _own_parties(server.kit, server.admin, settings)
        if not own_keys:
            parties |= {server.site(site).kit: kits.Party(site, "client") for site in settings.sites}
        kits.make_kits(server.authority, parties, federation=settings.name)
        for kit in parties:
            kits.harden(kit, at=target / kit.relative_to(built))
        write_json(server.agreement, terms.agreement.as_json())
        write_atomic(server.study_config, dump_config(terms.config).encode())
        guide = guides.write_server_guide(settings, fingerprint, own_keys=own_keys)
        write_atomic(built / "README.md", guide.encode())
        for site in settings.sites:
            _write_site(server.site(site), site, settings, terms.config, terms.agreement, own_key=own_keys)
        write_atomic(server.settings, guides.write_federation(settings).encode())
    return _invitation(target, settings, settings.sites, fingerprint, terms, own_keys)


def add_site(folder: Path, name: str, *, own_keys: bool) -> Invitation:
    """Add a site to a federation: its folder, its rank in the agreement, its name in federation.yaml.

    Raises ConfigError if the name or its rank does not fit, StoreError if this is not a federation.
    """
    target = folder.resolve()
    server = ServerFolder(target)
    before, agreement = read_federation(server.settings), read_agreement(server.agreement)
    raw = before.model_dump(mode="json")
    settings = check({**raw, "sites": [*before.sites, name]}, FederationSettings, "--add-site")
    kits.check_installed()
    from fedmira.study.loading import load_config

    config = load_config(server.study_config)
    rank = _rank_of_new(config, agreement, name)
    grown = Agreement(**{**agreement.as_json(), "ranks": {**agreement.ranks, name: rank}})
    site = server.site(name)
    if (server.cards / f"{name}.json").is_file() or site.state.exists():
        raise ConfigError(
            [f"'{name}' has taken part in this federation: write it into `sites` of {server.settings} again"],
            "--add-site",
        )
    shutil.rmtree(site.path, ignore_errors=True)  # of a command that was interrupted: the name was not in the list
    with _new_folder(site.path) as built:
        if not own_keys:
            kit = SiteFolder(built).kit
            kits.make_kits(server.authority, {kit: kits.Party(name, "client")}, federation=settings.name)
            kits.harden(kit, at=site.kit)
        _write_site(SiteFolder(built), name, settings, config, grown, own_key=own_keys)
    write_json(server.agreement, grown.as_json())
    text = set_value(server.settings.read_text(encoding="utf-8"), ["sites"], list(settings.sites))
    write_atomic(server.settings, text.encode())
    guide = target / "README.md"
    if guide.is_file():
        new = guides.list_sites(guide.read_text(encoding="utf-8"), settings, own_keys=own_keys)
        write_atomic(guide, new.encode())
    return _invitation(target, settings, [name], kits.fingerprint_of(server.authority), None, own_keys)


def renew(folder: Path) -> Path:
    """Give a federation's server new keys and certificates of the same authority; return its kit. Sites keep theirs.

    Raises StoreError if the server is running, or this is not a federation.
    """
    server = ServerFolder(folder.resolve())
    settings = read_federation(server.settings)
    with held(server.path), kits.scratch(server.kit.parent) as fresh:
        parties = _own_parties(fresh / "kit", fresh / "admin", settings)
        kits.make_kits(server.authority, parties, federation=settings.name)
        for place in (server.kit, server.admin):
            kits.harden(fresh / place.name, at=place)
            kits.put(fresh / place.name, place, fresh)
    return server.kit


def _own_parties(kit: Path, admin: Path, settings: FederationSettings) -> dict[Path, kits.Party]:
    """Return the two kits that stay at the server."""
    return {kit: kits.Party(settings.server.host, "server"), admin: kits.Party(kits.ADMIN, "admin")}


def sign(folder: Path, request: Path) -> Signed:
    """Sign the request of a site of this federation; write sites/NAME.signed.zip, replacing an earlier one.

    Raises StoreError if it is not a request, ConfigError if it is for another name, role or federation.
    """
    server = ServerFolder(folder.resolve())
    settings = read_federation(server.settings)
    asked = kits.read_request(request)
    if asked.federation != settings.name:
        fault = f"it is for the federation '{asked.federation}'; this is '{settings.name}'"
    elif asked.kind != "client":
        fault = f"it asks for a certificate of a {asked.kind}; a site gets that of a client only"
    elif asked.name not in settings.sites:
        fault = (
            f"'{asked.name}' is not a site of this federation{nearest(asked.name, settings.sites)}: "
            f"{', '.join(settings.sites)}; add one with --add-site"
        )
    else:
        signed = target_of(server, asked.name)
        kits.sign_request(server.authority, request, signed)
        return Signed(asked.name, signed, asked.digest, kits.fingerprint_of(server.authority))
    raise ConfigError([fault], str(request))


def target_of(server: ServerFolder, site: str) -> Path:
    """Return where the signed request of a site is written: beside the folder that was sent to it."""
    return server.path / "sites" / f"{site}.signed.zip"


def make_request(folder: Path) -> Path:
    """Make a site's key and its request in the site's folder; return the request, to be sent to the organiser.

    A request that waits for its answer is returned as it is. With a kit, a new key is made: this renews a certificate.
    Raises ConfigError or StoreError if this is not the folder of a site.
    """
    site = SiteFolder(folder.resolve())
    name, agreement = _site_name(site), read_agreement(site.agreement)
    waiting = site.request / f"{name}.request.zip"
    if waiting.is_file() and not site.kit.exists():
        return waiting
    kits.make_request(site.request, federation=agreement.federation, site=name)
    return waiting


def accept(folder: Path, signed: Path, fingerprint: str) -> Path:
    """Make a site's kit of what the organiser sent back and the key that is here; return the kit.

    fingerprint: of the root certificate, as the organiser says it by another channel. Raises StoreError if the file is
    signed by another authority or is for another request.
    """
    site = SiteFolder(folder.resolve())
    name = _site_name(site)
    if not (site.request / f"{name}.key").is_file():
        raise StoreError(f"'{site.request}' has no key: make one with fedmira federation site {folder} --request")
    if not signed.is_file():
        raise StoreError(f"no such file: '{signed}'")
    if (other := kits.name_in_signed(signed)) != name:
        raise StoreError(
            f"'{signed}' is signed for '{other}', and this is the site '{name}': ask for {name}.signed.zip"
        )
    kits.pack_kit(signed, request=site.request, kit=site.kit, fingerprint=fingerprint)
    return site.kit


def _address(text: str) -> dict[str, Any]:
    """Split HOST or HOST:PORT. Raises ConfigError if the port is not a number."""
    host, colon, port = text.partition(":")
    if not colon:
        return {"host": host}
    if not (port.isascii() and port.isdecimal()):
        raise ConfigError(
            [f"server: found '{text}'; should be HOST or HOST:PORT, such as hub.example.org:8002"], "federation"
        )
    return {"host": host, "port": int(port)}


def _site_name(site: SiteFolder) -> str:
    """Return the name in site.yaml, which may not be filled in yet."""
    name = read_config(site.settings).get("name")
    if not (isinstance(name, str) and re.fullmatch(NAME, name)):
        raise ConfigError([f"name: found {name!r}; should be the site's name as it was sent"], str(site.settings))
    return name


def _rank_of_new(config: Config, agreement: Agreement, name: str) -> Sequence[int] | int:
    """Return the rank of a site that joins later. Raises ConfigError if it has none, or needs a wider row."""
    if isinstance(config.lora.ranks, list):
        raise ConfigError(
            ["lora.ranks of the study lists a rank for each site, so none can be added; found a new federation"],
            "--add-site",
        )
    from fedmira.deploy.terms import ranks_of  # with torch

    modules = [module for module, _, _ in agreement.shapes]
    rank = ranks_of(config, [name], modules)[name]
    widest = [max(ranks) for ranks in zip(*(_each(known, modules) for known in agreement.ranks.values()), strict=True)]
    if any(new > most for new, most in zip(_each(rank, modules), widest, strict=True)):
        raise ConfigError(
            [
                f"'{name}': its rank, drawn from its name, would be {max(_each(rank, modules))}, above {max(widest)}, "
                "the largest that this federation's rows have room for; choose another name"
            ],
            "--add-site",
        )
    return rank


def _each(rank: Sequence[int] | int, modules: Sequence[str]) -> Sequence[int]:
    """Return a rank for each module."""
    return [rank] * len(modules) if isinstance(rank, int) else rank


def _write_site(
    site: SiteFolder, name: str, settings: FederationSettings, config: Config, agreement: Agreement, *, own_key: bool
) -> None:
    """Write what a site gets beside its kit."""
    make_folder(site.path)
    write_atomic(site.settings, guides.write_site(name, config).encode())
    write_atomic(site.study_config, dump_config(config).encode())
    write_json(site.agreement, agreement.as_json())
    guide = guides.write_site_guide(name, settings, agreement, own_key=own_key)
    write_atomic(site.path / "README.md", guide.encode())


def _invitation(
    folder: Path,
    settings: FederationSettings,
    new: Sequence[str],
    fingerprint: str,
    terms: Terms | None,
    own_keys: bool,
) -> Invitation:
    sites = {site: ServerFolder(folder).site(site).path for site in new}
    return Invitation(folder, settings, sites, fingerprint, () if terms is None else terms.notes, own_keys)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a private folder beside `target`, which becomes `target` at the end; on any error it is removed."""
    make_folder(target.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        scratch.chmod(FOLDER_MODE)
        yield scratch
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
