"""A study through sites, as bytes: the bits of the simulation with `cohort: 1`, and nearly those of a batched one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small_study, tiny
from tests.deploy.federation import SITES, Loopback, write_federation
from tests.deploy.parity import LABELS, METHODS, QUICK, SEED, check_near, check_same, save_files, settings, simulate

from fedmira.deploy.server import Server
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.methods import names

SOME = [method for method, label in zip(METHODS, LABELS, strict=True) if label in QUICK]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_files(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def studies(files: tuple[Path, Path]) -> tuple[Path, Loopback]:
    return carry_out(files, "federation", SOME)


def carry_out(
    files: tuple[Path, Path], name: str, methods: Sequence[Mapping[str, Any]], **changes: Any
) -> tuple[Path, Loopback]:
    """Return the study's folder at the server, and the sites behind the link."""
    raw = settings(*files, files[1].with_name("unused"), methods, **changes)
    folder = write_federation(files[1].with_name(name), raw, files[1], profiles=["group", None])
    link = Loopback({name: folder.site(name) for name in SITES})
    server = Server(folder, link, print, silent)
    server.members.gather()
    server.carry_out()
    return folder.study, link


@pytest.fixture(scope="module")
def simulation(files: tuple[Path, Path]) -> Path:
    return simulate(*files, files[1].with_name("simulation"), cohort=1, methods=SOME)


@pytest.fixture(scope="module")
def batched(files: tuple[Path, Path]) -> Path:
    """A batched simulation, whose sums are taken in another order."""
    folder = simulate(*files, files[1].with_name("batched"), cohort="auto", methods=SOME)
    assert StudyFolder(folder).run("mira", SEED).facts.cohort == 2  # both clients of a round in one pass
    return folder


@pytest.mark.parametrize("label", QUICK)
def test_adapters_and_figures_are_those_of_the_simulation(
    label: str, simulation: Path, studies: tuple[Path, Loopback]
) -> None:
    there, link = studies
    check_same(label, simulation, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")


@pytest.mark.slow
@pytest.mark.parametrize("label", QUICK)
def test_a_batched_simulation_has_the_same_to_a_tolerance(
    label: str, batched: Path, studies: tuple[Path, Loopback]
) -> None:
    there, link = studies
    check_near(label, batched, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")


def test_sites_declare_weights_that_their_base_stores_transposed(tmp_path: Path) -> None:
    tiny.model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    data = small_study.save_data(tmp_path / "data.jsonl", examples=4)
    changes = {"lora": {"target_modules": ["c_attn"]}, "federation": {"rounds": 1, "participation": 1.0}}
    raw = small_study.settings(tmp_path / "base", data, tmp_path / "unused", methods=[{"name": "local"}], **changes)
    folder = write_federation(tmp_path / "federation", raw, data)
    server = Server(folder, Loopback({name: folder.site(name) for name in SITES}), print, silent)
    server.members.gather()
    server.carry_out()
    for name in SITES:
        path = folder.site(name).adapters / "local" / "seed-3" / "adapter_config.json"
        assert json.loads(path.read_text(encoding="utf-8"))["fan_in_fan_out"] is True


def test_scales_and_ranks_of_each_layer_are_those_of_the_simulation(files: tuple[Path, Path]) -> None:
    lora = {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
    methods = [{"name": "mira", "lambda": 0.25, "graph": {"kind": "learned"}}]
    there, link = carry_out(files, "scaled", methods, lora=lora)
    simulation = simulate(*files, files[1].with_name("scaled-simulated"), cohort=1, methods=methods, lora=lora)
    check_same("mira", simulation, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")


@pytest.mark.slow
def test_every_other_method_has_the_bits_of_the_simulation(files: tuple[Path, Path]) -> None:
    """Those of METHODS that are not quick, and all others with their default settings, or those that they need."""
    needed: Mapping[str, Mapping[str, Any]] = {
        "groupavg": {"column": "group"},
        "fedsophia": {"form": "public"},
        "mira": {"graph": {"kind": "groups", "column": "group"}, "neighbours": "stored"},
    }
    known = {str(method["name"]) for method in METHODS} - set(needed)
    simulated_only = {"pooled", "untouched"}  # one has everybody's data; nobody's site trains, or writes an adapter
    others = [{"name": name, **needed.get(name, {})} for name in names() if name not in known | simulated_only]
    rest = [method for method in METHODS if method not in SOME]
    methods = [*rest, *({**method, "label": f"{method['name']}-again"} for method in others)]
    there, link = carry_out(files, "every", methods)
    simulation = simulate(*files, files[1].with_name("every-simulated"), cohort=1, methods=methods)
    for label in (str(method.get("label", method["name"])) for method in methods):
        check_same(label, simulation, there, lambda label, site: link.folders[site].adapters / label / f"seed-{SEED}")
