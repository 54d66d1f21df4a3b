"""`fedmira federation init`: what each party gets, what is refused, and that nothing is left of what was refused."""

import json
import shutil
import signal
import stat
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.small_study import METHODS, Ended, command, save_base, save_config, settings, start

from fedmira.deploy import invite
from fedmira.deploy.folders import ServerFolder, SiteFolder
from fedmira.deploy.nvflare import kits
from fedmira.deploy.settings import read_agreement, read_federation, read_site
from fedmira.disk.folders import held
from fedmira.errors import ConfigError, StoreError
from fedmira.study.loading import load_config

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedmira[deploy]'")

SITES = ("north", "south")


@dataclass(frozen=True)
class Study:
    """A study's config and base, to found federations from."""

    folder: Path

    def config(self, **changes: Any) -> Path:
        raw = settings(self.folder / "base", self.folder / "nowhere.jsonl", self.folder / "runs", **changes)
        return save_config(self.folder / "study.yaml", raw)

    def init(self, folder: Path, *options: object, sites: str = "north,south", **changes: Any) -> Ended:
        config = self.config(**changes)
        where = ("--config", config, "--server", "localhost:28998", "--sites", sites)
        return command("federation", "init", folder, *where, *options)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    save_base(folder / "base")
    return Study(folder)


@dataclass(frozen=True)
class Founded:
    """A federation whose keys were made at the server."""

    server: ServerFolder
    said: Mapping[str, Any]
    err: str


@pytest.fixture(scope="module")
def founded(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Founded:
    folder = tmp_path_factory.mktemp("federations") / "clinics"
    done = study.init(folder, "--quorum", "0.75", "--json")
    assert done.code == 0, done.err
    return Founded(ServerFolder(folder), json.loads(done.out), done.err)


@pytest.fixture(scope="module")
def own_keys(study: Study, tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    folder = tmp_path_factory.mktemp("federations") / "own"
    done = study.init(folder, "--own-keys", "lora.ranks=uniform", "lora.r=8")
    assert done.code == 0, done.err
    assert "holds no secret" in done.out
    return ServerFolder(folder)


def private(folder: Path) -> list[str]:
    """Names of the private keys below a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
    )


def test_the_server_and_each_site_get_their_folders(founded: Founded) -> None:
    server = founded.server
    top = ["README.md", "agreement.json", "ca", "federation.yaml", "server", "sites", "study.yaml"]
    assert sorted(path.name for path in server.path.iterdir()) == top
    assert sorted(path.name for path in (server.path / "server").iterdir()) == ["admin", "kit"]
    for site in SITES:
        names = ["README.md", "agreement.json", "kit", "site.yaml", "study.yaml"]
        assert sorted(path.name for path in server.site(site).path.iterdir()) == names
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o700
    assert [path.name for path in server.path.parent.iterdir()] == ["clinics"]


def test_each_key_is_where_it_belongs(founded: Founded) -> None:
    where = ["ca/rootCA.key", "server/admin/startup/client.key", "server/kit/startup/server.key"]
    assert private(founded.server.path) == [*where, *(f"sites/{site}/kit/startup/client.key" for site in SITES)]


def test_what_is_printed_says_what_to_send_and_what_to_compare(founded: Founded) -> None:
    said = founded.said
    assert said["name"] == "clinics"
    assert said["sites"] == {site: str(founded.server.site(site).path) for site in SITES}
    assert said["fingerprint"] == kits.fingerprint_of(founded.server.authority)
    assert said["fingerprint"] in (founded.server.path / "README.md").read_text(encoding="utf-8")
    assert said["notes"] == [
        "data.clients.by, data.clients.groups: not used here; every site is one client, with all examples of its own "
        "data.path"
    ]


def test_the_server_reads_what_was_written(founded: Founded) -> None:
    written = read_federation(founded.server.settings)
    assert (written.name, list(written.sites), written.quorum, written.deadline) == ("clinics", [*SITES], 0.75, 3600)
    assert (written.server.host, written.server.port, written.tls) == ("localhost", 28998, "mutual")


def test_the_agreement_says_what_the_base_is_and_what_methods_ask(founded: Founded, study: Study) -> None:
    agreement = read_agreement(founded.server.agreement)
    assert (agreement.base_model, agreement.dtype, agreement.template) == (
        str(study.folder / "base"),
        "float32",
        "none",
    )
    assert (agreement.architecture, agreement.width, agreement.transposed) == ("LlamaForCausalLM", 16, False)
    assert [name.rpartition(".")[2] for name, _, _ in agreement.shapes] == ["q_proj", "v_proj"] * 2
    assert len(agreement.base_fingerprint) == 64
    assert agreement.ranks == dict.fromkeys(SITES, 2)
    assert agreement.columns == ["group"]
    for site in SITES:
        assert read_agreement(founded.server.site(site).agreement) == agreement


def test_the_study_that_sites_get_runs_but_does_not_say_where_data_is(founded: Founded, study: Study) -> None:
    texts = {founded.server.site(site).study_config.read_text(encoding="utf-8") for site in SITES}
    assert texts == {founded.server.study_config.read_text(encoding="utf-8")}
    assert "nowhere.jsonl" not in texts.pop()
    shared = load_config(founded.server.study_config)
    assert [entry.name for entry in shared.methods] == [method["name"] for method in METHODS]
    assert (shared.data.path, shared.data.template, shared.data.clients.by) == ("AT-EACH-SITE", "none", "task")


def test_a_site_is_refused_until_it_says_where_its_data_is(founded: Founded, tmp_path: Path) -> None:
    site = founded.server.site("north")
    with pytest.raises(ConfigError, match=r"data\.path: found None: is not filled in yet"):
        read_site(site.settings)
    text = site.settings.read_text(encoding="utf-8")
    filled = tmp_path / "site.yaml"
    filled.write_text(text.replace("  path: ", "  path: data.jsonl"), encoding="utf-8")
    written = read_site(filled)
    assert (written.name, written.data.path, written.data.format) == ("north", "data.jsonl", "prompt_completion")
    assert (written.share_metrics, written.base_model) == (True, None)
    keys = {*type(written).model_fields, *type(written.data).model_fields}
    assert [key for key in keys if f"{key}:" not in text] == []


def test_the_pages_say_address_steps_and_what_leaves(founded: Founded) -> None:
    page = (founded.server.site("south").path / "README.md").read_text(encoding="utf-8")
    for words in ("localhost, port 28998", "rootCA.pem", "value of the column `group`", "mutual TLS", "site . --check"):
        assert words in page
    assert "--accept" not in page


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        ((), {"methods": [{"name": "pooled"}]}, "trains on the data of all clients together"),
        ((), {"methods": [{"name": "scaffold"}], "training": {"optimizer": "adamw"}}, "plain SGD"),
        ((), {"methods": [{"name": "mira", "graph": {"kind": "file", "path": "g.csv"}}]}, "g.csv"),
        ((), {"lora": {"ranks": {"column": "rank"}, "r": 8}}, "nobody sees but its site"),
        ((), {"lora": {"ranks": [2, 4, 8], "r": 8}}, "found 3 ranks for 2 sites"),
        ((), {"data": {"template": "mine.jinja"}}, "a file of this machine"),
        ((), {"model": {"base_model": "/no/such/base"}}, "/no/such/base"),
        ((), {"federation": {"round": 3}}, "did you mean 'rounds'"),
        (("--sites", "north"), {}, "at least 2"),
        (("--sites", "north,North"), {}, "differ by case"),
        (("--sites", "north,server"), {}, "the name of the server"),
        (("--sites", "north,../south"), {}, "sites.1"),
        (("--server", "hub..example"), {}, "server.host"),
        (("--server", "hub:http"), {}, "HOST:PORT"),
        (("--quorum", "2"), {}, "quorum"),
        (("--tls", "off"), {}, "off-and-i-know-it"),
        (("--add-site", "west"), {}, "give one of them alone"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_left(
    options: tuple[str, ...], changes: dict[str, Any], told: str, study: Study, tmp_path: Path
) -> None:
    done = study.init(tmp_path / "new", *options, **changes)
    assert done.code == 2, done.err
    assert told in " ".join(done.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_graphs_need_is_agreed_and_said(study: Study, tmp_path: Path) -> None:
    """A graph's file stays at the server; a kNN graph is made of what sites say, and their page has it."""
    graph = tmp_path / "graph.csv"
    graph.write_text("client,neighbour,weight\nnorth,south,1\n")
    graphs = [{"kind": "file", "path": str(graph)}, {"kind": "knn"}]
    graphs.append({"kind": "knn", "features": "histogram", "column": "topic"})
    methods = [{"name": "mira", "label": f"mira-{n}", "graph": one} for n, one in enumerate(graphs)]
    done = study.init(tmp_path / "fed", methods=methods)
    assert done.code == 0, done.err
    server = ServerFolder(tmp_path / "fed")
    agreement = read_agreement(server.agreement)
    assert list(agreement.profiles) == [None, "topic"]
    assert agreement.columns == []
    page = (server.site("north").path / "README.md").read_text(encoding="utf-8")
    assert "mean embedding of up to 16" in page
    assert "value of the column `topic`" in page


@pytest.mark.slow
def test_a_config_need_not_say_what_a_federation_does_not_use(study: Study, tmp_path: Path) -> None:
    raw = settings(study.folder / "base", tmp_path, tmp_path / "of the organiser")
    del raw["output_dir"], raw["data"]["path"]
    where = ("--config", save_config(tmp_path / "study.yaml", raw), "--server", "localhost", "--sites", "a,b")
    done = command("federation", "init", tmp_path / "fed", *where)
    assert done.code == 0, done.err
    sent = load_config(ServerFolder(tmp_path / "fed").site("a").study_config)
    assert (sent.data.path, sent.output_dir) == ("AT-EACH-SITE", "server/study")


def test_a_folder_with_something_in_it_is_not_touched(founded: Founded, study: Study, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert "not an empty folder" in study.init(tmp_path).err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert "--add-site" in study.init(founded.server.path).err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_init_leaves_nothing(number: int, study: Study, tmp_path: Path) -> None:
    where = ("--config", study.config(), "--server", "localhost", "--sites", "a,b")
    running = start("federation", "init", tmp_path / "new", *where)
    deadline = time.monotonic() + 400
    while not any(tmp_path.glob(".new.*/ca/profile.yml")):  # it has begun to write
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.signal(number)
    assert running.wait().code in (130, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_nvflare_leaves_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise StoreError("NVFlare refused: no reason")

    monkeypatch.setattr(kits, "make_authority", refuse)
    described = invite.describe_federation(tmp_path / "new", server="localhost", sites=["a", "b"])
    with pytest.raises(StoreError, match="no reason"):
        invite.found(tmp_path / "new", load_config(study.config()), described, own_keys=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_site_can_be_added(founded: Founded, tmp_path: Path) -> None:
    server = ServerFolder(tmp_path / "moved")
    shutil.copytree(founded.server.path, server.path)
    stale = server.site("west").path
    stale.mkdir()
    (stale / "left-over").touch()  # of an add-site that was killed
    done = command("federation", "init", server.path, "--add-site", "west", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["sites"] == {"west": str(stale)}
    assert not (stale / "left-over").exists()
    assert read_federation(server.settings).sites == [*SITES, "west"]
    assert "# who may take part" in server.settings.read_text(encoding="utf-8")
    agreement = read_agreement(server.agreement)
    assert agreement.ranks == {"north": 2, "south": 2, "west": 2}
    assert read_agreement(server.site("west").agreement) == agreement
    assert private(server.site("west").path) == ["kit/startup/client.key"]
    root = (server.authority / "rootCA.pem").read_bytes()
    assert (server.site("west").kit / "startup" / "rootCA.pem").read_bytes() == root
    (server.site("west").path / "state").mkdir()
    server.settings.write_text(server.settings.read_text(encoding="utf-8").replace(", west]", "]"), encoding="utf-8")
    back = command("federation", "init", server.path, "--add-site", "west")
    assert back.code == 2
    assert "has taken part in this federation: write it into" in back.err
    server.settings.write_text(server.settings.read_text(encoding="utf-8").replace("south]", "south, west]"), "utf-8")
    again = command("federation", "init", server.path, "--add-site", "West")
    assert again.code == 2
    assert "differ by case" in again.err


@pytest.mark.slow
def test_the_servers_page_has_a_site_that_was_added_and_keeps_what_its_owner_wrote(
    founded: Founded, tmp_path: Path
) -> None:
    server = ServerFolder(tmp_path / "moved")
    shutil.copytree(founded.server.path, server.path)
    page = server.path / "README.md"
    page.write_text(page.read_text(encoding="utf-8") + "\nMy own note.\n", encoding="utf-8")
    for name in ("west", "east"):
        done = command("federation", "init", server.path, "--add-site", name, "--own-keys")
        assert done.code == 0, done.err
    text = page.read_text(encoding="utf-8")
    assert "Sites: north, south, west, east. Nobody gets" in text
    assert (
        text.count("Sites that were added with `--own-keys`:") == text.count("--sign NAME.request.zip\n\nSites:") == 1
    )
    assert text.endswith("\nMy own note.\n")
    with_key = command("federation", "init", server.path, "--add-site", "up")
    assert "next: nothing here" in with_key.out
    assert page.read_text(encoding="utf-8") == text.replace("west, east.", "west, east, up.")


@pytest.mark.slow
def test_the_servers_certificates_are_renewed_by_the_same_authority(founded: Founded, tmp_path: Path) -> None:
    folder = tmp_path / "clinics"
    shutil.copytree(founded.server.path, folder)
    server = ServerFolder(folder)
    files = [server.kit / "startup" / "server.crt", server.admin / "startup" / "client.crt"]
    (server.kit / "state" / "job").write_text("of the engine")
    before = [path.read_bytes() for path in files]
    with held(server.path):
        assert "in use" in command("federation", "init", folder, "--renew").err
    assert [path.read_bytes() for path in files] == before
    done = command("federation", "init", folder, "--renew")
    assert done.code == 0, done.err
    x509 = pytest.importorskip("cryptography.x509")
    root = x509.load_pem_x509_certificate((founded.server.kit / "startup" / "rootCA.pem").read_bytes())
    for path, old in zip(files, before, strict=True):
        assert path.read_bytes() != old
        x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(root)  # raises if it is not
        key = path.with_suffix(".key")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in server.kit.parent.iterdir()) == ["admin", "kit"]


@pytest.mark.slow
def test_a_site_makes_its_own_key_and_the_server_never_has_it(own_keys: ServerFolder, tmp_path: Path) -> None:
    server_keys = ["ca/rootCA.key", "server/admin/startup/client.key", "server/kit/startup/server.key"]
    assert private(own_keys.path) == server_keys
    site = SiteFolder(tmp_path / "at the site")
    shutil.copytree(own_keys.site("north").path, site.path)
    asked = command("federation", "site", site.path, "--request").out
    request = invite.make_request(site.path)
    assert sha256(request.read_bytes()).hexdigest() in asked
    assert request == site.request / "north.request.zip"
    assert invite.make_request(site.path) == request  # it waits for its answer
    done = command("federation", "init", own_keys.path, "--sign", request, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    signed = Path(said["signed"])
    assert signed == own_keys.path / "sites" / "north.signed.zip"
    with zipfile.ZipFile(signed) as archive:
        assert all(b"PRIVATE KEY" not in archive.read(name) for name in archive.namelist())
    with pytest.raises(StoreError, match=r"(?i)fingerprint"):
        invite.accept(site.path, signed, "SHA256:" + ":".join(["00"] * 32))
    for other, told in (
        (request, "is not a signed request"),
        (_signed_for(own_keys, "south"), "is signed for 'south'"),
    ):
        with pytest.raises(StoreError, match=told):
            invite.accept(site.path, other, said["fingerprint"])
    assert not site.kit.exists()
    assert "--request" in command("federation", "site", site.path).err
    assert invite.accept(site.path, signed, said["fingerprint"]) == site.kit
    (site.kit / "old").touch()
    assert invite.accept(site.path, signed, said["fingerprint"]) == site.kit  # again: it replaces the kit
    assert not (site.kit / "old").exists()
    assert private(site.path) == ["kit/startup/client.key", "request/north.key"]
    assert private(own_keys.path) == server_keys
    assert json.loads((site.kit / "local" / "resources.json").read_bytes())["allow_log_streaming"] is False


def _signed_for(server: ServerFolder, name: str) -> Path:
    """Let a site of this name make a request, and sign it."""
    request = kits.make_request(server.path.with_name(name) / "request", federation="own", site=name)
    return invite.sign(server.path, request).path


def test_a_request_for_another_role_name_or_federation_is_not_signed(
    own_keys: ServerFolder, founded: Founded, tmp_path: Path
) -> None:
    stranger = kits.make_request(tmp_path / "stranger", federation="own", site="nort")
    with pytest.raises(ConfigError, match="did you mean 'north'"):
        invite.sign(own_keys.path, stranger)
    with pytest.raises(ConfigError, match="it is for the federation 'own'"):
        invite.sign(founded.server.path, stranger)
    with zipfile.ZipFile(stranger) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    said = json.loads(members["request.json"])
    before = sorted(own_keys.path.rglob("*"))
    for change, told in (
        ({"kind": "user", "cert_type": "lead", "cert_role": "lead", "name": "north"}, "a certificate of a user"),
        ({"kind": "site", "cert_type": "server", "name": "north"}, "a certificate of a server"),
        ({"name": "north"}, "NVFlare refused"),  # the key's own request still says 'nort'
    ):
        forged = tmp_path / "forged.request.zip"
        with zipfile.ZipFile(forged, "w") as archive:
            for name, content in members.items():
                new = json.dumps({**said, **change}).encode() if name == "request.json" else content
                archive.writestr(name, new)
        with pytest.raises((ConfigError, StoreError), match=told):
            invite.sign(own_keys.path, forged)
    assert sorted(own_keys.path.rglob("*")) == before


def test_ranks_that_are_drawn_are_written_down_by_module(own_keys: ServerFolder) -> None:
    agreement = read_agreement(own_keys.agreement)
    assert set(agreement.ranks) == set(SITES)
    assert all(rank in (8, 30, 200) or isinstance(rank, list) for rank in agreement.ranks.values())
