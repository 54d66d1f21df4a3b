"""Certificates and kits of NVFlare: an authority, requests, signatures, and kits that run FedMira's classes alone.

A party's kit is made in three steps, the same for each party: a request, made where its private key is to be; a
signature of the authority; and the kit, packed beside the key. A site whose key is made at the server takes all three
steps there. Certificates last three years, the authority's ten.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from fedmira.config.yaml_text import dump_yaml
from fedmira.deploy.settings import ServerAddress
from fedmira.disk.files import FILE_MODE, FOLDER_MODE, make_folder, read_json, write_atomic, write_json
from fedmira.errors import ConfigError, StoreError

ADMIN = "server@fedmira.org"  # who submits jobs; NVFlare needs the form of an e-mail address, nothing is sent to it
ORGANISATION = "fedmira"  # of every certificate; no permission depends on it
ALLOWED_CLASSES = ("nvflare.collab.runtime.", "fedmira.deploy.nvflare.relay.")  # prefixes of what a job may name
SHARED_STATE = "/tmp/nvflare/"  # NVFlare's own place for jobs and snapshots, which all users of a machine share
PROFILE = "profile.yml"
SIGNED = "kit.signed.zip"  # NVFlare packs only what has this ending
REQUEST_BYTES = 1_000_000  # of a request, at most; it has less than 3,000

# Of each role of a certificate. Only `lead` is given to anyone: to the server, for its own jobs.
ROLES: Mapping[str, Mapping[str, str]] = {
    "lead": {
        **dict.fromkeys(("submit_job", "manage_job", "view", "operate"), "any"),
        **dict.fromkeys(("byoc", "clone_job", "download_job", "shell_commands"), "none"),
    },
    **{role: {"byoc": "none"} for role in ("project_admin", "org_admin", "member")},
}


@dataclass(frozen=True)
class Party:
    """Who gets a kit. name: of a server its host."""

    name: str
    kind: Literal["server", "client", "admin"]


@dataclass(frozen=True)
class Request:
    """What a request for a certificate says. digest: sha256 of the file, to be compared over the telephone."""

    federation: str
    name: str
    kind: str
    digest: str


def check_installed() -> None:
    """Raise ConfigError if NVFlare is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise ConfigError(
            ["this command needs NVFlare, which is not installed: pip install 'fedmira[deploy]'"], "federation"
        )


def make_authority(folder: Path, *, federation: str, server: ServerAddress, encrypted: bool) -> str:
    """Make an authority in a new folder; return the fingerprint of its root certificate, SHA256:AA:BB:...

    encrypted: kits that it signs connect by mutual TLS. Raises StoreError if NVFlare refuses.
    """
    make_folder(folder)
    profile = {
        "name": federation,
        "scheme": "grpc",
        "connection_security": "mtls" if encrypted else "clear",
        "server": {"host": server.host, "fed_learn_port": server.port, "admin_port": server.port},
    }
    write_atomic(folder / PROFILE, dump_yaml(profile).encode())
    _run([["cert", "init", "--profile", folder / PROFILE, "--output-dir", folder]])
    facts = read_json(folder / "ca.json")
    write_json(folder / "ca.json", {**facts, "project_profile": PROFILE})  # a folder may be moved
    close_folder(folder)
    return fingerprint_of(folder)


def fingerprint_of(authority: Path) -> str:
    """Return the fingerprint of the authority's root certificate. Raises StoreError if the folder is damaged."""
    facts = read_json(authority / "ca.json")
    try:
        return str(facts["rootCA_fingerprint"])
    except (KeyError, TypeError):
        raise StoreError(f"'{authority / 'ca.json'}' is damaged: restore the folder from its backup") from None


def address_of(kit: Path) -> tuple[str, int]:
    """Return where the kit of a server listens, or that of a site connects to. Raises StoreError if it is damaged."""
    path = next((kit / "startup").glob("fed_[cs]*.json"), kit / "startup" / "fed_client.json")
    try:
        host, _, port = read_json(path)["servers"][0]["service"]["target"].rpartition(":")
        return host, int(port)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise StoreError(f"'{path}' is damaged: restore the folder, or ask for a new one") from None


def make_kits(authority: Path, kits: Mapping[Path, Party], *, federation: str) -> None:
    """Make the kit of each party in a new folder, private keys included; `harden` is still to be called.

    Requests and signatures are made beside the authority and removed. Raises StoreError if NVFlare refuses.
    """
    profile, fingerprint = authority / PROFILE, fingerprint_of(authority)
    with scratch(authority.parent) as fresh:
        commands: list[Sequence[str | Path]] = []
        packed: dict[Path, Path] = {}
        for place, (kit, party) in enumerate(kits.items()):
            work = fresh / str(place)
            work.mkdir(mode=FOLDER_MODE)
            commands += [
                _request_command(work / "request", work / "party.yml", federation, party),
                _sign_command(authority, work / "request" / _request_name(party.name), work / SIGNED, profile),
                _pack_command(work / SIGNED, work / "request", work / "packed", fingerprint),
            ]
            packed[kit] = work / "packed"
        _run(commands)
        for kit, folder in packed.items():
            make_folder(kit.parent)
            _only_kit(folder).rename(kit)


def make_request(folder: Path, *, federation: str, site: str) -> Path:
    """Make a site's key and request in a folder, in place of older ones; return the request, NAME.request.zip.

    The key stays in the folder; the request does not have it. Raises StoreError if NVFlare refuses.
    """
    with scratch(folder.parent) as fresh:
        built = fresh / "request"
        _run([_request_command(built, fresh / "party.yml", federation, Party(site, "client"))])
        close_folder(built)
        put(built, folder, fresh)
    return folder / _request_name(site)


def read_request(path: Path) -> Request:
    """Read what a request says; its signature is checked when it is signed. Raises StoreError if it is not one."""
    try:
        if path.stat().st_size > REQUEST_BYTES:
            raise ValueError("too large")
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("request.json").file_size > REQUEST_BYTES:
                raise ValueError("too large")
            facts = json.loads(archive.read("request.json"))
        kind = facts["kind"] if facts["kind"] != "site" else facts["cert_type"]
        return Request(str(facts["project"]), str(facts["name"]), str(kind), sha256(content).hexdigest())
    except OSError as error:
        raise StoreError(f"'{path}' cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"'{path}' is not a request for a certificate ({type(error).__name__}): a site makes one, "
            "NAME.request.zip; copy it again as a binary file"
        ) from None


def name_in_signed(path: Path) -> str:
    """Return for whom a request was signed. Raises StoreError if the file is not a signed request."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("signed.json").file_size > REQUEST_BYTES:
                raise ValueError("too large")
            return str(json.loads(archive.read("signed.json"))["name"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"'{path}' is not a signed request ({type(error).__name__}): the organiser makes one, NAME.signed.zip; "
            "copy it again as a binary file"
        ) from None


def sign_request(authority: Path, request: Path, signed: Path) -> None:
    """Sign a request into `signed`, replacing an earlier one. Raises StoreError if NVFlare refuses.

    NVFlare signs whatever role a request names: look at `read_request` first.
    """
    _run([[*_sign_command(authority, request, signed, authority / PROFILE), "--force"]])


def pack_kit(signed: Path, *, request: Path, kit: Path, fingerprint: str) -> None:
    """Make a hardened kit, or replace one, from a signed request and the folder of the request, which has the key.

    fingerprint: of the authority that must have signed. Raises StoreError if NVFlare refuses.
    """
    with scratch(kit.parent) as fresh:
        shutil.copyfile(signed, fresh / SIGNED)
        _run([_pack_command(fresh / SIGNED, request, fresh / "packed", fingerprint)])
        built = _only_kit(fresh / "packed")
        harden(built, at=kit)
        put(built, kit, fresh)


def put(built: Path, place: Path, fresh: Path) -> None:
    """Put a folder that was built in a scratch folder in its place; what was there goes with the scratch folder."""
    if place.exists():
        place.rename(fresh / f"old-{place.name}")
    built.rename(place)


def harden(kit: Path, *, at: Path | None = None) -> None:
    """Let a kit run only FedMira's classes, send no log, and write only below itself; its owner alone reads it.

    Written anew from NVFlare's defaults, and the same each time: a kit that was moved is mended by this. at: where the
    kit will be, if not where it is; the server's settings name that folder. Raises StoreError if it is not a kit.
    """
    local = kit / "local"
    resources: dict[str, Any] = read_json(local / "resources.json.default")
    if "components" in resources:  # of a server or a site; the admin's runs no jobs
        state = f"{(at or kit).resolve()}/state/"
        resources |= {
            "class_list_enforcement_mode": "enforce",
            "class_allow_list": list(ALLOWED_CLASSES),
            "allow_log_streaming": False,
            "components": [part for part in resources["components"] if ".logging." not in part["path"]],
        }
        write_json(local / "resources.json", _moved(resources, state))
        roles = {"format_version": "1.0", "permissions": ROLES}
        write_json(local / "authorization.json", roles)
        (kit / "state").mkdir(mode=FOLDER_MODE, exist_ok=True)
    (kit / "transfer").mkdir(mode=FOLDER_MODE, exist_ok=True)
    close_folder(kit)


def close_folder(folder: Path) -> None:
    """Let only the owner read a folder and all inside it; what could be executed by someone still can by its owner."""
    folder.chmod(FOLDER_MODE)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(FOLDER_MODE if path.is_dir() or path.stat().st_mode & 0o100 else FILE_MODE)


def _moved(value: Any, state: str) -> Any:
    """Return settings with every path below SHARED_STATE moved below `state`."""
    if isinstance(value, dict):
        return {key: _moved(inner, state) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, state) for inner in value]
    return value.replace(SHARED_STATE, state) if isinstance(value, str) else value


def _request_name(name: str) -> str:
    return f"{name}.request.zip"


def _request_command(folder: Path, definition: Path, federation: str, party: Party) -> list[str | Path]:
    """Write the definition that NVFlare reads; return the command that makes key and request."""
    entry = {"name": party.name, "type": party.kind, "org": ORGANISATION}
    if party.kind == "admin":
        entry["role"] = "lead"
    write_atomic(definition, dump_yaml({"name": federation, "participants": [entry]}).encode())
    return ["cert", "request", "--participant", definition, "--out", folder]


def _sign_command(authority: Path, request: Path, signed: Path, profile: Path) -> list[str | Path]:
    return ["cert", "approve", request, "--ca-dir", authority, "--profile", profile, "--out", signed]


def _pack_command(signed: Path, request: Path, folder: Path, fingerprint: str) -> list[str | Path]:
    return [
        *("package", signed, "--request-dir", request, "--workspace", folder),
        f"--fingerprint={fingerprint}",
    ]


def _only_kit(folder: Path) -> Path:
    """Return the kit that NVFlare packed: WORKSPACE/FEDERATION/prod_00/NAME."""
    kits = [path.parent for path in folder.glob("*/prod_*/*/startup")]
    if len(kits) != 1:
        raise StoreError(
            f"NVFlare packed {len(kits)} kits instead of 1; FedMira knows NVFlare 2.9, installed may be another"
        )
    return kits[0]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Give a private folder beside what is made, so that keys never leave the disk that they belong on; remove it."""
    make_folder(parent)
    fresh = Path(tempfile.mkdtemp(prefix=".kits.", suffix=".tmp", dir=parent.resolve()))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _run(commands: Sequence[Sequence[str | Path]]) -> None:
    """Run commands of NVFlare, with a home folder that is removed afterwards: it writes a record of each there.

    Raises StoreError with NVFlare's own message, ConfigError if it is not installed.
    """
    check_installed()
    words = [[str(word.absolute()) if isinstance(word, Path) else word for word in command] for command in commands]
    with tempfile.TemporaryDirectory(prefix="fedmira-") as home:
        done = subprocess.run(
            [sys.executable, "-m", "fedmira.deploy.nvflare.kit_program", json.dumps(words)],
            env={**os.environ, "HOME": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        raise StoreError(
            f"NVFlare refused: {_last_message(done.stdout) or f'its process ended with {done.returncode}'}"
        )


def _last_message(output: str) -> str:
    """Return the message of the last answer, a line of JSON; an empty string if there is none."""
    for line in reversed(output.splitlines()):
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict) and "message" in answer:
            return str(answer["message"])
    return ""
