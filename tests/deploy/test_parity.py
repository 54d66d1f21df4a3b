"""A study through sites, as bytes: the bits of the simulation with `cohort: 1`, and nearly those of a batched one."""

from pathlib import Path

import pytest
from tests.deploy.federation import SITES, Loopback, write_federation
from tests.deploy.parity import LABELS, SEED, check_near, check_same, save_files, settings, simulate

from fedmira.deploy.server import Server
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_files(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def studies(files: tuple[Path, Path]) -> tuple[Path, Loopback]:
    """The study's folder at the server, and the sites behind the link."""
    folder = write_federation(
        files[1].with_name("federation"),
        settings(*files, files[1].with_name("unused")),
        files[1],
        profiles=["group", None],
    )
    link = Loopback({name: folder.site(name) for name in SITES})
    server = Server(folder, link, print, silent)
    server.members.gather()
    server.carry_out()
    return folder.study, link


@pytest.fixture(scope="module")
def simulation(files: tuple[Path, Path]) -> Path:
    return simulate(*files, files[1].with_name("simulation"), cohort=1)


@pytest.fixture(scope="module")
def batched(files: tuple[Path, Path]) -> Path:
    """A batched simulation, whose sums are taken in another order."""
    folder = simulate(*files, files[1].with_name("batched"), cohort="auto")
    assert StudyFolder(folder).run("mira", SEED).facts.cohort == 2  # both clients of a round in one pass
    return folder


@pytest.mark.parametrize("label", LABELS)
def test_adapters_and_figures_are_those_of_the_simulation(
    label: str, simulation: Path, studies: tuple[Path, Loopback]
) -> None:
    there, link = studies
    check_same(label, simulation, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")


@pytest.mark.parametrize("label", LABELS)
def test_a_batched_simulation_has_the_same_to_a_tolerance(
    label: str, batched: Path, studies: tuple[Path, Loopback]
) -> None:
    there, link = studies
    check_near(label, batched, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")
