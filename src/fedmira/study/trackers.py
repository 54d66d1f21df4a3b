"""Optional trackers: every round's losses, bytes and seconds in TensorBoard or trackio, where `report_to` asks for it.

Both write inside the study and reach no network. TensorBoard's events lie in STUDY/<method>/seed-<n>/tensorboard (to
see them: `tensorboard --logdir STUDY`), trackio's database in STUDY/.trackio (`TRACKIO_DIR=STUDY/.trackio trackio
show`). What a run has tracked is written anew from metrics.jsonl when it goes on: after a resume, and after any crash,
nothing is there twice and nothing is missing. A tracker that fails is reported once, and the run continues without it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedmira.disk.files import make_folder
from fedmira.disk.folders import TRACKIO_FOLDER, RunFolder
from fedmira.engine.events import RoundDone
from fedmira.errors import ConfigError
from fedmira.study.events import RunBegun, RunDone

if TYPE_CHECKING:
    from fedmira.disk.run_facts import RunFacts
    from fedmira.engine.events import Event, Observer

log = logging.getLogger(__name__)

PROJECT = "fedmira"  # trackio's name for a database; there is one in each study
END_S = 60  # for trackio to write what it still holds
_PROGRAM = Path(__file__).with_name("trackio_program.py")
# What could make trackio send anything anywhere; its folder is set below.
_REMOTE = ("TRACKIO_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPACE_ID")


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


@dataclass(eq=False)
class Trackers:
    """Follows the runs of a study one after another; `run` opens nothing yet, its first round does."""

    names: Sequence[str]
    study: Path
    observer: Observer
    run: RunBegun | None = None  # the run under way; None between runs
    opened: dict[str, Tracker] | None = None  # None before the first round

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
        return Trackio(self.study / TRACKIO_FOLDER, run.facts)

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


class Trackio:
    """A separate process that logs to trackio what it reads, line by line, until its input ends.

    trackio takes its folder from the environment when it is imported, once for a process, talks on standard output,
    and would follow the name of a Space or server in the environment. None of that reaches this process so.
    """

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        about = {"method": facts.method, "seed": facts.seed, "rounds": facts.rounds}
        request = json.dumps([PROJECT, f"{facts.label}/seed-{facts.seed}", facts.label, about])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_REMOTE)}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN_PATH": os.devnull, "SYSTEM": ""}
        make_folder(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), request],  # -P: no module of the current folder
            env={**kept, **quiet, "TRACKIO_DIR": str(folder.absolute())},
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
        code = self.process.wait(END_S)
        if code != 0:
            raise ChildProcessError(f"trackio ended with {code}")


def _kind(error: Exception) -> str:
    """Return what kind of error it was; of our own, its words too. Others' words may say anything."""
    return str(error) if isinstance(error, ChildProcessError) else type(error).__name__


def _is_installed(name: str) -> bool:
    """Is there such a package? A mere folder of that name beside a script is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None
