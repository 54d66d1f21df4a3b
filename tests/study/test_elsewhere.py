"""A whole study whose clients live in other processes, each with its own data alone: the bits of the simulation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.small_study import differences, outcome
from tests.study.elsewhere import Elsewhere, elsewhere

from fedmira.config.faults import check_config
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.engine.federation import Federation
from fedmira.study import run
from fedmira.study.assemble import Built, Prepared
from fedmira.study.face import Study

METHODS: list[Mapping[str, Any]] = [
    {
        "name": "mira",
        "lambda": 0.25,
        "neighbours": "stored",
        "graph": {"kind": "groups", "column": "group"},
        "label": "mira-stored",
    },
    {"name": "fedavg", "with": [{"name": "only", "travels": "A"}]},
    {"name": "fedavg_ft", "steps": 2},
    {"name": "fedsophia", "tau": 2},
    {"name": "local"},
    {"name": "flexlora"},
    {"name": "flora"},  # its base changes, and clients that come back catch up
]
CHANGES: Mapping[str, Any] = {
    "federation": {"rounds": 3, "participation": 0.5, "cohort": 1},
    "lora": {"ranks": [1, 2, 2, 1, 2, 2], "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
    "evaluation": {"keep": "best", "metrics": ["loss", "exact_match"], "max_new_tokens": 2},  # each where it belongs
    "methods": METHODS,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, run.Where], Study]:
    here = tmp_path_factory.mktemp("elsewhere")
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")

    def carried_out(name: str, where: run.Where) -> Study:
        config = check_config(small_study.settings(base, data, here / name) | CHANGES)
        run.start(StudyFolder(here / name), config, silent, overwrite=False, where=where)
        return Study(here / name)

    return carried_out


@pytest.mark.slow
def test_a_study_through_clients_in_other_processes_has_the_bits_of_the_simulation(
    study: Callable[[str, run.Where], Study],
) -> None:
    opened: list[Elsewhere] = []

    def away(prepared: Prepared, built: Built, seed: int, federation: Federation, folder: Path) -> Elsewhere:
        opened.append(elsewhere(prepared, built, seed, federation, folder))
        return opened[-1]

    there = study("there", away)
    for clients in opened:
        clients.close()
    here = study("here", run.in_this_process)
    assert len(opened) == len(METHODS)
    assert [found.facts.state for found in there.runs] == ["complete"] * len(METHODS)
    assert (there.path / "report.html").is_file()
    assert differences(outcome(here.path), outcome(there.path)) == []
