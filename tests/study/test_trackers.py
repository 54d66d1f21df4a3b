"""Trackers: off unless asked for, every round once whatever happened in between, and nothing that leaves the study.

TensorBoard is itself where it is installed. trackio, wandb and MLflow, which few have, are stand-ins that write what
they are given to a file, so that our processes for them are tested everywhere; the real ones are tested where they are
installed.
"""

import importlib.util
import json
import os
import platform
import shutil
import sqlite3
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import small_study
from tests.small_study import CLIENTS, ROUNDS, command

import fedmira
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.engine.events import Event
from fedmira.errors import ConfigError
from fedmira.study.events import Tracked
from fedmira.study.trackers import check_trackers, measures

LOCAL = [{"name": "local"}]
NAMES = {"train_loss", "validation_loss", "bytes_up", "bytes_down", "seconds"}
STAND_IN = """
import json, os, pathlib

FILE = pathlib.Path(os.environ["TRACKIO_DIR"]) / "fedmira.jsonl"
lines = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def save():
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("".join(json.dumps(line) + "\\n" for line in lines))


class Run:
    def __init__(self, name):
        self.name = name

    def delete(self):
        lines[:] = [line for line in lines if line["run"] != self.name]
        save()


class Api:
    def runs(self, project):
        if not FILE.is_file():
            raise ValueError("no such project")
        return [Run(name) for name in dict.fromkeys(line["run"] for line in lines)]


def init(project, name, group, config, resume, embed, auto_log_gpu, auto_log_cpu):
    global current
    current = {"project": project, "run": name, "group": group, "config": config, "environment": dict(os.environ)}
    print("this must reach nobody")


def log(values, step):
    lines.append({**current, "step": step, "values": values})
    save()


def finish():
    if "FAIL_AT_END" in os.environ:
        raise RuntimeError
    FILE.with_name(f"{os.getpid()}.end").touch()
"""


WANDB_STAND_IN = """
import json, os, pathlib, sys
from types import SimpleNamespace as Settings


def init(project, id, name, group, config, mode, dir, settings):
    about = {"id": id, "run": name, "mode": mode, "environment": dict(os.environ)}
    file = pathlib.Path(dir, "wandb", f"offline-run-{id}.jsonl")
    file.parent.mkdir()  # an earlier start would be in the way
    print("this must reach nobody")

    def log(values, step):
        with file.open("a") as lines:
            lines.write(json.dumps({**about, "step": step, "values": values}) + "\\n")

    return Settings(log=log, finish=lambda: None)
"""
MLFLOW_STAND_IN = """
import json, os, pathlib
from types import SimpleNamespace


class MlflowClient:
    def __init__(self, tracking_uri):
        self.file = pathlib.Path(tracking_uri.removeprefix("sqlite:///"))
        self.lines = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []

    def save(self):
        self.file.write_text("".join(json.dumps(line) + "\\n" for line in self.lines))

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def search_runs(self, experiments, words):
        found = {line["run"] for line in self.lines} & {words.split("'")[1]}
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in found]

    def delete_run(self, run):
        self.lines = [line for line in self.lines if line["run"] != run]

    def create_run(self, experiment, run_name, tags):
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_param(self, run, key, value):
        pass

    def log_metric(self, run, key, value, step):
        self.lines.append({"run": run, "step": step, "values": {key: value}, "environment": dict(os.environ)})
        self.save()

    def set_terminated(self, run):
        pass
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return small_study.save_base(folder / "base"), small_study.save_data(folder / "data.jsonl")


@pytest.fixture
def raw(inputs: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    return small_study.settings(*inputs, tmp_path / "study", methods=LOCAL, evaluation={"metrics": ["loss"]})


def tracked(raw: dict[str, Any], *names: str, **changes: Any) -> Config:
    return check_config({**raw, **changes, "report_to": list(names)})


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trackio that this process finds, and the one that it starts."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def noted(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / ".trackio" / "fedmira.jsonl").read_text().splitlines()]


def steps(study: Path, run: str = "local/seed-3") -> list[int]:
    return [line["step"] for line in noted(study) if line["run"] == run]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reader: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(one.step, one.value) for one in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (an extra of fedmira)")


# ---------------------------------------------------------------- off, missing, wrong


def test_without_report_to_nothing_is_tracked_and_nothing_imported(raw: dict[str, Any], tmp_path: Path) -> None:
    before = set(sys.modules)
    fedmira.run(tracked(raw))
    assert not [
        name for name in set(sys.modules) - before if name.startswith(("tensorboard", "trackio", "wandb", "mlflow"))
    ]
    assert "report_to: []" in (tmp_path / "study" / "config.yaml").read_text()
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        *("config.yaml", "summary.json", "report.html", "results.csv", "local", ".lock"),
    }
    assert not (tmp_path / "study" / "local" / "seed-3" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra_before_anything_is_done(
    name: str, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    raw["data"]["path"] = str(tmp_path / "nowhere.jsonl")  # would be told next
    with pytest.raises(ConfigError, match=rf"{name} is not installed; install it with pip install 'fedmira\[{name}\]'"):
        fedmira.run(tracked(raw, name))
    assert not (tmp_path / "study").exists()


def test_a_missing_package_stops_a_resume_too(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: None
) -> None:
    fedmira.run(tracked(raw, "trackio", federation={"rounds": 1}))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio is not installed"):
        fedmira.resume(tmp_path / "study", ["federation.rounds=2"])


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="trackio is not installed"):
        check_trackers(["trackio"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["comet"], "report_to.0: found 'comet': input should be 'tensorboard', 'trackio', 'wandb' or 'mlflow'"),
        ("trackio", "report_to: found 'trackio': input should be a valid list"),
        (["trackio", "trackio"], "report_to ['trackio', 'trackio'] repeats: name each tracker once"),
    ],
)
def test_other_values_are_refused(value: object, words: str, raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({**raw, "report_to": value})
    assert words in str(caught.value)


# ---------------------------------------------------------------- what is tracked


def test_of_a_round_the_means_are_tracked_and_no_client() -> None:
    record = {
        "round": 3,
        "clients": ["ada", "bo", "cy"],
        "train_loss": [1.0, 3.0, None],
        "loss_after": [1.0, 2.0, 3.0],
        "validation_loss": 0.5,
        "bytes_up": 8,
        "bytes_down": 16,
        "seconds": 0.25,
        "notes": {"largest": 9.0},
    }
    expected = {"train_loss": 2.0, "validation_loss": 0.5, "bytes_up": 8.0, "bytes_down": 16.0, "seconds": 0.25}
    assert measures(record) == expected
    diverged = {**record, "train_loss": [float("inf"), None], "validation_loss": None}
    assert set(measures(diverged)) == NAMES - {"train_loss", "validation_loss"}


@pytest.mark.slow
def test_trackio_gets_every_round_of_every_run_as_metrics_jsonl_has_it(
    raw: dict[str, Any], tmp_path: Path, stand_in: None, capfd: pytest.CaptureFixture[str]
) -> None:
    done = fedmira.run(tracked(raw, "trackio", methods=[*LOCAL, {"name": "fedavg", "label": "avg"}], seeds=[3, 4]))
    lines = noted(done.path)
    assert {line["project"] for line in lines} == {"fedmira"}
    assert {(line["run"], line["group"]) for line in lines} == {
        (f"{label}/seed-{seed}", label) for label in ("local", "avg") for seed in (3, 4)
    }
    for run in done.runs:
        own = [line for line in lines if line["run"] == f"{run.facts.label}/seed-{run.facts.seed}"]
        assert [line["step"] for line in own] == [1, 2, 3, 4]
        assert [line["values"] for line in own] == [measures(record) for record in run.rounds]
        assert own[0]["config"] == {"method": run.facts.method, "seed": run.facts.seed, "rounds": ROUNDS}
    assert capfd.readouterr().out == ""


def test_trackio_is_given_nothing_that_leads_out_of_the_study(
    raw: dict[str, Any], tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL", "HF_TOKEN", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("SYSTEM", "spaces")
    done = fedmira.run(tracked(raw, "trackio", federation={"rounds": 1}))
    found = noted(done.path)[0]["environment"]
    assert {name: value for name, value in found.items() if name.startswith("TRACKIO")} == {
        "TRACKIO_DIR": str(tmp_path / "study" / ".trackio")
    }
    assert "HF_TOKEN" not in found
    assert (found["HF_HUB_OFFLINE"], found["HF_TOKEN_PATH"], found["SYSTEM"]) == ("1", os.devnull, "")


def test_what_is_tracked_holds_no_name_of_a_client_and_no_path(
    raw: dict[str, Any], tmp_path: Path, stand_in: None
) -> None:
    graph = tmp_path / "graph.csv"
    graph.write_text("client,neighbour,weight\n007,eve,1\n")
    method = {"name": "mira", "graph": {"kind": "file", "path": str(graph)}}
    done = fedmira.run(tracked(raw, "trackio", methods=[method], federation={"rounds": 1}))
    text = json.dumps([{**line, "environment": None} for line in noted(done.path)])
    assert str(tmp_path) not in text
    assert not [client for client in CLIENTS if f'"{client}"' in text]


# ---------------------------------------------------------------- going on


@pytest.mark.slow
def test_a_run_that_goes_on_is_tracked_as_if_it_had_never_stopped(
    raw: dict[str, Any], tmp_path: Path, stand_in: None
) -> None:
    study = fedmira.run(tracked(raw, "trackio", federation={"rounds": 2})).path
    assert steps(study) == [1, 2]
    fedmira.resume(study, ["federation.rounds=4"])
    assert steps(study) == [1, 2, 3, 4]
    fedmira.resume(study)  # there is nothing left to do
    assert steps(study) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_round_that_a_crash_kept_from_the_tracker_is_made_up_for(
    raw: dict[str, Any], tmp_path: Path, stand_in: None
) -> None:
    """Killed at moments all through the run, it goes on and ends with every round once."""
    plain = small_study.save_config(tmp_path / "config.yaml", {**raw, "report_to": ["trackio"]})
    for moment in (12, 34, 50):
        ended = command("run", plain, "-q", f"output_dir={tmp_path / str(moment)}", die_at=moment)
        assert ended.code == -9
        assert command("resume", tmp_path / str(moment), "-q").code == 0
        assert steps(tmp_path / str(moment)) == [1, 2, 3, 4], moment


@pytest.mark.slow
def test_a_run_waits_for_the_tracker_that_a_killed_one_left_behind(
    raw: dict[str, Any], tmp_path: Path, stand_in: None
) -> None:
    """The killed run's process, slow to read its rounds, must not write beside the new one's."""
    program = tmp_path / "packages" / "trackio.py"
    slow = "def log(values, step):\n    import time; time.sleep(1.5 if step == 1 else 0)"
    program.write_text(STAND_IN.replace("def log(values, step):", slow))
    config = small_study.save_config(tmp_path / "config.yaml", {**raw, "report_to": ["trackio"]})
    assert command("run", config, "-q", die_at=45).code == -9
    program.write_text(STAND_IN)
    assert not list((tmp_path / "study" / ".trackio").glob("*.end"))
    assert command("resume", tmp_path / "study", "-q").code == 0
    assert len(list((tmp_path / "study" / ".trackio").glob("*.end"))) == 2
    assert steps(tmp_path / "study") == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_round_that_is_done_again_is_tracked_once(raw: dict[str, Any], tmp_path: Path, stand_in: None) -> None:
    study = fedmira.run(tracked(raw, "trackio")).path
    run = study / "local" / "seed-3"
    shutil.rmtree(run / "checkpoints" / f"round-{ROUNDS:06d}")
    RunFolder(run).update(replace(fedmira.load_run(run).facts, state="running"))
    fedmira.resume(study)
    assert steps(study) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_study_with_trackers_is_overwritten_whole(raw: dict[str, Any], tmp_path: Path, stand_in: None) -> None:
    study = fedmira.run(tracked(raw, "trackio")).path
    StudyFolder(study).check_free(overwrite=True)
    fedmira.run(tracked(raw, "trackio", methods=[{"name": "fedavg"}]), overwrite=True)
    assert {line["run"] for line in noted(study)} == {"fedavg/seed-3"}
    fedmira.run(tracked(raw), overwrite=True)
    assert not (study / ".trackio").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_wandb_and_mlflow_get_every_round_once_after_a_resume_and_no_secret(
    name: str,
    raw: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The user's own settings would lead out of the study: online, to a server, with a key."""
    program = {"wandb": WANDB_STAND_IN, "mlflow": MLFLOW_STAND_IN}[name]
    (tmp_path / "packages" / f"{name}.py").write_text(program)
    secrets = ("WANDB_API_KEY", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
    for secret in secrets:
        monkeypatch.setenv(secret, "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "online")
    study = fedmira.run(tracked(raw, name, federation={"rounds": 2})).path
    ids = [line.get("id") for line in lines_of(name, study)]
    observed: list[Event] = []
    fedmira.resume(study, ["federation.rounds=4"], observer=observed.append)
    (run,) = fedmira.study.face.Study(study).runs
    lines = lines_of(name, study)
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        assert not line["values"].keys() & found.setdefault(line["step"], {}).keys(), "a round is there twice"
        found[line["step"]] |= line["values"]
        assert line["run"] == "local/seed-3"
        assert not [key for key in secrets if key in line["environment"]]
        assert line["environment"].get("WANDB_MODE", "offline") == line.get("mode", "offline") == "offline"
    assert found == {record["round"]: measures(record) for record in run.rounds}
    assert {line.get("id") for line in lines} == set(ids)  # uploaded, it is one run
    (told,) = [event for event in observed if isinstance(event, Tracked)]
    assert told.tracker == name
    assert str(study) in told.command
    assert capfd.readouterr().out == ""
    StudyFolder(study).check_free(overwrite=True)


def lines_of(name: str, study: Path) -> list[dict[str, Any]]:
    """What a stand-in was given."""
    places = {"wandb": "local/seed-3/wandb/wandb/offline-run-*", "mlflow": ".mlflow/mlflow.db"}
    (file,) = study.glob(places[name])
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------- trackers that fail


@pytest.mark.parametrize(
    ("program", "environment", "words"),
    [
        (STAND_IN, {"FAIL_AT_END": "1"}, "trackio failed (trackio ended with 1)"),
        pytest.param("raise ImportError", {}, "trackio failed (trackio ended with 1)", marks=pytest.mark.slow),
        (STAND_IN.replace("lines.append", "os._exit(3) or lines.append"), {}, "trackio failed (trackio ended with 3)"),
    ],
)
def test_a_tracker_that_fails_is_told_of_and_does_not_stop_the_run(
    program: str,
    environment: dict[str, str],
    words: str,
    raw: dict[str, Any],
    tmp_path: Path,
    stand_in: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "packages" / "trackio.py").write_text(program)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = fedmira.run(tracked(raw, "trackio"))
    assert done.runs[0].facts.state == "complete"
    told = [record.getMessage() for record in caplog.records if record.name == "fedmira.study.trackers"]
    assert len(told) == 1
    assert words in told[0]
    assert told[0].endswith(f"the rounds of '{done.runs[0].path}' are in metrics.jsonl")


def test_a_tracker_that_cannot_be_opened_is_told_of_and_the_other_goes_on(
    raw: dict[str, Any], tmp_path: Path, stand_in: None, caplog: pytest.LogCaptureFixture
) -> None:
    needs("tensorboard")
    study = fedmira.run(tracked(raw, "tensorboard", "trackio", federation={"rounds": 1})).path
    shutil.rmtree(study / "local" / "seed-3" / "tensorboard")
    (study / "local" / "seed-3" / "tensorboard").write_text("in the way")
    fedmira.resume(study, ["federation.rounds=2"])
    assert steps(study) == [1, 2]
    assert [record for record in caplog.records if "tensorboard failed (FileExistsError)" in record.getMessage()]


# ---------------------------------------------------------------- the real ones


def test_tensorboard_shows_every_round_once_after_a_resume(raw: dict[str, Any], tmp_path: Path) -> None:
    needs("tensorboard")
    study = fedmira.run(tracked(raw, "tensorboard", federation={"rounds": 2})).path
    fedmira.resume(study, ["federation.rounds=4"])
    (run,) = fedmira.study.face.Study(study).runs
    found = events(run.path / "tensorboard")
    assert set(found) == NAMES
    for name, values in found.items():
        assert [step for step, _ in values] == [1, 2, 3, 4]
        expected = [measures(record)[name] for record in run.rounds]
        assert [value for _, value in values] == pytest.approx(expected, rel=1e-6)
    assert {path.name.split(".")[0] for path in (run.path / "tensorboard").iterdir()} == {"events"}
    assert fedmira.run(tracked(raw), overwrite=True)  # a study with events is one


def test_trackio_itself_shows_every_round_once_after_a_resume(raw: dict[str, Any], tmp_path: Path) -> None:
    needs("trackio")
    study = fedmira.run(tracked(raw, "trackio", federation={"rounds": 2})).path
    fedmira.resume(study, ["federation.rounds=4"])
    with sqlite3.connect(study / ".trackio" / "fedmira.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    (run,) = fedmira.study.face.Study(study).runs
    assert [(name, step) for name, step, _ in rows] == [("local/seed-3", step) for step in (1, 2, 3, 4)]
    assert [json.loads(values) for _, _, values in rows] == [measures(record) for record in run.rounds]


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file: after 7 bytes a LevelDB log, blocks of 32 KiB, with checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.xdist_group("trackers")
def test_wandb_itself_has_every_round_once_after_a_resume_and_nothing_of_the_machine(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_MODE", "online")
    study = fedmira.run(tracked(raw, "wandb", federation={"rounds": 2})).path
    fedmira.resume(study, ["federation.rounds=4"])
    (run,) = fedmira.study.face.Study(study).runs
    (file,) = (run.path / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    rounds = {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            assert values["_step"] not in rounds
            rounds[values["_step"]] = {name: value for name, value in values.items() if not name.startswith("_")}
    assert rounds == {record["round"]: measures(record) for record in run.rounds}
    secret = (b"0123456789abcdef" * 3, platform.node().encode() or b"?", str(tmp_path).encode())
    assert not [word for word in secret if len(word) > 3 and word in file.read_bytes()]
    kept = [path.name for path in file.parent.rglob("*") if path.is_file() and path.suffix not in (".log", ".wandb")]
    assert kept == []


@pytest.mark.xdist_group("trackers")
def test_mlflow_itself_shows_every_round_once_after_a_resume(raw: dict[str, Any], tmp_path: Path) -> None:
    needs("mlflow")
    study = fedmira.run(tracked(raw, "mlflow", federation={"rounds": 2})).path
    fedmira.resume(study, ["federation.rounds=4"])
    (run,) = fedmira.study.face.Study(study).runs
    with sqlite3.connect(study / ".mlflow" / "mlflow.db") as database:
        shown = database.execute("select run_uuid, name, user_id, status from runs where lifecycle_stage = 'active'")
        ((number, *about),) = shown.fetchall()
        rows = database.execute("select step, key, value from metrics where run_uuid = ?", (number,)).fetchall()
    assert about == ["local/seed-3", "unknown", "FINISHED"]
    found: dict[int, dict[str, float]] = {}
    for step, key, value in rows:
        assert key not in found.setdefault(step, {})
        found[step][key] = value
    assert found == {record["round"]: measures(record) for record in run.rounds}
    assert {path.name for path in (study / ".mlflow").iterdir()} <= {"mlflow.db", ".lock"}
