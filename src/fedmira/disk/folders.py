"""Study and run folders: their files, and how they are cut back to a round on resume.

STUDY/{config.yaml, summary.json, report.html} and STUDY/<method>/seed-<n>/ with config.yaml, run.json, clients.json,
graph.json, metrics.jsonl, results.csv, log.txt, checkpoints/ and adapters/.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmira.disk.client_names import as_cell, read_client_names
from fedmira.disk.files import (
    FILE_MODE,
    NO_LINK,
    append_lines,
    describe_link,
    make_folder,
    remove_temporaries,
    temporary_of,
    write_atomic,
    write_json,
)
from fedmira.disk.run_facts import RunFacts, read_run_facts, write_run_facts
from fedmira.errors import StoreError, resume_command
from fedmira.names import ClientNames

if TYPE_CHECKING:
    from fedmira.config.sections import Config

log = logging.getLogger(__name__)

View = Literal["personal", "global"]  # each client's own adapter, or the shared one
TRACKIO_FOLDER, MLFLOW_FOLDER = ".trackio", ".mlflow"  # of a study; a method's label never starts with a dot
MATRIX = "matrix.csv"  # of a run: every adapter on every client's test split
LOCK = ".lock"  # of a study; an empty file
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
GATE = "gate.safetensors"  # beside an adapter that a gate mixes for every question
TOKENIZER_FILES = ("tokenizer*", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja")  # beside them
# What runs and reports write, by paths below a study.
_RUN = re.compile(r"seed-\d+")
_WRITTEN = re.compile(
    rf"config\.yaml|summary\.json|report\.html|results\.csv|{re.escape(LOCK)}"
    rf"|(?:{re.escape(TRACKIO_FOLDER)}|{re.escape(MLFLOW_FOLDER)})/.*"
    r"|[^/]+/seed-\d+/(?:config\.yaml|run\.json|clients\.json|graph\.json|metrics\.jsonl|results\.csv|examples\.jsonl"
    rf"|{re.escape(MATRIX)}"
    r"|log\.txt|privacy\.jsonl|uploads\.jsonl|noise\.key|checkpoints/round-\d+/(?:[^/]+\.safetensors|manifest\.json)"
    r"|tensorboard/events\.out\.tfevents\.[^/]*|wandb/.*"
    rf"|adapters/[^/]+/(?:{'|'.join(map(fnmatch.translate, (*ADAPTER_FILES, GATE, *TOKENIZER_FILES)))}))"
)
RESULT_COLUMNS = ("client", "method", "seed", "round", "view", "split", "metric", "value")
NAME_COLUMN = "name"  # the last of results.csv: the client's name in the data; absent in runs of earlier versions


@dataclass(frozen=True)
class Result:
    """One number of results.csv; value None is n/a (the client has no example in that split)."""

    client: str
    round: int
    view: View
    split: Literal["train", "validation", "test"]
    metric: str
    value: float | None


@dataclass(frozen=True)
class RoundRecord:
    """One line of metrics.jsonl. Per-client lists are in the order of `clients`; losses in nats per labelled token."""

    round: int
    clients: list[str]  # sampled
    answered: list[str]  # of these, admitted by the gate
    train_loss: list[float]  # mean over the local steps
    steps: list[int]
    loss_before: list[float | None]  # validation, each with the adapter it returned
    loss_after: list[float | None]  # validation, each with the adapter it has after the merge
    validation_loss: float | None  # mean over all clients that have a validation split
    bytes_up: int
    bytes_down: int
    seconds_training: float
    seconds_merge: float
    seconds: float  # of the whole round, evaluation included
    tokens: int  # unpadded tokens trained on
    notes: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # client -> reason
    scored: int = 0  # tokens of validation on which clients asked for losses within their part of the method
    figures: Mapping[str, list[float | None]] = field(default_factory=dict)  # of each of `clients`; absent if empty
    stopped_early: str | None = None  # why no further round follows; absent from the line if None


@dataclass(frozen=True)
class RunFolder:
    """One method with one seed."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def facts(self) -> RunFacts:
        """Read run.json. Raises StoreError if it is missing, damaged or of another schema."""
        return read_run_facts(self.path)

    @cached_property
    def names(self) -> ClientNames:
        """The ids and names of the run's clients."""
        return read_client_names(self.path)

    def update(self, facts: RunFacts) -> None:
        """Write run.json again, atomically."""
        write_run_facts(self.path, facts)

    def create(self, config: Config, facts: RunFacts, clients: Mapping[str, Any]) -> None:
        """Create the folder with config.yaml (can be run as it is), clients.json and run.json."""
        make_folder(self.path)
        _write_config(self.path, config)
        write_json(self.path / "clients.json", dict(clients))
        write_atomic(self.path / "results.csv", (",".join((*RESULT_COLUMNS, NAME_COLUMN)) + "\n").encode())
        write_atomic(self.path / "metrics.jsonl", b"")
        write_run_facts(self.path, facts)

    def rewrite(self, config: Config) -> None:
        """Replace config.yaml when the number of rounds has grown."""
        _write_config(self.path, config)

    def append(self, record: RoundRecord | None, results: Iterable[Result]) -> None:
        """Add one round: its results, then its line of metrics.jsonl."""
        facts = self.facts
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(
            (
                result.client,
                facts.label,
                facts.seed,
                result.round,
                result.view,
                result.split,
                result.metric,
                result.value,
                as_cell(self.names.name(result.client)),
            )
            for result in results
        )  # a float as repr, None as an empty field
        if lines := buffer.getvalue():
            append_lines(self.path / "results.csv", [lines.removesuffix("\n")])
        if record is not None:
            line = _finite(asdict(record))
            for name, absent in (("stopped_early", None), ("figures", {}), ("scored", 0)):
                if line[name] == absent:
                    del line[name]
            append_lines(self.path / "metrics.jsonl", [json.dumps(line, allow_nan=False)])

    @property
    def scored_at_start(self) -> set[str]:
        """The clients of which results.csv has figures before round 1."""
        with (self.path / "results.csv").open(encoding="utf-8", newline="") as file:
            return {row["client"] for row in csv.DictReader(file) if row["round"] == "0"}

    def write_examples(self, examples: Iterable[Mapping[str, Any]]) -> None:
        """Write examples.jsonl: prompts, references and answers, where report.examples is true."""
        lines = "".join(json.dumps(dict(example), ensure_ascii=False) + "\n" for example in examples)
        write_atomic(self.path / "examples.jsonl", lines.encode())

    def examples(self) -> list[dict[str, Any]]:
        """Read examples.jsonl; [] if report.examples is false, or the run is not complete."""
        path = self.path / "examples.jsonl"
        # not splitlines: U+2028 does not end a line here
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines if line]

    def records(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a half-written last line (a crash) is left out."""
        records = []
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def cut_back(self, last_round: int) -> None:
        """Drop what was written of rounds after `last_round`, and every test; at -1 nothing is kept.

        Round 0 is the start.
        """
        (self.path / MATRIX).unlink(missing_ok=True)
        records = [record for record in self.records() if record["round"] <= last_round]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
        lines = (self.path / "results.csv").read_text(encoding="utf-8").splitlines()
        width = len(RESULT_COLUMNS)
        named = NAME_COLUMN in lines[0].split(",")
        rows = [
            [*row[:width], as_cell(self.names.name(row[0]))]
            for row in csv.reader(lines[1:])
            if len(row) == width + named
        ]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow((*RESULT_COLUMNS, NAME_COLUMN))
        writer.writerows(row for row in rows if int(row[3]) <= last_round and (row[3] == "0" or row[5] != "test"))
        write_atomic(self.path / "results.csv", buffer.getvalue().encode())

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Send FedMira's log records to log.txt during the run."""
        with logging_to(self.path / "log.txt"):
            yield


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send FedMira's log records to a file, which its owner alone may read. Raises StoreError if that cannot be."""
    try:
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, FILE_MODE)
    except OSError as error:
        link = f"{describe_link(path)}; " if path.is_symlink() else ""
        raise StoreError(f"cannot write '{path}': {link}{error.strerror}; remove it, and resume") from error
    handler = logging.StreamHandler(os.fdopen(opened, "a", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fedmira")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        handler.stream.close()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder while this process writes. Raises StoreError if another process holds the lock.

    The lock is on the file `.lock` of the folder and ends with the process, even after a crash.
    """
    import filelock  # takes as long to import as the rest of a refusal

    if (folder / LOCK).is_symlink():
        raise StoreError(f"{describe_link(folder / LOCK)}, and the lock of a study is a file; remove the link")
    lock = filelock.FileLock(folder / LOCK, mode=FILE_MODE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(f"'{folder}' is in use by another fedmira process; wait for it or stop it") from None
    except (OSError, NotImplementedError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.warning("'%s' cannot be locked (%s): start only one process on it", folder, why)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class StudyFolder:
    """A study: one config, one run folder per method and seed."""

    path: Path

    def check_free(self, *, overwrite: bool = False) -> None:
        """Raise StoreError unless the folder can be created, or is empty, or, with `overwrite`, is a study only."""
        self.check_place()
        foreign = next(self._foreign(), None)
        if foreign is not None:
            link = f" ({describe_link(foreign)})" if foreign.is_symlink() else ""
            raise StoreError(
                f"output_dir '{self.path}' already holds files that are not a study's, such as "
                f"'{foreign.relative_to(self.path)}'{link}; they are never overwritten: choose another output_dir=..."
            )
        if self.is_begun and not overwrite:
            raise StoreError(
                f"output_dir '{self.path}' already holds a study; choose another output_dir=..., use --overwrite, "
                f"or continue with: {resume_command(self.path)}"
            )

    def check_place(self) -> None:
        """Raise StoreError if the folder is a file or a link to nothing, or cannot be created or written to."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            what = "a link to nothing" if self.path.is_symlink() else "a file"
            raise StoreError(f"output_dir '{self.path}' is {what}; choose another output_dir=...")
        try:
            _try_folder(self.path.absolute())
        except OSError as error:
            raise StoreError(
                f"output_dir '{self.path}' cannot be created or written: {error.strerror}; choose another "
                "output_dir=..."
            ) from None

    @property
    def is_begun(self) -> bool:
        """Does the folder hold anything but a lock and what a crash left half-written?"""
        return any(path.name != LOCK and not temporary_of(path.name) for path in self._entries())

    def clear(self) -> None:
        """Remove the existing study. Raises StoreError, and removes nothing, if the folder has other files."""
        self.check_free(overwrite=True)
        for path in self._entries():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # this process holds it
                path.unlink()

    def _entries(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def _foreign(self) -> Iterator[Path]:
        """Yield what no run wrote: links, files of other names, and folders that hold no run."""
        for entry in self._entries():
            if entry.is_symlink() or not entry.is_dir():
                if not _is_written(entry, self.path):
                    yield entry
            elif entry.name not in (TRACKIO_FOLDER, MLFLOW_FOLDER) and not any(
                _RUN.fullmatch(run.name) for run in entry.iterdir()
            ):
                yield entry
            else:
                for folder, folders, files in os.walk(entry):  # links to folders are listed, and not followed
                    paths = [Path(folder, name) for name in sorted(files)]
                    paths += [path for name in sorted(folders) if (path := Path(folder, name)).is_symlink()]
                    yield from (path for path in paths if not _is_written(path, self.path))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the study while this process writes. Raises StoreError if another process holds the lock."""
        with held(self.path):
            remove_temporaries(self.path)
            yield

    def create(self, config: Config) -> None:
        """Create the folder. Raises StoreError if it is not empty: nothing saved is overwritten."""
        self.check_free()
        try:
            make_folder(self.path)
        except OSError as error:
            raise StoreError(f"output_dir '{self.path}' cannot be created: {error.strerror}") from error
        _write_config(self.path, config)

    def rewrite(self, config: Config) -> None:
        """Replace config.yaml when the number of rounds has grown."""
        _write_config(self.path, config)

    def config(self) -> Config:
        """Read back the study's config. Raises StoreError if this is not a study."""
        source = self.path / "config.yaml"
        if not source.is_file():
            raise StoreError(f"'{self.path}' is not a FedMira study: it has no config.yaml")
        from fedmira.config.faults import check_config
        from fedmira.config.yaml_text import read_config

        return check_config(read_config(source), str(source))

    def run(self, label: str, seed: int) -> RunFolder:
        return RunFolder(self.path / label / f"seed-{seed}")

    def runs(self) -> list[RunFolder]:
        """List the runs that were started, in the config's order."""
        config = self.config()
        folders = [self.run(entry.folder, seed) for seed in config.seeds for entry in config.methods]
        return [folder for folder in folders if (folder.path / "run.json").is_file()]


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_written(path: Path, study: Path) -> bool:
    """Has a file of a study's folder a name that FedMira writes? A link has none."""
    relative = path.relative_to(study)
    name = temporary_of(path.name) or path.name
    return not path.is_symlink() and _WRITTEN.fullmatch((relative.parent / name).as_posix()) is not None


def _try_folder(folder: Path) -> None:
    """Create the folders of a path that are missing, under another name, and remove them. Raises OSError."""
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=above) as trial:
        Path(trial, folder.relative_to(above)).mkdir(parents=True, exist_ok=True)


def _write_config(folder: Path, config: Config) -> None:
    from fedmira.config.yaml_text import dump_config

    write_atomic(folder / "config.yaml", dump_config(config).encode())


def find_study(path: Path) -> tuple[StudyFolder, RunFolder | None]:
    """Accept a study or one of its runs. Raises StoreError if the path is neither."""
    if (path / "run.json").is_file():
        return StudyFolder(Path(os.path.abspath(path)).parent.parent), RunFolder(path)  # path may be "."
    if (path / "config.yaml").is_file():
        return StudyFolder(path), None
    raise StoreError(f"'{path}' is neither a study nor a run of FedMira: it has no run.json and no config.yaml")
