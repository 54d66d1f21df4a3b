"""Studies whose clients send noise: what that promises is said everywhere, or why it promises nothing."""

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
from fedmira.privacy.accountant import gaussian_epsilon
from fedmira.reports.facts import notices, setup_facts
from fedmira.reports.record import read_study

pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
CLIP, SIGMA = {"name": "clip", "norm": 0.1}, {"name": "noise", "sigma": 1.0}
WITH = [CLIP, SIGMA]
GROUPS = {"kind": "groups", "column": "group"}
MIRA = {"name": "mira", "lambda": 0.25, "graph": GROUPS, "with": WITH}
ROUNDS = 3
SPENT = gaussian_epsilon(1.0 / (2 * 0.1 * (1 + 1e-4)), ROUNDS, 1e-5)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def make(inputs: tuple[Path, Path], tmp_path: Path) -> Make:
    def write(name: str, *methods: dict[str, Any], **changes: Any) -> Path:
        federation = {"rounds": ROUNDS, "participation": 1.0, **changes.pop("federation", {})}
        raw = small_study.settings(*inputs, tmp_path / name, methods=list(methods), federation=federation, **changes)
        return small_study.save_config(tmp_path / f"{name}.yaml", raw)

    return write


def run_of(study: Path, label: str = "mira") -> Path:
    return study / label / "seed-3"


def facts(study: Path, label: str = "mira") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_of(study, label) / "run.json").read_text())
    return found


def notes(study: Path, label: str = "mira") -> list[dict[str, float]]:
    return [record["notes"] for record in RunFolder(run_of(study, label)).records()]


def test_what_noise_promises_and_leaves_stands_in_every_round_and_in_the_end(make: Make, tmp_path: Path) -> None:
    study = tmp_path / "study"
    said = ended_well("run", make("study", {"name": "fedavg", "with": WITH}, MIRA, {"name": "ditto", "with": WITH}))
    for label in ("fedavg", "mira", "ditto"):
        found = facts(study, label)["client_privacy"]
        assert (found["epsilon"], found["uploads"]) == (SPENT, ROUNDS)
        for number, note in enumerate(notes(study, label), 1):
            assert note["epsilon"] == gaussian_epsilon(found["noise_multiplier"], number, 1e-5)
            assert 0 < note["signal_to_noise"] < 0.1
        assert not (run_of(study, label) / "noise.key").exists()
    assert said.count("signal to noise 0.0") == 9
    assert said.count(f"epsilon of a client {SPENT:.3g}") == 3
    cards = {
        label: next((run_of(study, label) / "adapters").glob("*/README.md")).read_text()
        for label in (
            "mira",
            "ditto",
        )
    }
    assert "privacy of each client's data: epsilon" in cards["mira"]
    assert "privacy of each client's data" not in cards["ditto"]  # its own adapter is trained on un-noised rows
    assert "not the adapters that clients keep" in facts(study, "ditto")["client_privacy"]["covers"]
    record = read_study(study)
    (line,) = (said for what, said in setup_facts(record) if what == "Privacy of clients, mira/seed-3")
    assert "replaced by others" in line
    assert "of 3 uploads" in line
    assert any("the signal-to-noise ratio of a round" in notice for notice in notices(record))


def test_who_takes_part_seldom_has_a_smaller_epsilon_and_sampling_counts_for_nothing(
    make: Make, tmp_path: Path
) -> None:
    config = make("study", MIRA, federation={"rounds": 4, "participation": 0.5})
    ended_well("run", config)
    study = tmp_path / "study"
    taking_part = [record["clients"] for record in RunFolder(run_of(study)).records()]
    most = max(sum(client in clients for clients in taking_part) for client in small_study.CLIENTS)
    found = facts(study)["client_privacy"]
    assert most < 4
    assert found["epsilon"] == gaussian_epsilon(found["noise_multiplier"], most, 1e-5)


def test_a_dry_run_says_it_before(make: Make, tmp_path: Path) -> None:
    config = make(
        "study", MIRA, {"name": "fedavg", "with": [SIGMA]}, {"name": "local"}, {"name": "feddpa", "with": WITH}
    )
    ended = command("run", config, "--dry-run")
    assert ended.code == 0, ended.err
    assert "privacy of clients, mira: epsilon of a client is at most 1.33 at delta = 1e-05 after 3 rounds" in ended.out
    assert "privacy of clients, fedavg: noise on uploads promises clients no privacy: an update of any" in ended.out
    assert "privacy of clients, local" not in ended.out
    (own,) = (line for line in ended.out.splitlines() if line.startswith("privacy of clients, feddpa"))
    assert own.endswith("covered: every upload; not the adapters that clients keep, or train, by themselves")


UNFIT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("put clip before noise", {"name": "fedavg", "with": [SIGMA]}, {}),
    ("put clip before noise", {"name": "fedavg", "with": [SIGMA, CLIP]}, {}),
    ("noise is added twice", {"name": "fedavg", "with": [CLIP, SIGMA, SIGMA]}, {}),
    ("sigma is 0", {"name": "fedavg", "with": [CLIP, {**SIGMA, "sigma": 0}]}, {}),
    ("comes from the run's seed", {"name": "fedavg", "with": [CLIP, {**SIGMA, "secret": False}]}, {}),
    ("no client sends an upload", {"name": "local", "with": WITH}, {}),
    ("no client sends an upload", {"name": "pooled", "with": WITH}, {}),
    ("send more than a row", {"name": "fedamp", "with": WITH}, {}),
    ("send more than a row", {"name": "fedfomo", "with": WITH}, {}),
    ("send more than a row", {"name": "dfedu", "lambda": 0.1, "graph": GROUPS, "with": WITH}, {}),
    ("send more than a row", {"name": "mira", "lambda": "auto", "with": WITH}, {}),
    ("accepts or refuses a reply", {**MIRA, "with": [*WITH, {"name": "accepting"}]}, {}),
    ("the graph is made of the clients' data", {**MIRA, "graph": {"kind": "knn", "degree": 2}}, {}),
    ("evaluation.keep: best", MIRA, {"evaluation": {"keep": "best"}}),
    ("federation.early_stopping", MIRA, {"federation": {"early_stopping": {"patience": 1}}}),
]


REASONS = [why for why, _, _ in UNFIT]
CASES = [
    pytest.param(*case, id=f"{case[0]}-{number}", marks=[pytest.mark.slow] * (REASONS.index(case[0]) < number))
    for number, case in enumerate(UNFIT)
]  # one for each reason is quick


@pytest.mark.parametrize(("why", "method", "changes"), CASES)
def test_where_nothing_is_promised_the_dry_run_says_why_and_has_no_epsilon(
    why: str, method: dict[str, Any], changes: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    ended = command("run", make("study", method, **changes), "--dry-run", "--json")
    assert ended.code == 0, ended.err
    (said,) = json.loads(ended.out)["client_privacy"].values()
    assert said.startswith("noise on uploads promises clients no privacy: ")
    assert why in said


def test_a_run_that_promises_nothing_has_no_epsilon_anywhere(make: Make, tmp_path: Path) -> None:
    study = tmp_path / "study"
    said = ended_well("run", make("study", {"name": "fedavg", "with": [SIGMA]}))
    assert "promises clients no privacy" in said
    assert "epsilon" not in said
    assert facts(study, "fedavg")["client_privacy"] == {
        "none": "an update of any length can be told from its noise; put clip before noise"
    }
    assert [set(note) for note in notes(study, "fedavg")] == [{"signal_to_noise"}] * ROUNDS
    assert not (run_of(study, "fedavg") / "uploads.jsonl").exists()
    (line,) = (said for what, said in setup_facts(read_study(study)) if what == "Privacy of clients, fedavg/seed-3")
    assert line.startswith("none is promised by the noise on uploads: an update of any length")


def test_a_delta_that_allows_to_publish_a_client_is_named(make: Make, tmp_path: Path) -> None:
    ended_well("run", make("study", {**MIRA, "with": [CLIP, {**SIGMA, "delta": 0.2}]}))
    assert "is not below 1 / 6, one over the clients" in (run_of(tmp_path / "study") / "log.txt").read_text()


@pytest.mark.slow
def test_after_a_kill_the_same_noise_follows_and_nothing_is_counted_twice(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, twin, save = tmp_path / "study", tmp_path / "twin", ledger.save_checkpoint

    def deadly(folder: Path, number: int, *rest: Any, **options: Any) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(folder, number, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "save_checkpoint", deadly)
        assert command("run", make("study", MIRA)).code == -signal.SIGKILL
    assert len((run_of(study) / "uploads.jsonl").read_text().splitlines()) == 2
    shutil.copytree(study, twin)
    for folder in (study, twin):
        ended_well("resume", folder)
        assert facts(folder)["client_privacy"]["epsilon"] == SPENT
    assert differences(outcome(study), outcome(twin)) == []
    ended_well("resume", study, f"federation.rounds={ROUNDS + 1}")
    assert facts(study)["client_privacy"]["uploads"] == ROUNDS + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_two_hundred_kills_leave_a_clients_epsilon_as_it_is(seed: int, make: Make, tmp_path: Path, note: Note) -> None:
    study = tmp_path / "study"
    kills = kill_at_random(make("study", MIRA), study, seed=seed, attempts=10, within=100)
    assert facts(study)["client_privacy"]["epsilon"] == SPENT
    note("kills of a study with noise on uploads", kills, {"another epsilon in the end": 0})
