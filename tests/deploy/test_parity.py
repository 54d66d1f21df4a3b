"""A study through sites, as bytes: the bits of the simulation with `cohort: 1`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests import small_study
from tests.deploy.federation import SITES, Loopback, write_federation

from fedmira.config.faults import check_config
from fedmira.deploy.server import Server
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.study import run

METHODS: list[Mapping[str, Any]] = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}},
    {"name": "fedavg", "label": "fedsa", "with": [{"name": "only", "travels": "A"}]},
    {"name": "fedavg_ft", "steps": 2},
    {"name": "fedsophia", "tau": 2},
    {"name": "fedptuning"},
    {"name": "flexlora"},
    {"name": "tests.laws.fedex", "label": "fedex"},
]


def settings(base: Path, data: Path, output: Path) -> dict[str, Any]:
    return small_study.settings(
        base,
        data,
        output,
        federation={"rounds": 3, "participation": 0.67, "cohort": 1},
        training={"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
        methods=[dict(method) for method in METHODS],
    )


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Loopback]:
    here = tmp_path_factory.mktemp("parity")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")
    rows = [line for line in data.read_text().splitlines() if json.loads(line)["client"] in SITES]
    data.write_text("\n".join(rows) + "\n")
    config = check_config(settings(base, data, here / "here"))
    run.start(StudyFolder(here / "here"), config, silent, overwrite=False)
    folder = write_federation(here / "federation", settings(base, data, here / "unused"), data)
    link = Loopback({name: folder.site(name) for name in SITES})
    server = Server(folder, link, print, silent)
    server.members.gather()
    server.carry_out()
    return here / "here", folder.study, link


@pytest.mark.parametrize("label", [method.get("label", method["name"]) for method in METHODS])
def test_adapters_and_figures_are_those_of_the_simulation(label: str, studies: tuple[Path, Path, Loopback]) -> None:
    here, there, link = studies
    one, other = small_study.outcome(here), small_study.outcome(there)
    for name in (f"{label}/seed-3/results.csv", f"{label}/seed-3/metrics.jsonl"):
        assert one[name] == other[name]
    for site in SITES:
        expected = load_file(here / label / "seed-3" / "adapters" / site / "adapter_model.safetensors")
        found = load_file(link.folders[site].adapters / label / "seed-3" / "adapter_model.safetensors")
        assert set(found) == set(expected)
        assert all(bool((found[name] == expected[name]).all()) for name in expected)
