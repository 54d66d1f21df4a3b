"""Optional trackers: every round's losses, bytes and seconds in TensorBoard, trackio, wandb or MLflow (`report_to`).

All write inside the study and reach no network, whatever the environment says: TensorBoard's events are in
STUDY/<method>/seed-<n>/tensorboard, trackio's database in STUDY/.trackio, MLflow's in STUDY/.mlflow, and wandb's runs,
always offline, in STUDY/<method>/seed-<n>/wandb. The command that shows them, or uploads those of wandb, is reported
at the end. What a run has tracked is written anew from metrics.jsonl when it goes on: after a resume, and after any
crash, nothing is there twice and nothing is missing. A tracker that fails is reported once, and the run continues
without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedmira.disk.files import make_folder
from fedmira.disk.folders import MLFLOW_FOLDER, TRACKIO_FOLDER, RunFolder
from fedmira.engine.events import RoundDone
from fedmira.errors import ConfigError
from fedmira.study.events import RunBegun, RunDone, Tracked

if TYPE_CHECKING:
    from fedmira.engine.events import Event, Observer

log = logging.getLogger(__name__)

PROJECT = "fedmira"  # name of a database, project or experiment; there is one in each study
_PROGRAM = Path(__file__).with_name("tracker_program.py")
# What could make a tracker send anything anywhere, or hold a secret; its folder is set below.
_REMOTE = ("TRACKIO_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPACE_ID", "WANDB_", "MLFLOW_", "DATABRICKS_", "OTEL_")


@dataclass(frozen=True)
class Service:
    """A tracker that a separate process writes to.

    program: which it runs; in_run: is its folder in a run's or in the study's; environment: of the process, where {} is
    the folder; end_s: for it to write what it still holds; command: shows what is there, where {} is the study.
    """

    program: str
    folder: str
    in_run: bool
    environment: Mapping[str, str]
    end_s: float
    command: str


SERVICES = {
    "trackio": Service(
        "trackio_program.py",
        TRACKIO_FOLDER,
        False,
        {
            "TRACKIO_DIR": "{}",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN_PATH": os.devnull,
            "SYSTEM": "",
        },
        60,
        f"TRACKIO_DIR={{}}/{TRACKIO_FOLDER} trackio show --project {PROJECT}",
    ),
    "wandb": Service(
        "wandb_program.py",
        "wandb",
        True,
        {
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            **dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), "{}"),
        },
        300,
        "wandb sync {}/*/seed-*/wandb/wandb/offline-run-*",
    ),
    "mlflow": Service(
        "mlflow_program.py",
        MLFLOW_FOLDER,
        False,
        {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
        300,  # it creates its tables first
        f"mlflow ui --backend-store-uri sqlite:///{{}}/{MLFLOW_FOLDER}/mlflow.db",
    ),
}


class Tracker(Protocol):
    """Where a run's numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, naming the extra to install, if a tracker's package is not there. Nothing is imported."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        faults = [
            f"report_to: {name} is not installed; install it with pip install 'fedmira[{name}]', or take it out of "
            "report_to"
            for name in missing
        ]
        raise ConfigError(faults)


def measures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what is tracked of one line of metrics.jsonl: finite numbers only, of no client by itself.

    train_loss and validation_loss in nats per labelled token, the first a mean over the sampled clients.
    """
    trained = [value for value in record["train_loss"] if value is not None and math.isfinite(value)]
    values = {
        "train_loss": sum(trained) / len(trained) if trained else None,
        **{name: record[name] for name in ("validation_loss", "bytes_up", "bytes_down", "seconds")},
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


@contextmanager
def tracking(names: Sequence[str], study: Path, observer: Observer) -> Iterator[Observer]:
    """Give an observer that passes everything on to `observer`, and every round to the trackers of those names too."""
    if not names:
        yield observer
        return
    trackers = Trackers(tuple(names), study, observer)
    try:
        yield trackers
    finally:
        trackers.close()
    for name in sorted(trackers.written):
        command = SERVICES[name].command if name in SERVICES else "tensorboard --logdir {}"
        observer(Tracked(name, command.replace("{}", shlex.quote(str(study.absolute())))))


@dataclass(eq=False)
class Trackers:
    """Follows the runs of a study one after another; `run` opens nothing yet, its first round does."""

    names: Sequence[str]
    study: Path
    observer: Observer
    run: RunBegun | None = None  # the run under way; None between runs
    opened: dict[str, Tracker] | None = None  # None before the first round
    written: set[str] = field(default_factory=set)  # trackers that hold at least one whole run

    def __call__(self, event: Event) -> None:
        self.observer(event)
        match event:
            case RunBegun():
                self.close()
                self.run = event
            case RoundDone():
                self._follow(asdict(event.record))
            case RunDone():
                self._follow(None)
                self.close()

    def close(self) -> None:
        """End what is open."""
        for name, tracker in list((self.opened or {}).items()):
            with self._guarded(name):
                tracker.close()
                self.written.add(name)
        self.opened, self.run = None, None

    def _follow(self, record: Mapping[str, Any] | None) -> None:
        """Log one round; the first time, all that metrics.jsonl has by now, this round included."""
        if self.run is None:
            return
        records: Sequence[Mapping[str, Any]] = [] if record is None else [record]
        if self.opened is None:
            self.opened = {}
            for name in self.names:
                with self._guarded(name):
                    self.opened[name] = self._open(name, self.run)
            records = RunFolder(self.run.folder).records()
        for one in records:
            for name, tracker in list(self.opened.items()):
                with self._guarded(name):
                    tracker.log(one["round"], measures(one))

    def _open(self, name: str, run: RunBegun) -> Tracker:
        if name == "tensorboard":
            return TensorBoard(run.folder / "tensorboard")
        return Separate(name, self.study, run)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails for the rest of the run, which is worth more."""
        try:
            yield
        except Exception as error:
            (self.opened or {}).pop(name, None)
            where = "" if self.run is None else f" of '{self.run.folder}'"
            log.warning("report_to: %s failed (%s); the rounds%s are in metrics.jsonl", name, _kind(error), where)


class TensorBoard:
    """Event files in a folder of the run; those of an earlier start are replaced."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and the package may not be there

        make_folder(folder)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Separate:
    """A separate process that logs to one of SERVICES what it reads, line by line, until its input ends.

    These libraries take folders and modes from the environment when they are imported, once for a process, talk on
    standard output, and would follow the name of a server in the environment. None of that reaches this process so.
    """

    def __init__(self, name: str, study: Path, run: RunBegun) -> None:
        self.name, self.service, facts = name, SERVICES[name], run.facts
        folder = ((run.folder if self.service.in_run else study) / self.service.folder).absolute()
        about = {"method": facts.method, "seed": facts.seed, "rounds": facts.rounds}
        request = [PROJECT, f"{facts.label}/seed-{facts.seed}", facts.label, about, _mark(run.folder), str(folder)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_REMOTE)}
        environment |= {key: str(folder) if value == "{}" else value for key, value in self.service.environment.items()}
        make_folder(folder)
        job = {
            "program": str(_PROGRAM.with_name(self.service.program)),
            "folder": str(folder),
            "clear": self.service.in_run,
            "wait_s": self.service.end_s,
            "request": request,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), json.dumps(job)],  # -P: no module of its folder
            env=environment,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours: it reads to the end what it was given
        )
        assert self.process.stdout is not None
        with self.process.stdout as output:
            if not output.readline():  # it ended before it could write: the process of an earlier start did not end
                self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps([step, dict(values)]) + "\n").encode())
        except BrokenPipeError:
            self.close()
            raise

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(self.service.end_s)
        if code != 0:
            raise ChildProcessError(f"{self.name} ended with {code}")


def _mark(run: Path) -> str:
    """Return an id of a run that every start of it has, and no other run."""
    facts = RunFolder(run).facts
    words = [facts.label, facts.seed, facts.started, facts.base_fingerprint, facts.layout_fingerprint]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _kind(error: Exception) -> str:
    """Return what kind of error it was; of our own, its words too. Others' words may say anything."""
    return str(error) if isinstance(error, ChildProcessError) else type(error).__name__


def _is_installed(name: str) -> bool:
    """Is there such a package? A mere folder of that name beside a script is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None
