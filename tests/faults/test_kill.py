"""Whatever stops a run, and whenever: `fedmira resume` ends with the bits of the run that nobody stopped."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.faults.figures import Note
from tests.small_study import Command, command, differences, outcome, run_folders, start

import fedmira
from fedmira.disk.folders import RunFolder

SECONDS = "seconds"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def make_config(inputs: tuple[Path, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str, **changes: Any) -> Path:
        changes = {"training": {"keep_optimizer": True}, **changes}
        raw = small_study.settings(*inputs, tmp_path / name, **changes)
        return small_study.save_config(tmp_path / f"{name}.yaml", raw)

    return make


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the same study when nobody stops it, and the seconds that it took here and now."""
    study = tmp_path_factory.mktemp("undisturbed") / "study"
    raw = small_study.settings(*inputs, study, training={"keep_optimizer": True})
    config = small_study.save_config(study.with_suffix(".yaml"), raw)
    began = time.monotonic()
    ended = command("run", config)
    assert ended.code == 0, ended.err
    return {**outcome(study), SECONDS: time.monotonic() - began}


def bits(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != SECONDS}


def go_on(study: Path, config: Path) -> None:
    """Resume, or begin where the kill came before anything was written; must end well."""
    begun = (study / "config.yaml").is_file()
    ended = command("resume", study) if begun else command("run", config)
    assert ended.code == 0, ended.err


def states(study: Path) -> set[str]:
    return {RunFolder(run).facts.state for run in run_folders(study)}


def wait_for_round(study: Path, process: Command | subprocess.Popen[bytes]) -> None:
    """Wait until some run of the study has finished a round."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in study.glob("*/seed-*/metrics.jsonl")):
            return
        if isinstance(process, subprocess.Popen) and process.poll() is not None:
            pytest.fail(f"{process} ended by itself: {(study.parent / 'err').read_text()}")
        time.sleep(0.002)
    pytest.fail(f"{process} finished no round")


def kill_at_instants(config: Path, study: Path, instants: list[float], found: Counter[str] | None = None) -> int:
    """Start or resume and SIGKILL after each of `instants` seconds; then let it end. Return how many were killed.

    found: counts in which state each kill left the study.
    """
    kills = 0
    for instant in instants:
        begun = (study / "config.yaml").is_file()
        running = start("resume", study) if begun else start("run", config)
        time.sleep(instant)
        running.signal(signal.SIGKILL)
        code = running.wait().code
        assert code in (-signal.SIGKILL, 0)  # 0: it had ended by itself
        if code:
            kills += 1
            if found is not None:
                found[where(study)] += 1
    go_on(study, config)
    return kills


def where(study: Path) -> str:
    """Say where a kill fell."""
    if not (study / "config.yaml").is_file():
        return "before the study"
    found = states(study)
    if "running" in found:
        return "in the middle of a run"
    return "after a run" if found else "before the first run"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_twice_at_any_instant_ends_with_the_same_bits(
    seed: int, make_config: Callable[..., Path], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    dice = random.Random(seed)
    kill_at_instants(
        make_config("study"), tmp_path / "study", [dice.uniform(0.1, undisturbed[SECONDS]) for _ in range(2)]
    )
    assert differences(outcome(tmp_path / "study"), bits(undisturbed)) == []
    assert states(tmp_path / "study") == {"complete"}


@pytest.mark.slow
def test_kills_at_random_instants_lose_and_repeat_nothing(
    make_config: Callable[..., Path],
    tmp_path: Path,
    note: Note,
    pytestconfig: pytest.Config,
) -> None:
    """Ten in each study of one method, as many as `--kills` says: 40, and 200 for the figures."""
    alone = {"methods": [dict(small_study.METHODS[2])]}
    config, began = make_config("whole", **alone), time.monotonic()
    assert command("run", config).code == 0
    seconds, whole = time.monotonic() - began, outcome(tmp_path / "whole")
    wanted, kills, studies = int(pytestconfig.getoption("--kills")), 0, 0
    states_seen: Counter[str] = Counter()
    while kills < wanted:
        dice, name = random.Random(100 + studies), f"study-{studies}"
        instants = [dice.uniform(0.1, seconds) for _ in range(10)]
        kills += kill_at_instants(make_config(name, **alone), tmp_path / name, instants, states_seen)
        assert differences(outcome(tmp_path / name), whole) == []
        assert states(tmp_path / name) == {"complete"}
        shutil.rmtree(tmp_path / name)
        studies += 1
    assert states_seen["in the middle of a run"] >= kills / 4
    note("kills of `fedmira run` and `resume`, at random instants", kills, {**states_seen, "other bits in the end": 0})


def die_and_go_on(count: int, config: Path, study: Path) -> bool:
    """Kill at the count-th durable step, then go on. False: the run has fewer steps."""
    died = command("run", config, die_at=count).code == -signal.SIGKILL
    go_on(study, config)
    return died


# 14: results.csv is there and run.json is not; 28: round 1 is written, its checkpoint is not; 60: between two rounds
@pytest.mark.parametrize("count", [28, *(pytest.param(count, marks=pytest.mark.slow) for count in (14, 60))])
def test_a_run_killed_just_before_something_becomes_durable_ends_with_the_same_bits(
    count: int, make_config: Callable[..., Path], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert die_and_go_on(count, make_config("study"), tmp_path / "study")
    assert differences(outcome(tmp_path / "study"), bits(undisturbed)) == []


@pytest.mark.slow
def test_no_durable_step_of_a_whole_run_is_one_at_which_a_kill_changes_the_outcome(
    make_config: Callable[..., Path], tmp_path: Path, note: Note
) -> None:
    short = {"federation": {"rounds": 3}, "methods": [dict(small_study.METHODS[2])]}
    assert command("run", make_config("whole", **short)).code == 0
    whole = outcome(tmp_path / "whole")
    for count in range(1, 400):
        name = f"study-{count}"
        died = die_and_go_on(count, make_config(name, **short), tmp_path / name)
        assert differences(outcome(tmp_path / name), whole) == [], count
        if not died:
            note("kills in simulation, at each durable step of a run", count - 1, {"other bits in the end": 0})
            return
    pytest.fail("the run never ended by itself")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow)]
)
def test_a_signal_saves_says_how_to_go_on_and_leaves_the_same_bits(
    number: int, code: int, make_config: Callable[..., Path], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    config, study = make_config("study"), tmp_path / "study"
    running = start("run", config)
    wait_for_round(study, running)
    running.signal(number)
    ended = running.wait()
    assert (ended.code, ended.out) == (code, "")
    assert "fedmira resume" in ended.err
    assert not small_study.has_traceback(ended.err)
    assert "interrupted" in states(study)
    go_on(study, config)
    assert differences(outcome(study), bits(undisturbed)) == []
    assert states(study) == {"complete"}


@pytest.mark.slow
def test_the_module_run_as_a_program_and_killed_can_be_resumed(
    make_config: Callable[..., Path], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    study = tmp_path / "study"
    program = [sys.executable, "-m", "fedmira", "run", str(make_config("study")), "-q"]
    with (tmp_path / "err").open("wb") as err, subprocess.Popen(program, stdout=err, stderr=err) as running:
        wait_for_round(study, running)
        running.kill()
    fedmira.resume(study)
    assert differences(outcome(study), bits(undisturbed)) == []


def test_a_process_that_died_leaves_no_lock_behind(make_config: Callable[..., Path], tmp_path: Path) -> None:
    config = make_config("study")
    running = start("run", config)
    wait_for_round(tmp_path / "study", running)
    running.signal(signal.SIGSTOP)
    second = command("resume", tmp_path / "study")
    assert second.code == 2
    assert "in use" in second.err
    running.signal(signal.SIGKILL)
    running.wait()
    assert command("resume", tmp_path / "study").code == 0
