"""A real federation: processes, mutual TLS, the bits of the simulation; slow: a server that is killed in the middle."""

import importlib.util
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests import small_study
from tests.deploy.processes import (
    AUDIT,
    CHECK,
    INIT,
    SERVER,
    SHOW,
    SITE,
    STATUS,
    Forked,
    arguments,
    ended_afterwards,
    fill_in,
    fork,
    free_port,
    typed,
)

from fedmira.config.faults import check_config
from fedmira.deploy.audit import read_audit
from fedmira.deploy.folders import ServerFolder
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.engine.events import silent
from fedmira.study import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvflare") is None, reason="nvflare is not installed (an extra of fedmira)"
)

SITES = ("ada", "cy")  # of one group
ROUNDS = 6
SECONDS = 400.0  # far more than it takes; a busy machine is slow


def settings(base: Path, data: Path, output: Path) -> dict[str, Any]:
    raw = small_study.settings(
        base,
        data,
        output,
        federation={"rounds": ROUNDS, "participation": 1.0, "cohort": 1},
        training={"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
        methods=[{"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}}],
    )
    return raw | {"lora": {"ranks": [1, 2], "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture(scope="module")
def processes() -> Iterator[list[subprocess.Popen[str] | Forked]]:
    with ended_afterwards() as started:
        yield started


def wait_for(records: RunFolder, rounds: int) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (records.path / "metrics.jsonl").is_file() and len(records.records()) >= rounds:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {rounds} rounds in {SECONDS:.0f} s")


@pytest.fixture(scope="module", params=["whole", pytest.param("killed", marks=pytest.mark.slow)])
def ended(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    processes: list[subprocess.Popen[str] | Forked],
) -> tuple[ServerFolder, Path, list[str]]:
    """Carry out a study in a simulation and in a federation, whose server is killed after two rounds if so asked."""
    here = tmp_path_factory.mktemp("real")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "all.jsonl")
    rows = [row for line in data.read_text().splitlines() if (row := json.loads(line))["client"] in SITES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = settings(base, data, here / "simulation")
    run.start(StudyFolder(here / "simulation"), check_config(raw), silent, overwrite=False)
    config = small_study.save_config(here / "study.yaml", raw)
    folder = ServerFolder(here / "federation")
    changes = {
        "bank-a,bank-b": ",".join(SITES),
        "hub.example.org:8002": f"localhost:{free_port()}",
        "study.yaml": str(config),
    }
    terms = ("--deadline", "100", "--quorum", "1")
    founded = small_study.command(*arguments(INIT, folder.path, *terms, **changes))
    assert founded.code == 0, founded.err
    sites = []
    for name in SITES:
        own = here / f"{name}.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] == name))
        fill_in(folder.site(name), data=own, base=base)
        log = here / f"{name}.txt"
        sites.append(fork(arguments(SITE, folder.path, **{"bank-a": name}), log))
        processes.append(sites[-1])
    log = here / "server.txt"
    if request.param == "killed":
        first = fork(arguments(SERVER, folder.path), log)
        processes.append(first)
        wait_for(StudyFolder(folder.study).run("mira", 3), 2)
        first.kill()
        first.wait(60)
    server = fork(arguments(SERVER, folder.path), log)
    processes.append(server)
    assert server.wait(SECONDS) == 0, log.read_text()
    for process in sites:
        assert process.wait(60) == 0
    return folder, here, [(here / f"{name}.txt").read_text() for name in SITES]


def test_adapters_and_figures_are_those_of_the_simulation(ended: tuple[ServerFolder, Path, list[str]]) -> None:
    folder, here, _ = ended
    one, other = small_study.outcome(here / "simulation"), small_study.outcome(folder.study)
    assert one["mira/seed-3/results.csv"] == other["mira/seed-3/results.csv"]
    assert one["mira/seed-3/metrics.jsonl"] == other["mira/seed-3/metrics.jsonl"]
    for site in SITES:
        expected = load_file(here / "simulation" / "mira" / "seed-3" / "adapters" / site / "adapter_model.safetensors")
        found = load_file(folder.site(site).adapters / "mira" / "seed-3" / "adapter_model.safetensors")
        assert set(found) == set(expected)
        assert all(bool((found[name] == expected[name]).all()) for name in expected)


def test_a_kill_fell_into_the_run_and_the_sites_kept_their_base(
    ended: tuple[ServerFolder, Path, list[str]], request: pytest.FixtureRequest
) -> None:
    folder, _, said = ended
    killed = "killed" in request.node.callspec.id
    assert len(StudyFolder(folder.study).run("mira", 3).facts.resumed) == killed
    for text in said:
        assert len(re.findall(r"base loaded by process \d+", text)) == 1
        assert "the study is complete" in text


def test_no_round_was_trained_twice(ended: tuple[ServerFolder, Path, list[str]]) -> None:
    """An answer that the site has is answered again, and not computed again: its own figures have each round once."""
    folder, _, _ = ended
    for site in SITES:
        lines = (folder.site(site).adapters / "mira" / "seed-3" / "metrics.jsonl").read_text().splitlines()
        trained = [line["round"] for line in map(json.loads, lines) if line["what"] == "train"]
        assert trained == list(range(1, ROUNDS + 1))


def test_what_left_the_sites_is_listed_and_has_no_word_of_their_data(
    ended: tuple[ServerFolder, Path, list[str]],
) -> None:
    folder, here, _ = ended
    for site in SITES:
        lines = list(read_audit(folder.site(site).audit))
        uploads = [line for line in lines if line["what"] == "train"]
        assert len({line["round"] for line in uploads}) == ROUNDS
        assert all(line["to"] == "server" and line["bytes"] > 0 and len(line["sha256"]) == 64 for line in lines)
    stored = b"".join(path.read_bytes() for path in folder.path.glob("server/**/*") if path.is_file())
    words = [json.loads(line)["prompt"] for line in (here / "ada.jsonl").read_text().splitlines()]
    assert not any(word.encode() in stored for word in words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (CHECK, "6 training, 2 validation, 2 test"),
        pytest.param(SHOW, "ada: 7 tokens, loss on 3", marks=pytest.mark.slow),
        (STATUS, f"complete, {ROUNDS} of {ROUNDS} rounds"),
        (AUDIT, "mira/seed-3"),
    ],
)
def test_the_other_commands_of_the_page_say_what_they_should(
    line: str, shown: str, ended: tuple[ServerFolder, Path, list[str]]
) -> None:
    folder, _, _ = ended
    done = subprocess.run(typed(line, folder.path, **{"bank-a": SITES[0]}), check=True, capture_output=True, text=True)
    assert shown in done.stdout
