"""What a process of FedMira leaves behind and whom it asks: nothing outside its study, nobody unless a hub is named.

One real process without the switches that keep the libraries offline runs every command. A `sitecustomize` that Python
loads before anything else notes each attempt to reach a network, in that process and in those it starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study

TOKEN = "hf_" + "Zq7" * 11
TRACKERS = (
    "wandb",
    "mlflow",
    "tensorboard",
    "tensorboardX",
    "comet_ml",
    "neptune",
    "clearml",
    "aim",
    "swanlab",
    "trackio",
)
CACHES = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")

WATCH = """
import os, socket

def note(kind, address):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{kind} {address}\\n")
    raise OSError(113, "no route to host")

def connect(self, address, *rest):
    note("connect", address)

socket.socket.connect = socket.socket.connect_ex = connect
socket.socket.sendto = lambda self, data, *rest: note("sendto", rest[-1])
socket.getaddrinfo = lambda host, *rest, **options: note("getaddrinfo", host)
socket.gethostbyname = lambda host: note("gethostbyname", host)
"""

PROGRAM = """
import json, os, pathlib, socket, sys, tempfile
from fedmira.cli.main import main

def run(words):
    sys.argv = ["fedmira", *words]
    try:
        main()
    except SystemExit as end:
        return end.code

def files(folders):
    return [str(path) for folder in folders for path in pathlib.Path(folder).rglob("*")]

notes, found = pathlib.Path(os.environ["NOTES"]), {}
for name, words in json.loads(sys.argv[1]):
    before = len(notes.read_text().splitlines())
    code = run(words)
    found[name] = {
        "code": code,
        "asked": notes.read_text().splitlines()[before:],
        "left": files(json.loads(os.environ["CACHES"])),
        "trackers": [one for one in json.loads(os.environ["TRACKERS"]) if one in sys.modules],
    }
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    found["control"] = notes.read_text().splitlines()[-1]
import wandb
tempfile.mkstemp()
found["control"] = {
    "asked": found["control"],
    "left": files(json.loads(os.environ["CACHES"])),
    "trackers": [one for one in json.loads(os.environ["TRACKERS"]) if one in sys.modules],
}
print(json.dumps(found))
"""


pytestmark = pytest.mark.slow  # every other test is refused the network (conftest.py)

Traces = tuple[Path, dict[str, Any], dict[str, Any]]
LOCAL = ("dry run", "show", "run", "resume", "report", "export", "methods", "doctor", "init", "bundled")
HUB = ("hub base", "hub data")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Run commands; return their folder, what each did, and what a process leaves that does it all."""
    folder = tmp_path_factory.mktemp("traces")
    watch, here = folder / "watch", folder / "here"
    watch.mkdir()
    here.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    for name in TRACKERS:  # they are there, so that a library that likes them would find and load them
        (watch / f"{name}.py").write_text("__version__ = '9.9'\n")
    (folder / "notes").write_text("")
    caches = {name: folder / name.lower() for name in CACHES}
    for path in caches.values():
        path.mkdir()
    short: dict[str, Any] = {"federation": {"rounds": 2}, "methods": [dict(small_study.METHODS[2])]}
    config = small_study.settings(small_study.save_base(here / "base"), here / "rows.jsonl", here / "study", **short)
    small_study.save_data(here / "rows.jsonl")
    small_study.save_config(here / "config.yaml", config)
    commands: dict[str, list[str]] = {
        "dry run": ["run", "config.yaml", "--dry-run"],
        "show": ["run", "config.yaml", "--show-example", "-q"],
        "run": ["run", "config.yaml", "-v"],
        "resume": ["resume", "study", "federation.rounds=3", "-q"],
        "report": ["report", "study", "--json"],
        "export": ["export", "study/mira/seed-3", "--out", "copies"],
        "methods": ["methods"],
        "doctor": ["doctor"],
        "init": ["init", "mine.yaml", "--data", "rows.jsonl"],
        "bundled": ["run", "mine.yaml", "data.max_length=16", "federation.rounds=1", "data.clients.first=2", "-q"],
        "bad": ["run", "config.yaml", "data.path=none.jsonl"],
        "hub base": ["run", "config.yaml", "output_dir=other", "model.base_model=fedmira-test/no-such-base"],
        "hub data": ["run", "config.yaml", "output_dir=other", "data.path=fedmira-test/no-such-data"],
    }
    away = ("HF_", "TRANSFORMERS_", "PYTEST")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(away) and not name.lower().endswith("_proxy")
    }
    asked = {"NOTES": folder / "notes", "CACHES": json.dumps([str(path) for path in caches.values()])}
    settings: Mapping[str, Any] = {**kept, **caches, **asked, "TRACKERS": json.dumps(TRACKERS), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(commands.items()))],
        cwd=here,
        env={**{name: str(value) for name, value in settings.items()}, "PYTHONPATH": str(watch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "out").write_text(done.stdout + done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return folder, found, found.pop("control")


def test_what_these_tests_look_for_is_found_where_it_is(traces: Traces) -> None:
    control = traces[2]
    assert (control["asked"], len(control["left"]), control["trackers"]) == ("getaddrinfo 127.0.0.1", 1, ["wandb"])


def test_every_command_did_what_it_does(traces: Traces) -> None:
    folder, found, _ = traces
    codes = {**dict.fromkeys(LOCAL, 0), "bad": 2, **dict.fromkeys(HUB, 2)}
    assert {name: one["code"] for name, one in found.items()} == {name: codes[name] for name in found}
    made = {"run": {"study"}, "export": {"copies"}, "init": {"mine.yaml"}, "bundled": {"runs"}}
    made_here = set().union(*(made.get(name, set()) for name in found))
    assert {path.name for path in (folder / "here").iterdir()} == {"base", "rows.jsonl", "config.yaml", *made_here}


def test_nobody_is_asked_where_no_hub_is_named(traces: Traces) -> None:
    assert {name: one["asked"] for name, one in traces[1].items() if name not in HUB and one["asked"]} == {}


def test_a_hub_that_is_named_is_asked_and_nobody_else(traces: Traces) -> None:
    asked = {name: one["asked"] for name, one in traces[1].items() if name in HUB}
    assert all(asked.values())
    assert [line for lines in asked.values() for line in lines if "huggingface.co" not in line] == []


def test_nothing_is_left_in_caches_or_temporary_folders(traces: Traces) -> None:
    assert {name: one["left"] for name, one in traces[1].items() if name != "hub base" and one["left"]} == {}


def test_no_tracker_is_loaded(traces: Traces) -> None:
    assert {name: one["trackers"] for name, one in traces[1].items() if name in LOCAL and one["trackers"]} == {}


def test_the_token_of_the_hub_is_nowhere(traces: Traces) -> None:
    files = [path for path in traces[0].rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
