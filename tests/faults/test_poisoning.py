"""Poisoned adapters that pass the gate: how far honest clients drift, with `clip` and where each chooses its pull."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import small_study
from tests.faults.figures import Note

import fedmira
from fedmira.config.faults import check_config

pytestmark = pytest.mark.slow

CLIENTS = 8
ROUNDS = 10
CLIP = 0.05  # about a quarter of a difference between two honest clients
FACTORS = (1.0, 100.0, 10_000.0)
Drift = Callable[..., float]


@pytest.fixture(scope="module")
def drift_of(tmp_path_factory: pytest.TempPathFactory) -> Drift:
    """How far the worst honest client ends from where it ends alone, in lengths of its adapter there."""
    here = tmp_path_factory.mktemp("poisoned")
    base = small_study.save_base(here / "base")
    rows = []
    dice = torch.Generator().manual_seed(5)
    for client in range(CLIENTS):
        for _ in range(10):
            words = [
                f"w{word}" for word in torch.randint(2 + 5 * (client % 4), 12 + 5 * (client % 4), (6,), generator=dice)
            ]
            rows.append({"prompt": " ".join(words[:4]), "completion": " ".join(words[4:]), "client": f"c{client}"})
    data = here / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    count = iter(range(100))

    def adapters(method: dict[str, Any]) -> list[torch.Tensor]:
        raw = small_study.settings(
            base,
            data,
            here / f"study-{next(count)}",
            federation={"rounds": ROUNDS, "participation": 1.0, "cohort": CLIENTS},
            methods=[{**method, "label": "run"}],
            evaluation={"metrics": ["loss"]},
        )
        raw["data"]["clients"] = {"by": "client"}
        folder = fedmira.run(check_config(raw)).path / "run" / "seed-3" / "adapters"
        found = [load_file(path) for path in sorted(folder.glob("*/adapter_model.safetensors"))]
        return [torch.cat([one[name].flatten() for name in sorted(one)]) for one in found]

    alone = adapters({"name": "local"})

    def drift(attackers: int = 0, **settings: Any) -> float:
        found = adapters({"name": "tests.faults.poisoned", "attackers": attackers, **settings})
        honest = range(CLIENTS // 4, CLIENTS)  # the same clients in each run
        return max(float((found[k] - alone[k]).norm() / alone[k].norm()) for k in honest)

    return drift


def test_without_clip_a_poisoned_adapter_takes_the_others_along(drift_of: Drift, note: Note) -> None:
    ratio = drift_of(1, factor=100.0) / drift_of()
    note(f"poisoned by 1 of {CLIENTS}, no clip", 1, {"100x": ratio})
    assert ratio > 100


@pytest.mark.parametrize("attackers", [1, CLIENTS // 4])
def test_with_clip_honest_clients_drift_as_in_a_clean_run(attackers: int, drift_of: Drift, note: Note) -> None:
    clean = drift_of(clip=CLIP)
    found = {f"{factor:g}x": drift_of(attackers, clip=CLIP, factor=factor) / clean for factor in FACTORS}
    note(f"poisoned by {attackers} of {CLIENTS}, clip", len(found), {**found, "clean": clean})
    assert max(found.values()) <= 1.2


def test_of_clients_that_choose_their_pull_the_drift_is_measured_and_at_the_usual_norm_small(
    drift_of: Drift, note: Note
) -> None:
    """Longer rows are only reported: clients did take poisoned means of them."""
    clean = drift_of(auto=True)
    found = {f"{factor:g}x": drift_of(CLIENTS // 4, auto=True, factor=factor) / clean for factor in FACTORS}
    note(f"poisoned by {CLIENTS // 4} of {CLIENTS}, lambda auto", len(found), {**found, "clean": clean})
    assert found["1x"] <= 1.2
