"""Study and run folders: the files of the contract, and how they are cut back to a round on resume.

STUDY/{config.yaml, summary.json, report.html} and STUDY/<method>/seed-<n>/ with config.yaml, run.json, clients.json,
graph.json, metrics.jsonl, results.csv, log.txt, checkpoints/ and adapters/.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedmira.config import Config, check_config, dump_config, read_config
from fedmira.errors import StoreError
from fedmira.store import append_lines, read_json, write_atomic, write_json

SCHEMA = 1
View = Literal["personal", "global"]  # each client's own adapter, or the one that all share
State = Literal["running", "complete", "interrupted", "failed"]
RESULT_COLUMNS = ("client", "method", "seed", "round", "view", "split", "metric", "value")


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
    answered: list[str]  # of these, what the gate let through
    train_loss: list[float]  # mean over the local steps
    steps: list[int]
    loss_before: list[float | None]  # validation, each with the adapter it returned
    loss_after: list[float | None]  # validation, each with the adapter it has after the merge
    validation_loss: float | None  # mean over all clients that have a validation split
    bytes_up: int
    bytes_down: int
    seconds_training: float
    seconds_merge: float
    seconds: float  # of the whole round, measuring included
    tokens: int  # unpadded tokens trained on
    notes: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # client -> reason


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
    def facts(self) -> dict[str, Any]:
        """Read run.json. Raises StoreError if it is missing or of another schema."""
        facts = read_json(self.path / "run.json")
        if facts.get("schema") != SCHEMA:
            raise StoreError(f"'{self.path}': run.json has schema {facts.get('schema')}, this version reads {SCHEMA}")
        return dict(facts)

    def update(self, **changes: Any) -> None:
        """Change some keys of run.json atomically."""
        write_json(self.path / "run.json", {**self.facts, **changes})

    def create(self, config: Config, facts: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """Make the folder with config.yaml (runs again as it is), clients.json and run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.yaml", dump_config(config).encode())
        write_json(self.path / "clients.json", dict(clients))
        append_lines(self.path / "results.csv", [",".join(RESULT_COLUMNS)])
        append_lines(self.path / "metrics.jsonl", [])
        write_json(self.path / "run.json", {"schema": SCHEMA, **facts})

    def rewrite(self, config: Config) -> None:
        """Replace config.yaml when the number of rounds has grown."""
        write_atomic(self.path / "config.yaml", dump_config(config).encode())

    def append(self, record: RoundRecord | None, results: Iterable[Result]) -> None:
        """Add one round: its results, then its line of metrics.jsonl."""
        facts = self.facts
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for row in results:
            value = "" if row.value is None else repr(float(row.value))
            writer.writerow(
                [row.client, facts["label"], facts["seed"], row.round, row.view, row.split, row.metric, value]
            )
        if buffer.getvalue():
            append_lines(self.path / "results.csv", buffer.getvalue().splitlines())
        if record is not None:
            append_lines(self.path / "metrics.jsonl", [json.dumps(asdict(record))])

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
        """Drop what was written after `last_round`; those rounds are done again."""
        kept = [json.dumps(record) for record in self.records() if record["round"] <= last_round]
        write_atomic(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept).encode())
        lines = (self.path / "results.csv").read_text(encoding="utf-8").splitlines()
        rows = [row for row in csv.reader(lines[1:]) if len(row) == len(RESULT_COLUMNS)]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(RESULT_COLUMNS)
        writer.writerows(row for row in rows if row[3] == "0" or (int(row[3]) <= last_round and row[5] != "test"))
        write_atomic(self.path / "results.csv", buffer.getvalue().encode())

    @contextmanager
    def logging(self) -> Any:
        """Send FedMira's log records to log.txt while the run is under way."""
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("fedmira")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()


@dataclass(frozen=True)
class StudyFolder:
    """A study: one config, one run folder per method and seed."""

    path: Path

    def create(self, config: Config) -> None:
        """Make the folder. Raises StoreError if it holds anything already: nothing saved is overwritten."""
        if self.path.exists() and any(self.path.iterdir()):
            what = "a study" if (self.path / "config.yaml").is_file() else "files"
            raise StoreError(
                f"output_dir '{self.path}' already holds {what}; go on with 'fedmira resume {self.path}', "
                "choose another output_dir=..., or give --overwrite"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"output_dir '{self.path}' cannot be made: {error.strerror}") from error
        write_atomic(self.path / "config.yaml", dump_config(config).encode())

    def rewrite(self, config: Config) -> None:
        """Replace config.yaml when the number of rounds has grown."""
        write_atomic(self.path / "config.yaml", dump_config(config).encode())

    def config(self) -> Config:
        """Read back the study's config. Raises StoreError if this is no study."""
        source = self.path / "config.yaml"
        if not source.is_file():
            raise StoreError(f"'{self.path}' is no FedMira study: it has no config.yaml")
        return check_config(read_config(source), str(source))

    def run(self, label: str, seed: int) -> RunFolder:
        return RunFolder(self.path / label / f"seed-{seed}")

    def runs(self) -> list[RunFolder]:
        """List the runs that were started, in the config's order."""
        config = self.config()
        folders = [self.run(entry.folder, seed) for seed in config.seeds for entry in config.methods]
        return [folder for folder in folders if (folder.path / "run.json").is_file()]


def find_study(path: Path) -> tuple[StudyFolder, RunFolder | None]:
    """Accept a study or one of its runs. Raises StoreError if the path is neither."""
    if (path / "run.json").is_file():
        return StudyFolder(path.parent.parent), RunFolder(path)
    if (path / "config.yaml").is_file():
        return StudyFolder(path), None
    raise StoreError(f"'{path}' is no study and no run of FedMira: it has neither run.json nor config.yaml")
