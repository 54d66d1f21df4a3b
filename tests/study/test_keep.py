"""A study that keeps the best rounds and stops early: what its folder, report and commands say, and after kills too."""

import csv
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.small_study import command, differences, outcome, run_folders

import fedmira
from fedmira.config.faults import check_config
from fedmira.errors import ConfigError

# its fixtures take long: one worker makes them
pytestmark = pytest.mark.xdist_group("keep")

METHODS = [dict(small_study.METHODS[1]), dict(small_study.METHODS[2])]
# At this rate losses rise from about the second round on.
SETTINGS: Mapping[str, Any] = {
    "methods": METHODS,
    "training": {"learning_rate": 0.3, "keep_optimizer": True},
    "federation": {"rounds": 9, "early_stopping": {"patience": 3}},
    "evaluation": {"keep": "best", "metrics": ["loss"]},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


def save(inputs: tuple[Path, Path], study: Path, **changes: Any) -> Path:
    return small_study.save_config(
        study.with_suffix(".yaml"), small_study.settings(*inputs, study, **SETTINGS | changes)
    )


@pytest.fixture(scope="module")
def study(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "study"
    ended = command("run", save(inputs, path))
    assert ended.code == 0, ended.err
    (path.parent / "out").write_text(ended.out)
    (path.parent / "err").write_text(ended.err)
    return path


def rounds_of(run: Path) -> dict[str, list[int]]:
    """The rounds of each client's test results after the start, ascending."""
    found: dict[str, list[int]] = {}
    for row in csv.DictReader((run / "results.csv").read_text().splitlines()):
        if row["split"] == "test" and row["round"] != "0":
            found.setdefault(row["client"], []).append(int(row["round"]))
    return {client: sorted(rounds) for client, rounds in found.items()}


def test_the_folder_says_which_round_is_kept_and_why_the_run_ended(study: Path) -> None:
    for run in map(fedmira.load_run, run_folders(study)):
        facts, count = run.facts, len(run.rounds)
        assert (facts.state, facts.keep) == ("complete", "best")
        assert count < facts.rounds == 9
        assert facts.stopped_early is not None
        assert facts.stopped_early["round"] == count
        assert run.rounds[-1]["stopped_early"] == facts.stopped_early["reason"]
        assert "did not fall in 3 validations in a row" in facts.stopped_early["reason"]
        kept = {client: rounds[0] for client, rounds in rounds_of(run.path).items()}
        assert {rounds[-1] for rounds in rounds_of(run.path).values()} == {count}
        assert facts.kept_rounds is not None
        assert (facts.kept_rounds[0], facts.kept_rounds[2]) == (min(kept.values()), max(kept.values()))
        assert min(kept.values()) < count
        for client, number in kept.items():
            card = (run.adapters(client) / "README.md").read_text()
            assert f"- rounds: {count}, of which" in card
            assert f"- kept: the adapter after round {number}, the best by validation loss" in card or number == count
        assert f"stopped early after round {count} of 9" in (run.path / "log.txt").read_text()


def test_the_report_shows_what_is_kept_and_beside_it_the_last_round(study: Path) -> None:
    summary = json.loads((study / "summary.json").read_text())["metrics"]["loss"]
    for method, last in zip(summary["methods"], summary["of_last_round"], strict=True):
        (run,) = [fedmira.load_run(path) for path in run_folders(study) if path.parent.name == method["method"]]
        rows = list(csv.DictReader((run.path / "results.csv").read_text().splitlines()))
        tests = [row for row in rows if row["split"] == "test" and row["round"] != "0"]
        kept = {row["client"]: float(row["value"]) for row in sorted(tests, key=lambda row: -int(row["round"]))}
        newest = {row["client"]: float(row["value"]) for row in sorted(tests, key=lambda row: int(row["round"]))}
        assert method["mean"] == pytest.approx(sum(kept.values()) / len(kept))
        assert last["mean"] == pytest.approx(sum(newest.values()) / len(newest))
        assert method["mean"] != last["mean"]
    page, out, err = (
        (study / "report.html").read_text(),
        *((study.parent / name).read_text() for name in ("out", "err")),
    )
    for text in ("Stopped early, as the config asks", "the best round by validation loss", " of the last round</dt>"):
        assert text in page
    assert "stopped early: fedavg/seed-3 after round" in " ".join(out.split())
    assert "adapters of the best round by validation loss" in " ".join(out.split())
    assert "fedavg, seed 3: stopped early after round" in err


# 75: in the first run, which keeps the rows of an earlier round; 120: in the second
@pytest.mark.slow
@pytest.mark.parametrize("count", [75, 120])
def test_a_kill_changes_neither_what_is_kept_nor_when_the_run_stops(
    count: int, inputs: tuple[Path, Path], tmp_path: Path, study: Path
) -> None:
    config = save(inputs, tmp_path / "study")
    assert command("run", config, die_at=count).code == -signal.SIGKILL
    ended = command("resume", tmp_path / "study")
    assert ended.code == 0, ended.err
    assert differences(outcome(tmp_path / "study"), outcome(study)) == []


@pytest.mark.slow
def test_more_rounds_leave_a_run_that_stopped_as_it_is(study: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = save(inputs, tmp_path / "study")
    assert command("run", config, "methods=[{name: fedavg}]").code == 0
    before = outcome(tmp_path / "study")
    ended = command("resume", tmp_path / "study", "federation.rounds=12")
    assert ended.code == 0, ended.err
    after = outcome(tmp_path / "study")
    assert {name for name in differences(before, after) if not name.endswith("README.md")} == set()
    assert "of 12: the mean validation loss did not fall" in ended.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": {"keep": "best"}}, "evaluation.keep: best needs a validation loss"),
        ({"federation": {"early_stopping": {"patience": 1}}}, "federation.early_stopping needs a validation loss"),
    ],
)
def test_without_any_validation_example_nothing_can_be_chosen(
    changes: dict[str, Any], words: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    raw = small_study.settings(*inputs, tmp_path / "study", **changes)
    raw["data"]["split"] = {"validation": 0.0, "test": 0.2}
    with pytest.raises(ConfigError, match=words):
        fedmira.run(check_config(raw))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": {"keep": "first"}}, "evaluation.keep: found 'first'"),
        ({"federation": {"early_stopping": {"patience": 0}}}, "federation.early_stopping.patience: found 0"),
        ({"federation": {"early_stopping": {"patience": 1, "threshold": -1}}}, "early_stopping.threshold: found -1"),
        ({"federation": {"early_stopping": {}}}, "federation.early_stopping.patience"),
        ({"federation": {"early_stopping": {"patience": 1, "min_delta": 0.1}}}, "min_delta"),
    ],
)
def test_other_values_are_refused(
    changes: dict[str, Any], words: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(small_study.settings(*inputs, tmp_path / "study", **changes))
    assert words in str(caught.value)
