"""run.json: what a run is, how far it has come and what it cost. Its keys are the fields here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedmira.disk.files import read_json, write_json
from fedmira.errors import StoreError

SCHEMA = 2
READABLE = (1, 2)  # a run of schema 1 is reported and exported, and not continued: its checkpoints are of another form
State = Literal["running", "complete", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One method with one seed: what it was begun with, and once it has ended, what it cost.

    A field without a default is in every run.json, None as null. One with a default is absent as long as it has that.
    """

    schema: int
    state: State
    method: str
    label: str  # names the folder
    settings: Mapping[str, Any]  # as the config has them
    training: Mapping[str, Any] | None = None  # of its clients, in full; None in runs of earlier versions
    seed: int
    rounds: int  # when it is complete, unless it stopped early
    clients: int
    sampled: int  # of these, in one round
    personal: bool  # has each client an adapter of its own?
    base_model: str  # as the config names it
    template: str | None = None  # None in runs of earlier versions
    base_fingerprint: str  # sha256
    architecture: str | None = None  # class of the base; None in runs of earlier versions
    layout_fingerprint: str
    start_sha256: str | None = None  # of the adapters that clients began with; None: drawn
    graph_sha256: str | None  # None: no graph that is given
    parameters: int  # of one client's adapter
    dtype: str
    device: str
    cohort: int  # clients trained in one pass
    at_once: int | None = None  # examples of a client in one pass, where a whole batch did not fit
    recompute: bool = False  # decoder blocks in backward, where gradient_checkpointing is auto
    threads: int
    pull_percent: Sequence[float] | None  # smallest, mean and largest of all rounds; None: no pull
    versions: Mapping[str, str]  # library -> version, fedmira and python too
    command: Sequence[str]
    started: str  # ISO 8601, as is `finished`
    seconds_tuning: float | None = None  # fine-tuning after the last round; None: there was none
    tokens_tuning: int | None = None
    validation_loss: float | None = None  # mean over clients of the adapters that are kept; None: unknown
    figures: Mapping[str, Sequence[float | None]] | None = None  # of what each client did after the last round, by name
    keep: Literal["last", "best"] = "last"  # whose adapters are tested and exported: of which round
    kept_rounds: Sequence[int] | None = None  # first, median and last of the clients' best rounds; None: keep is last
    privacy: Mapping[str, Any] | None = None  # what was promised and spent; None: nothing was
    client_privacy: Mapping[str, Any] | None = None  # the same of clients as a whole; `none` says why nothing was
    stopped_early: Mapping[str, Any] | None = None  # round, reason; None: it had, or will have, all its rounds
    finished: str | None = None  # when it ended last, well or not
    bytes_up: int | None = None  # this and the rest: sums over all rounds, once the run is complete
    bytes_down: int | None = None
    seconds: float | None = None
    ever_sampled: int | None = None  # clients
    refused_uploads: int | None = None
    refused_replies: int | None = None
    joined: Mapping[str, int] | None = None  # client -> its first round, of those that joined after round 1
    resumed: Sequence[Mapping[str, Any]] = ()  # of every later start: started, versions, device, command

    def as_json(self) -> dict[str, Any]:
        """Return what run.json holds."""
        usual = {field.name: field.default for field in fields(self)}
        return {key: value for key, value in asdict(self).items() if usual[key] is MISSING or value != usual[key]}


def read_run_facts(run: Path) -> RunFacts:
    """Read run.json of a run's folder; keys that this version does not know are left out.

    Raises StoreError if it is missing, damaged or of a schema that this version does not read.
    """
    path = run / "run.json"
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise StoreError(f"'{path}' holds a {type(stored).__name__}: run.json is an object; restore it from a copy")
    if stored.get("schema") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise StoreError(f"'{run}': run.json has schema {stored.get('schema')}, this version reads {known}")
    missing = [field.name for field in fields(RunFacts) if field.default is MISSING and field.name not in stored]
    if missing:
        raise StoreError(f"'{path}' is damaged: it has no {', '.join(missing)}; restore it from a copy")
    return RunFacts(**{field.name: stored[field.name] for field in fields(RunFacts) if field.name in stored})


def write_run_facts(run: Path, facts: RunFacts) -> None:
    """Write run.json atomically; what it holds beside these facts is kept."""
    path = run / "run.json"
    earlier = read_json(path) if path.is_file() else {}
    write_json(path, {**earlier, **facts.as_json()})
