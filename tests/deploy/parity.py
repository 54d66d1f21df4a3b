"""What a federation and a simulation must have in common: studies of every kind of method, and their comparison."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests import small_study
from tests.deploy.federation import SITES

from fedmira.config.faults import check_config
from fedmira.disk.folders import StudyFolder
from fedmira.engine.events import silent
from fedmira.study import run

METHODS: list[Mapping[str, Any]] = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": {"kind": "groups", "column": "group"}},
    {"name": "mira", "label": "auto", "lambda": "auto", "graph": {"kind": "groups", "column": "group"}},
    {"name": "fedavg", "label": "fedsa", "with": [{"name": "only", "travels": "A"}]},
    {"name": "fedavg_ft", "steps": 2},
    {"name": "fedsophia", "tau": 2},
    {"name": "fedptuning"},
    {"name": "flexlora"},
    {"name": "tests.laws.fedex", "label": "fedex"},
    {"name": "mira", "label": "file", "lambda": 0.25, "graph": {"kind": "file", "path": "graph.csv"}},
    {"name": "dfedu", "lambda": 0.25, "graph": {"kind": "file", "path": "graph.csv"}},
    {
        "name": "mira",
        "label": "counts",
        "lambda": 0.25,
        "graph": {"kind": "knn", "features": "histogram", "column": "group", "degree": 1},
    },
    {"name": "mira", "label": "prompts", "lambda": 0.25, "graph": {"kind": "knn", "measure": "distance"}},
    {"name": "ditto"},  # a row that stays at the client
    {"name": "scaffold", "training": {"optimizer": "sgd"}},  # variates beside the rows, and at the client
    {"name": "flora"},  # what is added to the base
    {"name": "feddpa"},  # two adapters and a gate
]
LABELS = tuple(str(method.get("label", method["name"])) for method in METHODS)
ROUNDED = ("prompts",)  # similarities of embeddings: passes of one site have other last digits than those of all
QUICK = ("mira", "auto", "fedsa", "fedptuning", "flexlora", "fedex", "prompts", "ditto", "scaffold", "feddpa")
SEED = 3

# Of a batched simulation from a federation: of the largest number of an adapter, and of a figure. Measured: up to 2e-5,
# and 3e-4 where a step more at a high rate, or a cut of singular values, makes more of it.
TOLERANCE = 1e-3

AdapterOf = Callable[[str, str], Path]  # (label, site) -> the folder of the site's own adapter


def save_files(here: Path) -> tuple[Path, Path]:
    """Write a base, the data of all sites, and beside it the graph that a method reads."""
    base, data = small_study.save_base(here / "base"), small_study.save_data(here / "data.jsonl")
    rows = [line for line in data.read_text().splitlines() if json.loads(line)["client"] in SITES]
    data.write_text("\n".join(rows) + "\n")
    edges = f"client,neighbour,weight\n{SITES[0]},{SITES[1]},2\n{SITES[1]},{SITES[2]},0.5\n"
    data.with_name("graph.csv").write_text(edges)
    return base, data


def settings(
    base: Path, data: Path, output: Path, methods: Sequence[Mapping[str, Any]] = METHODS, **changes: Any
) -> dict[str, Any]:
    chosen = json.loads(json.dumps(list(methods)).replace("graph.csv", str(data.with_name("graph.csv"))))
    return small_study.settings(
        base,
        data,
        output,
        federation={"rounds": 3, "participation": 0.67, "cohort": 1},
        training={"local_steps": 2, "batch_size": 2, "learning_rate": 0.3, "keep_optimizer": True},
        methods=chosen,
        **changes,
    )


def simulate(
    base: Path,
    data: Path,
    output: Path,
    *,
    cohort: int | str,
    methods: Sequence[Mapping[str, Any]] = METHODS,
    **changes: Any,
) -> Path:
    """Carry out the study in a simulation; return its folder."""
    raw = settings(base, data, output, methods, **changes)
    raw["federation"]["cohort"] = cohort
    run.start(StudyFolder(output), check_config(raw), silent, overwrite=False)
    return output


def check_same(label: str, simulation: Path, federation: Path, adapter_of: AdapterOf) -> None:
    """Assert that a method's results and the adapters of all sites are those of the simulation, bit for bit."""
    if label not in ROUNDED:
        one, other = small_study.outcome(simulation), small_study.outcome(federation)
        for name in (f"{label}/seed-{SEED}/results.csv", f"{label}/seed-{SEED}/metrics.jsonl"):
            assert one[name] == other[name]
    for expected, found in adapters(label, simulation, adapter_of):
        assert set(found) == set(expected)
        bound = 1e-6 if label in ROUNDED else 0.0
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=bound) for name in expected)


def check_near(label: str, simulation: Path, federation: Path, adapter_of: AdapterOf) -> None:
    """Assert the same of a batched simulation, to the tolerance: its sums are taken in another order."""
    one, other = (results(folder / label / f"seed-{SEED}") for folder in (simulation, federation))
    assert set(one) == set(other)
    for name, value in one.items():
        assert abs(value - other[name]) <= TOLERANCE * abs(value), name
    for expected, found in adapters(label, simulation, adapter_of):
        largest = max(float(value.abs().max()) for value in expected.values())
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE * largest)


def adapters(label: str, simulation: Path, adapter_of: AdapterOf) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (of the simulation, of the site) for each site."""
    expected = simulation / label / f"seed-{SEED}" / "adapters"
    file = "adapter_model.safetensors"
    return [(load_file(expected / site / file), load_file(adapter_of(label, site) / file)) for site in SITES]


def results(run_folder: Path) -> dict[tuple[str, ...], float]:
    """Return the figures of results.csv by what they are of."""
    with (run_folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("client", "round", "view", "split", "metric")
    return {tuple(row[name] for name in names): float(row["value"]) for row in rows}
