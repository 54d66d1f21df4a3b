"""`fedmira adapt`: a client that comes when the study is over, against PEFT and against a study that has it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import small_study
from tests.study.test_matrix import peft_loss

from fedmira.disk.checkpoints import load_chain
from fedmira.disk.folders import RunFolder
from fedmira.engine.events import silent
from fedmira.errors import ConfigError, DataError, MethodError, StoreError
from fedmira.evaluation.measure import measure_loss
from fedmira.study.adapt import FACTS, Adapted, _read, adapt
from fedmira.study.face import resume, run
from fedmira.study.loading import check
from fedmira.study.run import Common

NEW = "eve"
GROUPS = {"kind": "groups", "column": "group"}
METHODS: list[dict[str, Any]] = [
    {"name": "local"},
    {"name": "fedavg"},
    {"name": "mira", "lambda": 0.25, "graph": GROUPS},
    {"name": "mira", "label": "auto", "lambda": "auto", "graph": GROUPS, "choice": {"graphs": ["given", "global"]}},
    {"name": "ditto"},
    {"name": "feddpa"},
    {"name": "fedrep"},
    {"name": "flora"},
    {"name": "pooled"},
]
ALL = [str(method.get("label", method["name"])) for method in METHODS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the data of five clients, that of a sixth in a file of its own, and a study of the five."""
    folder = tmp_path_factory.mktemp("adapt")
    small_study.save_base(folder / "base")
    rows = small_study.save_data(folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, keep in (("five", False), (NEW, True)):
        text = "".join(row for row in rows if (json.loads(row)["client"] == NEW) == keep)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    run(check(settings(folder), "study.yaml"))
    return folder


def settings(folder: Path, data: str = "five.jsonl", output: str = "study", **changes: Any) -> dict[str, Any]:
    federation = {"rounds": 2, "participation": 1.0}
    raw = {"methods": METHODS, "federation": federation, **changes}
    return small_study.settings(folder / "base", folder / data, folder / output, **raw)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapted(made: Path, label: str, output: Path, **options: Any) -> Adapted:
    return adapt(made / "study" / label / "seed-3", made / f"{NEW}.jsonl", output=output, observer=silent, **options)


def losses(done: Adapted) -> dict[str, float]:
    found = {one.what: one.test["loss"] for one in done.scores}
    assert all(isinstance(value, float) for value in found.values())
    return {what: float(value or 0) for what, value in found.items()}


def mean_of(folders: Sequence[Path], target: Path) -> Path:
    """Write the mean of some adapters, factor by factor, as a PEFT folder."""
    file = "adapter_model.safetensors"
    some = [load_file(folder / file) for folder in folders]
    target.mkdir()
    save_file({key: torch.stack([one[key] for one in some]).mean(dim=0) for key in some[0]}, target / file)
    (target / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    return target


def examples(made: Path) -> Any:
    config = check(settings(made), "study.yaml")
    return _read(config, made / f"{NEW}.jsonl", NEW, silent).test


@pytest.mark.parametrize(
    "label", ["mira", "ditto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedrep", "fedavg"))]
)
def test_the_folder_has_in_peft_the_loss_that_is_told_and_the_run_is_as_it_was(
    label: str, made: Path, tmp_path: Path
) -> None:
    before = hashes(made / "study")
    done = adapted(made, label, tmp_path)
    assert hashes(made / "study") == before
    assert done.path == tmp_path / NEW
    assert losses(done)["adapted"] == pytest.approx(peft_loss(made / "base", done.path, examples(made)), rel=1e-5)
    assert len(set(losses(done).values())) >= 3, "the start of fedrep is the untouched base: B is the client's own"
    assert json.loads((done.path / FACTS).read_text(encoding="utf-8"))["scores"][2]["what"] == "adapted"


def test_mira_starts_from_the_mean_of_the_neighbours(made: Path, tmp_path: Path) -> None:
    adapters = made / "study" / "mira" / "seed-3" / "adapters"
    mean = mean_of([adapters / name for name in ("bo", "007")], tmp_path / "mean")
    done = adapted(made, "mira", tmp_path)
    assert losses(done)["start"] == pytest.approx(peft_loss(made / "base", mean, examples(made)), rel=1e-5)


def test_training_alone_is_that_of_a_study_which_has_the_client(made: Path, tmp_path: Path) -> None:
    """One round of as many steps: the same examples in the same order, from the same start."""
    done = adapted(made, "mira", tmp_path, steps=3)
    assert (done.steps, done.examples) == (3, 7)
    changes = {"federation": {"rounds": 1, "participation": 1.0}, "training": {"local_steps": 3}}
    whole = run(check(settings(made, "all.jsonl", "whole", methods=METHODS[:1], **changes), "study.yaml"))
    found = whole.results.query(f"client == '{NEW}' and split == 'test' and metric == 'loss' and round == 1")
    assert losses(done)["alone"] == pytest.approx(float(found["value"].iloc[0]), rel=1e-5)
    untouched = whole.results.query(f"client == '{NEW}' and split == 'test' and metric == 'loss' and round == 0")
    assert losses(done)["untouched base"] == pytest.approx(float(untouched["value"].iloc[0]), rel=1e-6)


def test_with_lambda_auto_the_client_chooses_its_start(made: Path, tmp_path: Path) -> None:
    """Of its neighbours' mean and everybody's, as the server has them, that which is better on its validation."""
    choice = {"graphs": ["given", "global"], "alphas": [1.0], "prior": 0}
    auto = {"name": "mira", "lambda": "auto", "graph": GROUPS, "choice": choice}
    config = check(settings(made, output="chooses", methods=[auto]), "study.yaml")
    (one,) = run(config).runs
    prepared = Common().prepare(config, silent)
    rows = load_chain(one.path / "checkpoints")[-1].files["state"]["rows"]
    assert len(rows) == len(small_study.CLIENTS) - 1
    own = _read(config, made / f"{NEW}.jsonl", NEW, silent)
    places = [place for place, client in enumerate(prepared.workplace.clients) if client.id in ("bo", "007")]
    found: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for graph, some in {"given": rows[places], "global": rows}.items():
        mean = prepared.federation.adapters(torch.tensor([0]), some.mean(dim=0, keepdim=True))
        for split, losses_of in found.items():
            (loss,) = measure_loss(
                prepared.workplace.base, lambda ids, mean=mean: mean, [own], [0], split=split, cohort=1
            )
            losses_of[graph] = float(loss or 0)
    best = min(found["validation"], key=lambda graph: found["validation"][graph])
    assert abs(found["test"]["given"] - found["test"]["global"]) > 1e-3, "a choice that cannot be told apart"
    done = adapt(one.path, made / f"{NEW}.jsonl", output=tmp_path / "out", observer=silent)
    (start,) = [scored for scored in done.scores if scored.what == "start"]
    assert start.validation == pytest.approx(found["validation"][best], rel=1e-5)
    assert start.test["loss"] == pytest.approx(found["test"][best], rel=1e-5)


def test_steps_are_those_of_a_client_of_the_run_and_a_gate_comes_with_its_adapter(made: Path, tmp_path: Path) -> None:
    assert adapted(made, "feddpa", tmp_path).steps == 4  # 2 rounds of 2
    assert (tmp_path / NEW / "gate.safetensors").is_file()
    assert adapted(made, "flora", tmp_path / "flora").steps == 4


def test_a_list_of_ranks_has_none_for_the_client_who_gets_the_usual_one(made: Path, tmp_path: Path) -> None:
    raw = settings(made, output="ranks", methods=METHODS[2:3])
    raw["lora"] = {**raw["lora"], "ranks": [1, 1, 1, 8, 8]}
    del raw["lora"]["r"]
    run(check(raw, "study.yaml"))
    adapt(made / "ranks", made / f"{NEW}.jsonl", output=tmp_path, observer=silent)
    assert json.loads((tmp_path / NEW / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8


def test_what_cannot_be_done_is_refused_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    study, new = made / "study", made / f"{NEW}.jsonl"
    some = study / "mira" / "seed-3"
    with pytest.raises(StoreError, match=r"is a study: give one of its runs: local/seed-3, fedavg/seed-3"):
        adapt(study, new, output=tmp_path, observer=silent)
    with pytest.raises(StoreError, match="is neither a study nor a run"):
        adapt(made, new, output=tmp_path, observer=silent)
    with pytest.raises(ConfigError, match="--client 'Bo': the run has a client of that name"):
        adapt(some, new, client="Bo", output=tmp_path, observer=silent)
    with pytest.raises(MethodError, match="'pooled' has no clients that train"):
        adapt(study / "pooled" / "seed-3", new, output=tmp_path, observer=silent)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        adapt(some, empty, output=tmp_path, observer=silent)
    with pytest.raises(DataError):
        adapt(some, tmp_path / "missing.jsonl", output=tmp_path, observer=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]
    adapted(made, "fedavg", tmp_path)
    with pytest.raises(StoreError, match=r"is there already; choose another --output, or give --overwrite"):
        adapted(made, "fedavg", tmp_path)
    adapted(made, "fedavg", tmp_path, overwrite=True)


def test_a_run_that_is_not_complete_or_whose_data_changed_is_refused(made: Path, tmp_path: Path) -> None:
    folder = made / "changed"
    run(check(settings(made, "five.jsonl", "changed", methods=METHODS[:1]), "study.yaml"))
    only = RunFolder(folder / "local" / "seed-3")
    facts = json.loads((only.path / "run.json").read_text(encoding="utf-8"))
    (only.path / "run.json").write_text(json.dumps({**facts, "state": "interrupted"}), encoding="utf-8")
    with pytest.raises(StoreError, match=r"is interrupted: a new client starts from its end; finish it first"):
        adapt(folder, made / f"{NEW}.jsonl", output=tmp_path, observer=silent)
    resume(folder)
    data = made / "five.jsonl"
    text = data.read_text(encoding="utf-8")
    try:
        data.write_text(text.replace("w", "v", 1), encoding="utf-8")
        with pytest.raises(StoreError, match=r"is not the data this run began with: 1 clients differ, such as 'ada'"):
            adapt(folder, made / f"{NEW}.jsonl", output=tmp_path, observer=silent)
    finally:
        data.write_text(text, encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_line_for_each_adapter(made: Path, tmp_path: Path) -> None:
    words = ["adapt", made / "study" / "mira" / "seed-3", "--data", made / f"{NEW}.jsonl", "--steps", "2"]
    ended = small_study.command(*words, "--output", tmp_path, "--client", "New one", "-q")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line[:14].strip() for line in lines[1:5]] == ["untouched base", "start", "adapted", "alone"]
    assert lines[5] == "7 examples, 2 local steps, from the start of mira and alone"
    folder = Path(lines[6].removeprefix("adapter: "))
    assert (folder / "adapter_model.safetensors").is_file()
    assert "New one" in (folder / "README.md").read_text(encoding="utf-8")
