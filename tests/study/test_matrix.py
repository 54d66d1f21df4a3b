"""`fedmira compare --matrix`: every adapter on every client, against PEFT; nothing twice, and too many refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import small_study
from transformers import AutoModelForCausalLM

from fedmira.config.sections import Config
from fedmira.disk.folders import MATRIX, RunFolder
from fedmira.engine.events import Event
from fedmira.errors import ConfigError
from fedmira.study import matrix as matrices
from fedmira.study.compare import compare
from fedmira.study.events import RunBegun, StepBegun
from fedmira.study.face import resume
from fedmira.study.loading import check
from fedmira.study.run import Common

METHODS = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.5, "graph": {"kind": "groups", "column": "group"}},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("matrix")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def config(made: tuple[Path, Path], output: Path, *, mixed: bool = False, **changes: Any) -> Config:
    federation = {"rounds": 2, "participation": 1.0}
    raw = small_study.settings(*made, output, **{"methods": METHODS, "federation": federation, **changes})
    if mixed:
        raw["lora"] = {**raw["lora"], "ranks": [1, 2, 1, 2, 1, 2]}
        del raw["lora"]["r"]
    return check(raw, "study.yaml")


def read(run: Path) -> dict[tuple[str, str], float]:
    with (run / MATRIX).open(encoding="utf-8", newline="") as file:
        return {(line["adapter"], line["client"]): float(line["loss"]) for line in csv.DictReader(file)}


def peft_loss(base: Path, folder: Path, examples: Any) -> float:
    """Test loss by transformers and PEFT alone, one example after the other."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        for start, stop in example.labelled:
            total -= sum(float(logits[place - 1, ids[0, place]]) for place in range(start, stop))
            count += stop - start
    return total / count


@pytest.mark.slow
def test_a_loss_is_that_of_peft_with_the_other_clients_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    settled = config(made, tmp_path / "out", mixed=True, methods=[METHODS[0]])
    study = compare(settled, budget=1, observer=lambda event: None, matrix=True)
    clients = Common().prepare(settled, lambda event: None).workplace.clients
    found = read(study / "local" / "seed-3")
    ids = [client.id for client in clients]
    assert set(found) == {(adapter, client) for adapter in ids for client in ids}
    for adapter in (0, 1):
        for client in (0, 3):
            folder = study / "local" / "seed-3" / "adapters" / ids[adapter]
            expected = peft_loss(made[0], folder, clients[client].test)
            assert found[ids[adapter], ids[client]] == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 6) for value in found.values()}) == 36, "two adapters or two tests are the same"


@pytest.mark.slow
def test_the_diagonal_is_what_the_study_reports_and_a_shared_adapter_has_no_matrix(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    study = compare(config(made, tmp_path / "out"), budget=1, observer=lambda event: None, matrix=True)
    assert not (study / "fedavg" / "seed-3" / MATRIX).exists()
    for label in ("local", "mira"):
        found = read(study / label / "seed-3")
        with (study / label / "seed-3" / "results.csv").open(encoding="utf-8", newline="") as file:
            tests = {
                line["client"]: float(line["value"])
                for line in csv.DictReader(file)
                if line["round"] == "2" and (line["split"], line["metric"]) == ("test", "loss")
            }
        assert tests == pytest.approx({client: found[client, client] for client in tests}, abs=1e-6)
        assert len(tests) == 6
        mean = (tmp_path / "out" / "matrix" / f"matrix-{label}.csv").read_text(encoding="utf-8").splitlines()
        assert len(mean) == 1 + 36


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_falls_with_its_adapters(made: tuple[Path, Path], tmp_path: Path) -> None:
    settled = config(made, tmp_path / "out", methods=METHODS[:1])
    events: list[Event] = []
    study = compare(settled, budget=1, observer=events.append, matrix=True)
    told = [event.what for event in events if isinstance(event, StepBegun)]
    assert "crossing the adapters of local, seed 3" in told
    before = (study / "local" / "seed-3" / MATRIX).read_bytes()
    again: list[Event] = []
    compare(settled, budget=1, observer=again.append, matrix=True)
    assert not [event for event in again if isinstance(event, StepBegun | RunBegun)]
    assert (study / "local" / "seed-3" / MATRIX).read_bytes() == before
    resume(study, ["federation.rounds=3"])
    assert not (study / "local" / "seed-3" / MATRIX).exists(), "a matrix of adapters that are no longer there"


def test_too_many_clients_are_refused_before_anything_is_trained(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "MOST_CLIENTS", 5)
    events: list[Event] = []
    with pytest.raises(ConfigError, match=r"6 clients is 36 tests; at most 5 .*data\.clients\.first=5"):
        compare(config(made, tmp_path / "out"), budget=1, observer=events.append, matrix=True)
    assert not [event for event in events if isinstance(event, RunBegun)]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_says_who_would_gain_and_prints_results_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    raw = config(made, tmp_path / "out", methods=METHODS[:1]).model_dump(mode="json", by_alias=True)
    path = small_study.save_config(tmp_path / "study.yaml", raw)
    done = small_study.command("compare", path, "--budget", 1, "--matrix", "-q", "--json")
    assert done.code == 0, done.err
    json.loads(done.out)
    assert "of 6 clients would have a lower test loss with some other client's adapter" in done.err
    assert RunFolder(tmp_path / "out" / "comparison" / "local" / "seed-3").facts.state == "complete"
    assert small_study.command("run", path, f"output_dir={tmp_path / 'out' / 'comparison'}", "--overwrite").code == 0
