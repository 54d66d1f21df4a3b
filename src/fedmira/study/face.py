"""The Python face of FedMira: load a config, run or resume a study, read back its results and adapters.

A study is one config: the same data, base model and schedule for every method and seed. Everything that can be wrong is
checked before a folder is made; what a run has saved is never overwritten.
"""

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedmira import bundled
from fedmira import methods as method_files
from fedmira.config.faults import check_config
from fedmira.config.sections import Config
from fedmira.config.yaml_text import read_config
from fedmira.disk.files import read_json, write_json
from fedmira.disk.folders import RunFolder, StudyFolder, find_study
from fedmira.engine.clients import Scores
from fedmira.engine.run import Course, Observer, run_rounds
from fedmira.engine.scoring import score_start
from fedmira.engine.simulated import make_clients
from fedmira.errors import ConfigError, FedMiraError, MethodError, Stopped, StoreError, WireError
from fedmira.export.merged_model import Merged, merge_adapters
from fedmira.export.peft_folder import copy_adapters
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Cohort
from fedmira.reports.render import write_report
from fedmira.reports.stats import read_results
from fedmira.study.assemble import Built, Prepared, client_table, prepare, training_of, using_threads
from fedmira.study.handover import write_adapters
from fedmira.study.trackers import check_trackers, tracking

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")
MAX_GRAPH_EDGES = 1_000_000  # a larger graph is described in graph.json, not listed


def silent(event: str, facts: Mapping[str, object]) -> None:
    """Observe nothing."""


@dataclass(frozen=True)
class Run:
    """One method with one seed, as it lies on disk."""

    path: Path

    @property
    def facts(self) -> dict[str, Any]:
        """run.json: state, method, settings, seed, versions, base fingerprint, cohort, threads, bytes, seconds."""
        return RunFolder(self.path).facts

    @property
    def config(self) -> Config:
        """The config of this run alone."""
        return StudyFolder(self.path).config()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one record per finished round."""
        return RunFolder(self.path).records()

    def adapters(self, client: str) -> Path:
        """The PEFT folder of one client. Raises StoreError naming the clients there are."""
        folder = self.path / "adapters" / client
        there = sorted(path.parent.name for path in (self.path / "adapters").glob("*/adapter_config.json"))
        if client not in there:  # a name such as ../../other is none, though it may lead to a folder
            known = f"{', '.join(there[:8])}{', ...' if len(there) > 8 else ''}" or "none yet: the run is not complete"
            raise StoreError(f"no adapter of client '{client}' in '{self.path}'; there are: {known}")
        return folder


@dataclass(frozen=True)
class Study:
    """A config and its runs, as they lie on disk."""

    path: Path

    @property
    def config(self) -> Config:
        return StudyFolder(self.path).config()

    @property
    def runs(self) -> list[Run]:
        return [Run(folder.path) for folder in StudyFolder(self.path).runs()]

    @property
    def results(self) -> pd.DataFrame:
        """All rows of results.csv: client, method, seed, round, view, split, metric, value."""
        return read_results(self.path)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, or a bundled one by name (`demo`, `mira-paper`), and apply `a.b=c` overrides.

    Raises one ConfigError that lists every fault, those of the methods' own settings included.
    """
    source = Path(path)
    preset = bundled.preset(str(path))
    if preset is not None and not source.is_file():  # a folder of that name is in nobody's way
        source = preset
    return check_config(read_config(source, overrides), str(path), method_files.entry_faults)


def run(config: Config, *, observer: Observer = silent, overwrite: bool = False) -> Study:
    """Run every method with every seed of a config into its output_dir.

    overwrite: replace a study that is already there; otherwise that is an error. Raises a FedMiraError before anything
    is written if data, model, methods or the folder cannot work.
    """
    check_trackers(config.report_to)
    folder = StudyFolder(Path(config.output_dir))
    folder.check_free(overwrite=overwrite)
    prepared = prepare(config, observer)
    if overwrite and folder.path.is_dir():
        with folder.held():
            folder.clear()
    folder.create(config)
    with folder.held(), tracking(config.report_to, folder.path, observer) as watched:
        return _run_all(folder, prepared, watched)


def resume(path: str | Path, overrides: Sequence[str] = (), *, observer: Observer = silent) -> Study:
    """Go on with a study, or with only one of its runs, where the newest intact checkpoints are.

    overrides: only `federation.rounds=N`, and only upwards; runs that were complete then go on too.
    Raises StoreError if there is nothing to resume, ConfigError for any other override.
    """
    folder, only = find_study(Path(path))
    config = folder.config()
    config = check_config(config.model_dump(by_alias=True), str(folder.path / "config.yaml"), method_files.entry_faults)
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "federation.rounds" or not value.isdecimal() or int(value) < config.federation.rounds:
            raise ConfigError(
                [
                    f"'{override}': on resume only federation.rounds may change, from {config.federation.rounds} up"
                    "; anything else is a new study"
                ],
                "overrides",
            )
        config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": int(value)})})
    check_trackers(config.report_to)
    with folder.held(), tracking(config.report_to, folder.path, observer) as watched:
        prepared = prepare(config, observer, saved=_saved_facts(folder))
        _check_clients(folder, prepared)
        if overrides:
            folder.rewrite(config)
        return _run_all(folder, prepared, watched, only=only)


def load_run(path: str | Path) -> Run:
    """Open one run folder. Raises StoreError if it is none."""
    RunFolder(Path(path)).facts  # noqa: B018 - reading checks it
    return Run(Path(path))


def load_method(name: str) -> method_files.MethodModule:
    """Import a method by id or dotted path."""
    return method_files.load(name)


def methods() -> list[str]:
    """List the ids of the methods in the tree."""
    return method_files.names()


def report(path: str | Path) -> Path:
    """Write report.html and summary.json of a study (or of the study a run belongs to); return the report's path."""
    return write_report(find_study(Path(path))[0].path)


def export(run: str | Path | Run, *, client: str | None = None, out: str | Path = "adapters") -> list[Path]:
    """Copy the PEFT folders of one client, or of all, to `out/<client>`; return the copies.

    Raises StoreError if the run has no such adapter, it holds a pickle, or a copy would overwrite something.
    """
    sources = _adapters(run, client)
    targets = [Path(out) / source.name for source in sources]
    copy_adapters(sources, targets)
    return targets


def merge(
    run: str | Path | Run, *, client: str | None = None, out: str | Path = "merged", dtype: str | None = None
) -> list[Merged]:
    """Merge the adapter of one client, or of each, into the base; write whole models to `out/<client>`.

    dtype: float32, bfloat16 or float64; None = as in the run. What is written was loaded again and compared.
    Raises StoreError, ConfigError or ModelError, before any weights are loaded wherever that can be known.
    """
    sources = _adapters(run, client)
    opened = Run(sources[0].parent.parent)
    targets = [Path(out) / source.name for source in sources]
    return merge_adapters(sources, targets, facts=opened.facts, revision=opened.config.model.revision, dtype=dtype)


def _adapters(run: str | Path | Run, client: str | None) -> list[Path]:
    """Return the adapter folder of one client, or of all. Raises StoreError if there is none."""
    opened = run if isinstance(run, Run) else load_run(run)
    if client is not None:
        return [opened.adapters(client)]
    found = sorted(path for path in (opened.path / "adapters").glob("*") if path.is_dir())
    if not found:
        raise StoreError(f"'{opened.path}' has no adapters yet; finish it with 'fedmira resume {opened.path}'")
    return found


def _saved_facts(folder: StudyFolder) -> dict[str, Any] | None:
    """Facts of any run of the study: all share dtype, threads, cohort and base. None if no run has begun."""
    return next((run.facts for run in folder.runs()), None)


def _check_clients(folder: StudyFolder, prepared: Prepared) -> None:
    """Refuse to go on with other data than the study began with, as far as its clients and counts tell."""
    kinds = prepared.kinds()
    tables = {layout: client_table(prepared.workplace, one) for layout, one in kinds.items()}  # all data are hashed
    for run in folder.runs():
        method = prepared.built[run.facts["label"]].methods[run.facts["seed"]]
        table = tables[prepared.under(method).layout]
        began: dict[str, Any] = read_json(run.path / "clients.json")
        changed = [name for name in {**began, **table} if began.get(name) != table.get(name)]
        if changed:
            raise StoreError(
                f"data.path '{prepared.config.data.path}' is not the data this study began with: {len(changed)} "
                f"clients differ, such as '{changed[0]}'; put the old data back, or begin a new study"
            )


def _run_all(folder: StudyFolder, prepared: Prepared, observer: Observer, *, only: RunFolder | None = None) -> Study:
    """Run what is not complete yet (of one run, if `only` is given), seed by seed, then write the report."""
    config = prepared.config
    start: Scores | None = None

    def written(done: int) -> None:
        observer("scoring", {"done": done, "clients": len(prepared.federation)})

    with using_threads(prepared.threads):
        for seed in config.seeds:
            for label, built in prepared.built.items():
                run_folder = folder.run(label, seed)
                other = only is not None and run_folder.path.resolve() != only.path.resolve()
                if other or _is_complete(run_folder, config):
                    continue
                if start is None:
                    observer("start", {"what": "scoring the untouched base"})
                    start = score_start(prepared.workplace, prepared.federation, written)
                _run_one(run_folder, prepared, built, seed, start, observer)
    observer("report", {})
    write_report(folder.path)
    return Study(folder.path)


def _is_complete(folder: RunFolder, config: Config) -> bool:
    if not (folder.path / "run.json").is_file():
        return False
    facts = folder.facts
    return facts["state"] == "complete" and facts["rounds"] >= config.federation.rounds


def _run_one(folder: RunFolder, prepared: Prepared, built: Built, seed: int, start: Scores, observer: Observer) -> None:
    """Carry one run to its last round, then write its adapters."""
    method, cohort = built.methods[seed], prepared.cohorts[seed]
    federation = replace(prepared.under(method), run=f"{built.label}/seed-{seed}")
    config = prepared.config.model_copy(
        update={"seeds": [seed], "methods": [built.recipe.entry], "output_dir": str(folder.path / "again")}
    )
    facts = _facts(prepared, built, seed)
    with _marked(folder):
        if (folder.path / "run.json").is_file():
            _reopen(folder, config, facts)
        else:
            folder.create(config, facts, client_table(prepared.workplace, federation))
        _write_graph(folder, method.facts.graph, cohort)
        observer("run", {"folder": folder.path, "facts": facts})
        with folder.logging():
            for note in built.notes:
                log.warning(note)
            training = training_of(config, seed)
            clients = make_clients(prepared.workplace, federation, method, training, scratch=folder.path)
            course = Course(config.federation.rounds, config.evaluation.every, seed, training.learning_rate)
            ended = run_rounds(
                federation, method, clients, cohort.schedule, folder, course=course, start=start, observer=observer
            )
            _write_graph(folder, ended.graph, cohort)
            write_adapters(folder, prepared, federation, method, ended.serve, observer)
        records = folder.records()
        refused = sum(len(record["refused"]) for record in records)
        folder.update(
            state="complete",
            finished=_now(),
            bytes_up=sum(record["bytes_up"] for record in records),
            bytes_down=sum(record["bytes_down"] for record in records),
            seconds=sum(record["seconds"] for record in records),
            ever_sampled=len({name for record in records for name in record["clients"]}),
            refused_uploads=refused,
            refused_replies=sum(int(record["notes"].get("refused_replies", 0)) for record in records),
        )
    observer("complete", {"folder": folder.path, "refused": refused})


def _reopen(folder: RunFolder, config: Config, facts: Mapping[str, Any]) -> None:
    """Prepare an earlier run to go on: same graph, no stale adapters, and a note of when, where and with what.

    Raises MethodError if the graph is not the one the run began with.
    """
    began = folder.facts
    if began["graph_sha256"] != facts["graph_sha256"]:
        raise MethodError(
            f"'{folder.path}': the task graph is not the one this run began with (a graph file or a data column has "
            "changed); put the old one back, or begin a new study"
        )
    if folder.adapters.is_dir():  # of an earlier end: they would pass for those of the rounds to come
        shutil.rmtree(folder.adapters)
    folder.rewrite(config)
    this_time = {key: facts[key] for key in ("started", "versions", "device", "command")}
    once = {key: began[key] for key in this_time}
    folder.update(**{**facts, **once}, resumed=[*began.get("resumed", []), this_time])
    if began["versions"] != facts["versions"]:
        log.warning("'%s' began with other library versions: the same bits are not promised", folder.path)


@contextmanager
def _marked(folder: RunFolder) -> Iterator[None]:
    """Write into run.json how a run ended when it did not end well.

    Raises Stopped where the disk failed (full, gone), memory ran out or a merge gave no numbers: what was saved is
    intact and the run can go on.
    """
    try:
        yield
    except BaseException as error:
        outside = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError | WireError) or (
            isinstance(error, FedMiraError) and isinstance(error.__cause__, OSError)
        )
        state = "interrupted" if outside or isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        signals = {KeyboardInterrupt: "by Ctrl-C", SystemExit: "by a signal"}
        why = next((text for kind, text in signals.items() if isinstance(error, kind)), type(error).__name__)
        log.log(logging.INFO if why in signals.values() else logging.ERROR, "%s: %s", state, why)
        with suppress(StoreError, OSError):  # a full disk: the state stays "running", which resumes as well
            folder.update(state=state, finished=_now())
        if outside:
            raise Stopped(f"{_told(error)}; finished rounds are saved") from error
        raise


def _told(error: BaseException) -> str:
    """Say what stopped a run: our words and the system's. Those of a library may hold text of an example."""
    if isinstance(error, FedMiraError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}{f': {error.filename!r}' if error.filename else ''}"
    return "out of memory" if isinstance(error, MemoryError | torch.OutOfMemoryError) else type(error).__name__


def _facts(prepared: Prepared, built: Built, seed: int) -> dict[str, Any]:
    method, entry = built.methods[seed], built.recipe.entry
    federation, cohort, config = prepared.under(method), prepared.cohorts[seed], prepared.config
    base, graph = prepared.workplace.base, method.facts.graph
    pulls = None
    if method.facts.pull is not None:
        pulls = [100 * float(share) for ids in cohort.schedule for share in method.facts.pull(torch.from_numpy(ids))]
    return {
        "state": "running",
        "method": method.name,
        "label": entry.folder,
        "settings": entry.settings | ({"with": entry.wrappers} if entry.wrappers else {}),
        "seed": seed,
        "rounds": config.federation.rounds,
        "clients": len(federation),
        "sampled": len(cohort.schedule[0]),
        "personal": method.personal,
        "base_model": config.model.base_model,
        "template": prepared.intake.template,
        "base_fingerprint": base.fingerprint,
        "architecture": type(base.model).__name__,
        "layout_fingerprint": federation.layout.fingerprint,
        "graph_sha256": None if graph is None else graph.fingerprint,
        "parameters": federation.layout.parameters,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "cohort": prepared.workplace.cohort,
        "threads": prepared.threads,
        "pull_percent": None if not pulls else [min(pulls), sum(pulls) / len(pulls), max(pulls)],
        "versions": {
            "fedmira": importlib.metadata.version("fedmira"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        "command": sys.argv,
        "started": _now(),
    }


def _write_graph(folder: RunFolder, graph: Graph | None, cohort: Cohort) -> None:
    if graph is None:
        return
    write_json(
        folder.path / "graph.json",
        {
            "kind": graph.kind,
            "note": graph.note,
            "clients": list(cohort.ids),
            "entries": graph.entries,
            "edges": graph.edges(MAX_GRAPH_EDGES),
        },
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
