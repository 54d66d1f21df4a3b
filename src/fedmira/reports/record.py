"""A study as read from its folders for a report; keys of run.json, clients.json and metrics.jsonl may be absent."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedmira.disk.files import read_json
from fedmira.disk.folders import RunFolder
from fedmira.errors import StoreError
from fedmira.names import ClientNames
from fedmira.reports import wording
from fedmira.reports.averages import mean
from fedmira.reports.examples import Example, read_examples
from fedmira.reports.paths import without_folders
from fedmira.reports.results import LOWER_IS_BETTER, Results, find_runs, read_results
from fedmira.reports.stats import MethodSummary, summarise, summarise_base


class ShownFacts(NamedTuple):
    """What a report reads of run.json, which may be of any version, or damaged: None where a key is absent.

    A value may be anything that JSON has; disk/run_facts.py says what it should be.
    """

    state: Any = "unknown"
    method: Any = None
    settings: Any = None
    training: Any = None
    rounds: Any = None
    clients: Any = None
    sampled: Any = None
    base_model: Any = None
    base_fingerprint: Any = None
    parameters: Any = None
    dtype: Any = None
    device: Any = None
    cohort: Any = None
    threads: Any = None
    pull_percent: Any = None
    versions: Any = None
    started: Any = None
    bytes_up: Any = None
    bytes_down: Any = None
    seconds: Any = None
    refused_uploads: Any = None
    refused_replies: Any = None
    resumed: Any = None
    keep: Any = None
    privacy: Any = None
    client_privacy: Any = None
    stopped_early: Any = None
    joined: Any = None
    figures: Any = None


@dataclass(frozen=True)
class RunRecord:
    """One run, from its folder.

    fields: run.json, which a page shows whole but for the folders of absolute paths; rounds: metrics.jsonl.
    """

    folder: str  # relative to the study, with forward slashes
    label: str
    seed: int
    adapters: int  # folders below adapters/
    fields: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    logged: bool  # is there a metrics.jsonl?

    @cached_property
    def facts(self) -> ShownFacts:
        """The keys of run.json that a report reads one by one."""
        return ShownFacts(**{key: value for key, value in self.fields.items() if key in ShownFacts._fields})

    @property
    def state(self) -> str:
        return str(self.facts.state)

    @property
    def stopped_early(self) -> str:
        """After which of its rounds the run ended, and why; "" if it had, or will have, all of them."""
        early = self.facts.stopped_early
        if not isinstance(early, dict):
            return ""
        return f"after round {early.get('round')} of {self.facts.rounds}: {early.get('reason')}"

    @cached_property
    def sampled(self) -> Counter[str]:
        """The number of rounds that each client took part in; clients that took part in none are absent."""
        return Counter(str(client) for line in self.rounds for client in line.get("clients", ()))

    @property
    def never_sampled(self) -> int | None:
        """The number of clients that took part in no round; None if unknown."""
        clients = self.facts.clients
        return clients - len(self.sampled) if isinstance(clients, int) and self.logged else None

    def total(self, key: str) -> float | None:
        """Sum a figure over the rounds, or read it from run.json; None if neither has it."""
        parts = [line[key] for line in self.rounds if isinstance(line.get(key), int | float)]
        value = getattr(self.facts, key, None)
        if value is None and parts:
            return sum(parts)
        return value if isinstance(value, int | float) else None


class Costs(NamedTuple):
    """What a run of a method costs, mean over its runs. bytes: up and down, of all rounds; None = unknown."""

    bytes: float | None
    seconds: float | None


class Metric(NamedTuple):
    """The results on one metric."""

    name: str
    title: str
    lower_is_better: bool
    base: MethodSummary | None
    methods: list[MethodSummary]

    @property
    def lines(self) -> list[MethodSummary]:
        """The lines of its table: the untouched base first, then the methods."""
        return [item for item in (self.base, *self.methods) if item]


@dataclass(frozen=True)
class StudyRecord:
    """A study, as read for a report. clients: clients.json, by id."""

    path: Path
    name: str
    baseline: str
    results: Results
    runs: list[RunRecord]
    metrics: list[Metric]
    clients: Mapping[str, Mapping[str, Any]]

    @property
    def labels(self) -> list[str]:
        """The methods that were started, with or without results."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def repeated(self) -> bool:
        """Was a method tested with more than one seed?"""
        return any(len(item.seeds) > 1 for metric in self.metrics for item in metric.methods)

    @property
    def judged(self) -> Metric | None:
        """The metric that gain is measured by: the first but the loss, which hedging between answers can lower."""
        return next((metric for metric in self.metrics if metric.name != "loss"), next(iter(self.metrics), None))

    @cached_property
    def of_last_round(self) -> dict[str, list[MethodSummary]]:
        """The results on each metric with the adapters of the last round; {} if no run keeps others."""
        if not self.results.kept:
            return {}
        last = replace(self.results, kept=frozenset())
        tested = examples_of(self.clients, "test")
        return {
            metric.name: summarise(last, metric=metric.name, baseline=self.baseline, examples=tested)
            for metric in self.metrics
        }

    @cached_property
    def costs(self) -> dict[str, Costs]:
        """What a run of each method costs; of unfinished runs what they have cost so far."""
        return {label: _costs([run for run in self.runs if run.label == label]) for label in self.labels}

    def first_run(self, label: str) -> RunRecord | None:
        """The run of a method with the lowest seed."""
        return next((run for run in self.runs if run.label == label), None)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Each client's name for people, by id; results, rounds and folders have the ids."""
        known = ClientNames({name: str(facts.get("name", name)) for name, facts in self.clients.items()}).labels
        return {client: known.get(client, client) for client in (*self.results.clients, *known)}

    def called(self, client: str) -> str:
        """The name of a client, given by its id."""
        return self.names.get(client, client)

    def group(self, client: str) -> str | None:
        """The group of a client; None if clients.json has none."""
        group = self.clients.get(client, {}).get("group")
        return None if group is None else str(group)

    def examples(self) -> dict[str, list[Example]]:
        """The answers of the first seed's runs to test prompts, by client; empty unless report.examples."""
        first = self.runs[0].seed
        return read_examples({run.label: self.path / run.folder for run in self.runs if run.seed == first})


def read_study(study: Path) -> StudyRecord:
    """Read a study. Raises StoreError if it has no results, or a file is damaged."""
    folders = find_runs(study)
    results = read_results(study, folders)
    runs = [_read_run(study, folder) for folder in folders]
    results = replace(results, kept=frozenset((run.label, run.seed) for run in runs if run.facts.keep == "best"))
    # `local` may have another label in a study; run.json names the method
    baseline = next((run.label for run in runs if run.facts.method == "local"), "local")
    measured = dict.fromkeys(row.metric for row in results.rows if row.split == "test" and row.round > 0)
    names = sorted(measured, key=lambda name: name != "loss")
    clients = _read_clients(study / runs[0].folder)
    tested = examples_of(clients, "test")
    return StudyRecord(
        path=study,
        name=study.resolve().name,
        baseline=baseline,
        results=results,
        runs=runs,
        metrics=[
            Metric(
                name=name,
                title=wording.title(name),
                lower_is_better=name in LOWER_IS_BETTER,
                base=summarise_base(results, metric=name, baseline=baseline, examples=tested),
                methods=summarise(results, metric=name, baseline=baseline, examples=tested),
            )
            for name in names
        ],
        clients=clients,
    )


def examples_of(clients: Mapping[str, Mapping[str, Any]], split: str) -> dict[str, int]:
    """Return each client's number of examples in a split, as clients.json has it; clients without one are absent."""
    counts = {client: facts.get("examples") for client, facts in clients.items()}
    found = {client: splits.get(split) for client, splits in counts.items() if isinstance(splits, dict)}
    return {client: number for client, number in found.items() if isinstance(number, int)}


def _costs(runs: Sequence[RunRecord]) -> Costs:
    both = [(run.total("bytes_up"), run.total("bytes_down")) for run in runs]
    sent = [up + down for up, down in both if up is not None and down is not None]
    times = [seconds for run in runs if (seconds := run.total("seconds")) is not None]
    return Costs(mean(sent) if sent else None, mean(times) if times else None)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no file. Raises StoreError if it is damaged or not an object."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise StoreError(f"'{path}' holds a {type(content).__name__}: {path.name} is an object; restore it from a copy")
    return content


def _read_clients(run: Path) -> dict[str, Mapping[str, Any]]:
    return {name: facts for name, facts in read_object(run / "clients.json").items() if isinstance(facts, dict)}


def _read_run(study: Path, folder: Path) -> RunRecord:
    logged = (folder / "metrics.jsonl").is_file()
    adapters = folder / "adapters"
    return RunRecord(
        folder=folder.relative_to(study).as_posix(),
        label=folder.parent.name,
        seed=int(folder.name.removeprefix("seed-")),
        adapters=sum(entry.is_dir() for entry in adapters.iterdir()) if adapters.is_dir() else 0,
        fields=without_folders(read_object(folder / "run.json")),
        rounds=[line for line in RunFolder(folder).records() if isinstance(line, dict)] if logged else [],
        logged=logged,
    )
