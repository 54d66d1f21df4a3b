"""Every kind of method over processes, sockets and mutual TLS: the bits of the simulation with `cohort: 1`."""

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests import small_study
from tests.deploy.federation import SITES
from tests.deploy.parity import LABELS, METHODS, SEED, check_near, check_same, save_files, settings, simulate
from tests.deploy.processes import INIT, SERVER, SITE, ended_afterwards, fill_in, free_port, start, typed

from fedmira.deploy.folders import ServerFolder
from fedmira.disk.folders import StudyFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("nvflare") is None, reason="nvflare is not installed (an extra of fedmira)"
    ),
]

SECONDS = 1800.0  # it takes 90 seconds; a busy machine is slow


@dataclass(frozen=True)
class Ended:
    """One federation that carried out every method. said: what each site printed; pids: of their processes."""

    folder: ServerFolder
    base: Path
    data: Path
    said: dict[str, str]
    pids: dict[str, int]

    def adapter_of(self, label: str, site: str) -> Path:
        return self.folder.site(site).adapters / label / f"seed-{SEED}"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    here = tmp_path_factory.mktemp("real-parity")
    base, data = save_files(here)
    config = small_study.save_config(here / "study.yaml", settings(base, data, here / "unused"))
    folder = ServerFolder(here / "federation")
    names = {"bank-a,bank-b": ",".join(SITES), "study.yaml": str(config)}
    init = typed(
        INIT, folder.path, "--deadline", "600", **names, **{"hub.example.org:8002": f"localhost:{free_port()}"}
    )
    with ended_afterwards() as processes:
        processes.append(start(init, here / "init.txt"))
        assert processes[0].wait(SECONDS) == 0, (here / "init.txt").read_text()
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        for name in SITES:
            own = here / f"{name}.jsonl"
            own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["client"] == name))
            fill_in(folder.site(name), data=own, base=base)
        sites = {name: start(typed(SITE, folder.path, **{"bank-a": name}), here / f"{name}.txt") for name in SITES}
        server = start(typed(SERVER, folder.path), here / "server.txt")
        processes += [*sites.values(), server]
        assert server.wait(SECONDS) == 0, (here / "server.txt").read_text()
        for process in sites.values():
            assert process.wait(SECONDS) == 0
        said = {name: (here / f"{name}.txt").read_text() for name in SITES}
        yield Ended(folder, base, data, said, {name: process.pid for name, process in sites.items()})


@pytest.fixture(scope="module")
def simulation(ended: Ended) -> Path:
    return simulate(ended.base, ended.data, ended.data.with_name("simulation"), cohort=1)


@pytest.fixture(scope="module")
def batched(ended: Ended) -> Path:
    return simulate(ended.base, ended.data, ended.data.with_name("batched"), cohort="auto")


@pytest.mark.parametrize("label", LABELS)
def test_adapters_and_figures_are_those_of_the_simulation(label: str, ended: Ended, simulation: Path) -> None:
    check_same(label, simulation, ended.folder.study, ended.adapter_of)


@pytest.mark.parametrize("label", LABELS)
def test_a_batched_simulation_has_the_same_to_a_tolerance(label: str, ended: Ended, batched: Path) -> None:
    check_near(label, batched, ended.folder.study, ended.adapter_of)


def test_the_base_of_each_site_was_loaded_once_for_all_methods(ended: Ended) -> None:
    """By the process that was started, which lived until the study was complete."""
    for name in SITES:
        loaded = re.findall(r"base loaded by process (\d+)", ended.said[name])
        assert loaded == [str(ended.pids[name])]
        assert "the study is complete" in ended.said[name]


def test_nobody_was_stopped_and_nobody_was_missing(ended: Ended) -> None:
    for label in LABELS:
        run = StudyFolder(ended.folder.study).run(label, SEED)
        assert run.facts.state == "complete"
        assert not run.facts.resumed
        assert all(record["answered"] == record["clients"] for record in run.records())


def test_a_method_that_is_not_installed_is_refused_by_name(ended: Ended, tmp_path: Path) -> None:
    """The same command without the path on which tests.laws.fedex is."""
    own = next(str(method["name"]) for method in METHODS if "." in str(method["name"]))
    words = typed(SITE, ended.folder.path, "--check", **{"bank-a": SITES[0]})
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert own in done.stderr
