"""Studies with privacy: what is spent is said, a budget ends a run, kills cost nothing, and what leaks is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.faults.figures import Note
from tests.small_study import command, differences, ended_well, kill_at_random, outcome

from fedmira.disk.folders import RunFolder
from fedmira.engine import ledger
from fedmira.privacy import budget
from fedmira.privacy.accountant import Release, epsilon
from fedmira.reports.facts import notices, setup_facts
from fedmira.reports.record import read_study

pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
ROUNDS, STEPS, BATCH = 3, 2, 2
SMALLEST = 6  # training examples of the clients that have fewest
ALL = {"rounds": ROUNDS, "participation": 1.0, "cohort": 6}
FEDAVG = [{"name": "fedavg"}]
SPENT = epsilon({Release(BATCH / SMALLEST, 1, 1.0): ROUNDS * STEPS}, 1e-5)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def make(inputs: tuple[Path, Path], tmp_path: Path) -> Make:
    def write(name: str, **changes: Any) -> Path:
        changes = {"federation": ALL, "methods": FEDAVG, **changes}
        changes["privacy"] = {"epsilon": 20.0, **changes.get("privacy", {})}
        raw = small_study.settings(*inputs, tmp_path / name, **changes)
        return small_study.save_config(tmp_path / f"{name}.yaml", raw)

    return write


def run_of(study: Path, label: str = "fedavg") -> Path:
    return study / label / "seed-3"


def facts(study: Path, label: str = "fedavg") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_of(study, label) / "run.json").read_text())
    return found


def test_a_run_says_what_it_has_spent_and_tells_no_loss(make: Make, tmp_path: Path) -> None:
    methods = [{"name": "fedavg"}, {"name": "local"}, {"name": "ditto"}, {"name": "untouched"}]
    ended_well("run", make("study", methods=methods, training={"keep_optimizer": True}))
    study = tmp_path / "study"
    said = facts(study)["privacy"]
    assert said["epsilon"] == SPENT == facts(study, "local")["privacy"]["epsilon"]
    assert (said["steps"], said["sampling"], said["validation"]) == (ROUNDS * STEPS, "Poisson", False)
    assert "zero-out" in said["adjacency"]
    assert max(said["epsilons"].values()) == SPENT
    assert facts(study, "ditto")["privacy"]["epsilon"] == epsilon({Release(BATCH / SMALLEST, 2, 1.0): 6}, 1e-5)
    assert facts(study, "untouched")["privacy"]["epsilon"] == 0
    for record in RunFolder(run_of(study)).records():
        assert {*record["train_loss"], *record["loss_before"], *record["loss_after"]} == {None}
        assert record["tokens"] == RunFolder(run_of(study)).records()[0]["tokens"]  # of no sample
    assert not (run_of(study) / "noise.key").exists()
    card = next((run_of(study) / "adapters").glob("*/README.md")).read_text()
    assert "privacy of a training example: epsilon" in card
    assert "tokens with a loss" not in card
    record = read_study(study)
    (line,) = (said for what, said in setup_facts(record) if what == "Privacy of fedavg/seed-3")
    assert "at delta 1e-05" in line
    assert "Poisson sampling, 6 local steps at most" in line
    assert any("the sum of their epsilons" in notice for notice in notices(record))


def test_a_run_ends_before_its_budget_is_exceeded(make: Make, tmp_path: Path) -> None:
    two = epsilon({Release(BATCH / SMALLEST, 1, 1.0): 2 * STEPS}, 1e-5)
    config = make("study", privacy={"epsilon": two + 0.01})
    ended = command("run", config)
    assert ended.code == 0, ended.err
    said = facts(tmp_path / "study")
    assert (said["state"], said["stopped_early"]["round"], said["privacy"]["epsilon"]) == ("complete", 2, two)
    assert "above the budget" in said["stopped_early"]["reason"]
    assert "spent after round 2 of 3" in (run_of(tmp_path / "study") / "log.txt").read_text()


def test_a_budget_for_no_round_at_all_is_refused_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    ended = command("run", make("study", privacy={"epsilon": 0.5}))
    assert ended.code == 2
    assert "one round takes a client's epsilon to" in ended.err
    assert not (tmp_path / "study").exists()


def kill_at(moment: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Kill a command in round 2: as it pays, before what it pays is on disk; or after, before its checkpoint is."""
    module, name = {"paying": (budget, "append_lines"), "paid": (ledger, "save_checkpoint")}[moment]
    original = getattr(module, name)

    def deadly(path: Path, second: Any, *rest: Any, **options: Any) -> Any:
        if '"round": 2' in str(second) or second == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, second, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, deadly)
        assert command(*arguments).code == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["paying", pytest.param("paid", marks=pytest.mark.slow)])
def test_a_kill_costs_nothing_and_the_same_noise_follows(
    moment: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ends go on from one key: what the one draws for the round that was under way, the other draws as well."""
    study, twin = tmp_path / "study", tmp_path / "twin"
    kill_at(moment, monkeypatch, "run", make("study"))
    assert len((run_of(study) / "privacy.jsonl").read_text().splitlines()) == (1 if moment == "paying" else 2)
    assert (run_of(study) / "noise.key").exists()
    shutil.copytree(study, twin)
    for folder in (study, twin):
        ended_well("resume", folder)
    assert differences(outcome(study), outcome(twin)) == []
    assert facts(study)["privacy"]["epsilon"] == SPENT == facts(twin)["privacy"]["epsilon"]
    paid = (run_of(study) / "privacy.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in paid] == [1, 2, 3]


@pytest.mark.slow
def test_a_round_that_is_carried_out_again_with_a_new_key_is_paid_for_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study"
    kill_at("paid", monkeypatch, "run", make("study"))
    (run_of(study) / "noise.key").unlink()
    ended_well("resume", study)
    paid = (run_of(study) / "privacy.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in paid] == [1, 2, 2, 3]
    assert facts(study)["privacy"]["epsilon"] == epsilon({Release(BATCH / SMALLEST, 1, 1.0): 4 * STEPS}, 1e-5)


@pytest.mark.slow
def test_rounds_that_are_added_are_paid_for_and_newcomers_are_refused(
    inputs: tuple[Path, Path], make: Make, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    ended_well("run", make("study"))
    ended_well("resume", study, f"federation.rounds={ROUNDS + 1}")
    assert facts(study)["privacy"]["epsilon"] == epsilon({Release(BATCH / SMALLEST, 1, 1.0): 4 * STEPS}, 1e-5)
    adapted = command("adapt", run_of(study), "--data", inputs[1])
    assert adapted.code == 2
    assert "a newcomer would train without" in adapted.err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(21))
def test_two_hundred_kills_leave_epsilon_as_it_is(seed: int, make: Make, tmp_path: Path, note: Note) -> None:
    study = tmp_path / "study"
    kills = kill_at_random(make("study"), study, seed=seed, attempts=10, within=100)
    assert facts(study)["privacy"]["epsilon"] == SPENT
    note("kills of a study with private gradients", kills, {"another epsilon in the end": 0})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"evaluation": {"keep": "best"}}, "evaluation.keep: best chooses by losses"),
        ({"federation": {**ALL, "early_stopping": {"patience": 1}}}, "federation.early_stopping chooses by losses"),
        ({"methods": [{"name": "pooled"}]}, "'pooled' trains on all data in one place"),
        ({"methods": [{"name": "fedsophia"}]}, "'fedsophia' needs more of training examples than gradients"),
        ({"methods": [{"name": "fedavg_ft"}]}, "after the last round"),
        ({"methods": [{"name": "feddpa"}]}, "keeps the mean of training prompts"),
        ({"methods": [{"name": "fedfomo"}]}, "'fedfomo' chooses by losses on validation examples"),
        ({"methods": [{"name": "mira", "lambda": "auto"}]}, "'mira' lets clients train, or choose, after"),
        ({"methods": [{"name": "mira", "lambda": 0.1, "accept": {}}]}, "'mira' chooses by losses"),
        ({"methods": [{"name": "mira", "lambda": 0.1, "graph": {"kind": "knn"}}]}, "a profile of the clients' data"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_whatever_looks_at_examples_unpaid_is_refused_by_name(
    changes: dict[str, Any], why: str, make: Make, tmp_path: Path
) -> None:
    ended = command("run", make("study", **changes))
    assert ended.code == 2, ended.err
    assert why in " ".join(ended.err.split())
    assert not (tmp_path / "study").exists()


def test_a_comparison_that_tunes_is_refused(make: Make, tmp_path: Path) -> None:
    ended = command("compare", make("study", privacy={"validation": True}))
    assert ended.code == 2
    assert "spends its own epsilon" in ended.err


def test_choosing_by_validation_examples_is_allowed_once_they_need_no_privacy(make: Make, tmp_path: Path) -> None:
    config = make("study", methods=[{"name": "fedfomo"}], evaluation={"keep": "best"}, privacy={"validation": True})
    ended_well("run", config)
    said = facts(tmp_path / "study", "fedfomo")
    assert said["privacy"]["validation"] is True
    assert said["validation_loss"] is not None
    assert any("losses on validation examples" in notice for notice in notices(read_study(tmp_path / "study")))


def test_without_the_extra_the_error_says_what_to_install(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    ended = command("run", make("study"))
    assert ended.code == 2
    assert "pip install 'fedmira[dp]'" in ended.err
