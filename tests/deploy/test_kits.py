"""Certificates and kits, made by NVFlare itself."""

import json
import stat
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from fedmira.deploy.nvflare import kits
from fedmira.deploy.nvflare.kits import Party
from fedmira.deploy.settings import ServerAddress
from fedmira.errors import ConfigError, StoreError

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedmira[deploy]'")

FEDERATION = "trial"
SERVER = ServerAddress(host="localhost", port=28999)


@dataclass(frozen=True)
class Made:
    """An authority with the kits that it made itself, and a request of a site that has its own key."""

    authority: Path
    server: Path
    admin: Path
    client: Path
    request: Path
    fingerprint: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("kits")
    authority = folder / "ca"
    fingerprint = kits.make_authority(authority, federation=FEDERATION, server=SERVER, encrypted=True)
    server, admin, client = folder / "server" / "kit", folder / "server" / "admin", folder / "a" / "kit"
    parties = {server: Party("localhost", "server"), admin: Party(kits.ADMIN, "admin"), client: Party("a", "client")}
    kits.make_kits(authority, parties, federation=FEDERATION)
    for kit in parties:
        kits.harden(kit)
    request = kits.make_request(folder / "b" / "request", federation=FEDERATION, site="b")
    return Made(authority, server, admin, client, request, fingerprint)


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_each_kit_has_a_key_and_certificates_where_nvflare_looks_for_them(made: Made) -> None:
    assert (made.server / "startup" / "server.key").is_file()
    for kit in (made.admin, made.client):
        assert (kit / "startup" / "client.key").is_file()
    roots = {(kit / "startup" / "rootCA.pem").read_bytes() for kit in (made.server, made.admin, made.client)}
    assert roots == {(made.authority / "rootCA.pem").read_bytes()}
    assert made.fingerprint.startswith("SHA256:")


def test_only_the_owner_reads_keys_and_kits(made: Made) -> None:
    for folder in (made.authority, made.server, made.admin, made.client, made.request.parent):
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == 0o700 if path.is_dir() else mode & 0o077 == 0, path
            assert path.suffix != ".key" or mode == 0o600


def test_nothing_is_left_of_the_requests_that_were_made_at_the_server(made: Made) -> None:
    folder = made.authority.parent
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "ca", "server"]
    assert sorted(path.name for path in files(made.authority)) == ["ca.json", "profile.yml", "rootCA.key", "rootCA.pem"]


@pytest.mark.parametrize("who", ["server", "client"])
def test_a_job_may_name_no_class_but_fedmiras_and_the_runtimes(made: Made, who: str) -> None:
    resources = read(getattr(made, who) / "local" / "resources.json")
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["class_allow_list"] == ["nvflare.collab.runtime.", "fedmira.deploy.nvflare.relay."]


@pytest.mark.parametrize("who", ["server", "client"])
def test_no_log_leaves_a_kit_and_no_code_comes_with_a_job(made: Made, who: str) -> None:
    local = getattr(made, who) / "local"
    resources = read(local / "resources.json")
    assert resources["allow_log_streaming"] is False
    components = resources["components"]
    assert isinstance(components, list)
    assert [part["id"] for part in components if "log" in part["id"]] == []
    assert "process_launcher" in [part["id"] for part in components]
    permissions = read(local / "authorization.json")["permissions"]
    assert isinstance(permissions, dict)
    assert {role: rights["byoc"] for role, rights in permissions.items()} == dict.fromkeys(
        ("lead", "project_admin", "org_admin", "member"), "none"
    )
    allowed = {right for rights in permissions.values() for right, whom in rights.items() if whom != "none"}
    assert allowed == {"submit_job", "manage_job", "view", "operate"}


@pytest.mark.parametrize("who", ["server", "client", "admin"])
def test_a_kit_writes_only_below_itself(made: Made, who: str) -> None:
    kit = getattr(made, who)
    settings = [path for path in files(kit) if path.suffix == ".json"]
    assert settings
    assert [path for path in settings if "/tmp/nvflare" in path.read_text(encoding="utf-8")] == []
    assert (kit / "transfer").is_dir()


def test_the_servers_jobs_are_stored_in_its_kit_wherever_that_is_moved(made: Made, tmp_path: Path) -> None:
    resources = made.server / "local" / "resources.json"
    assert f'"{made.server}/state/jobs-storage"' in resources.read_text(encoding="utf-8")
    before = resources.read_bytes()
    kits.harden(made.server, at=tmp_path / "elsewhere")
    assert f'"{tmp_path}/elsewhere/state/jobs-storage"' in resources.read_text(encoding="utf-8")
    kits.harden(made.server)
    assert resources.read_bytes() == before


def test_kits_connect_by_mutual_tls_to_one_port(made: Made) -> None:
    client = read(made.client / "startup" / "fed_client.json")
    server = read(made.server / "startup" / "fed_server.json")
    assert client["client"]["connection_security"] == "mtls"  # type: ignore[index]
    assert server["servers"][0]["connection_security"] == "mtls"  # type: ignore[index]
    assert client["servers"][0]["service"] == {"target": "localhost:28999", "scheme": "grpc"}  # type: ignore[index]
    assert read(made.admin / "startup" / "fed_admin.json")["admin"]["username"] == kits.ADMIN  # type: ignore[index]


def test_the_key_of_a_site_is_beside_its_request_and_not_in_it(made: Made) -> None:
    asked = kits.read_request(made.request)
    assert (asked.federation, asked.name, asked.kind) == (FEDERATION, "b", "client")
    assert asked.digest == sha256(made.request.read_bytes()).hexdigest()
    assert b"PRIVATE KEY" in (made.request.parent / "b.key").read_bytes()
    with zipfile.ZipFile(made.request) as archive:
        assert all(b"PRIVATE KEY" not in archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all"])
def test_what_is_not_a_request_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.request.zip").write_bytes(content)
    with pytest.raises(StoreError, match="not a request"):
        kits.read_request(tmp_path / "x.request.zip")


def test_what_nvflare_refuses_is_said_in_its_words_and_nothing_is_left(made: Made, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="NVFlare refused: Invalid name"):
        kits.make_request(tmp_path / "c" / "request", federation=FEDERATION, site="not a name")
    assert files(tmp_path) == []


def test_without_nvflare_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmira\[deploy\]'"):
        kits.check_installed()
