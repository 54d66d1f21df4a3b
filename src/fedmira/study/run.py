"""Run a study, or continue one: every method with every seed, each into a separate folder, then the report."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedmira.config.sections import Config
from fedmira.disk.files import read_json, remove_temporaries, write_json
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.disk.run_facts import SCHEMA, RunFacts, State
from fedmira.engine.clients import AtHand, Scores
from fedmira.engine.events import AnswersWritten, Observer
from fedmira.engine.federation import Federation
from fedmira.engine.rates import Schedule
from fedmira.engine.run import run_rounds
from fedmira.engine.scoring import examples_of, score_start
from fedmira.engine.simulated import make_clients
from fedmira.errors import FedMiraError, MethodError, Stopped, StoreError, WireError
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Cohort
from fedmira.names import ClientNames
from fedmira.reports.render import write_report
from fedmira.study.assemble import Built, Prepared, client_table, lonely_notes, prepare, using_threads
from fedmira.study.events import ReportBegun, RunBegun, RunDone, StepBegun, StudyBegun
from fedmira.study.handover import write_adapters
from fedmira.study.trackers import tracking
from fedmira.study.training import course_of, schedule_of, training_of

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")
MAX_GRAPH_EDGES = 1_000_000  # a larger graph is described in graph.json, not listed


# (study, entry of `methods`, seed, the federation with that method's rows, the run's folder) -> its clients
Where = Callable[[Prepared, Built, int, Federation, Path], AtHand]


def in_this_process(prepared: Prepared, built: Built, seed: int, federation: Federation, folder: Path) -> AtHand:
    """Simulate the clients of one run here; what is too large for RAM goes to `folder`."""
    training = training_of(prepared.config, seed, built.training)
    return make_clients(prepared.workplace, federation, built.methods[seed], training, scratch=folder)


def start(
    folder: StudyFolder, config: Config, observer: Observer, *, overwrite: bool, where: Where = in_this_process
) -> None:
    """Run a new study. overwrite: what is in the folder is removed once all that can be wrong has been checked."""
    prepared = prepare(config, observer)
    if overwrite and folder.path.is_dir():
        with folder.held():
            folder.clear()
    folder.create(config)
    with folder.held(), tracking(config.report_to, folder.path, observer) as watched:
        _run_all(folder, prepared, watched, where)


def go_on(
    folder: StudyFolder,
    config: Config,
    observer: Observer,
    *,
    only: RunFolder | None,
    rewrite: bool,
    where: Where = in_this_process,
) -> None:
    """Carry a stored study, or `only` one of its runs, to its end. rewrite: `config` has changed and is stored."""
    with folder.held(), tracking(config.report_to, folder.path, observer) as watched:
        _check_schema(folder, config)
        prepared = prepare(config, observer, saved=_saved_facts(folder))
        _check_clients(folder, prepared)
        if rewrite:
            folder.rewrite(config)
        _run_all(folder, prepared, watched, where, only=only)


def _check_schema(folder: StudyFolder, config: Config) -> None:
    """Refuse to go on with a run whose checkpoints an earlier version wrote."""
    for run in folder.runs():
        facts = run.facts
        if facts.schema < SCHEMA and not _is_complete(run, config):
            raise StoreError(
                f"'{run.path}' was begun by FedMira {facts.versions['fedmira']} with checkpoints of schema "
                f"{facts.schema}, and this version continues schema {SCHEMA}: finish it with the version that "
                "began it ('fedmira resume' there), or run its config.yaml anew"
            )


def _saved_facts(folder: StudyFolder) -> RunFacts | None:
    """Facts of any run of the study: all share dtype, threads, cohort and base. None if no run has begun."""
    return next((run.facts for run in folder.runs()), None)


def _check_clients(folder: StudyFolder, prepared: Prepared) -> None:
    """Refuse to go on with other data than the study began with, as far as its clients and counts tell."""
    kinds = prepared.kinds()
    tables = {layout: client_table(prepared.workplace, one) for layout, one in kinds.items()}  # all data are hashed
    for run in folder.runs():
        facts = run.facts
        method = prepared.built[facts.label].methods[facts.seed]
        table = tables[prepared.under(method).layout]
        began: dict[str, Any] = read_json(run.path / "clients.json")
        changed = [name for name in {**began, **table} if began.get(name) != table.get(name)]
        if changed:
            names = ClientNames({**prepared.intake.names.by_id, **run.names.by_id})
            raise StoreError(
                f"data.path '{prepared.config.data.path}' is not the data this study began with: {len(changed)} "
                f"clients differ, such as '{names.shown(changed[0])}'; put the old data back, or begin a new study"
            )


def _run_all(
    folder: StudyFolder, prepared: Prepared, observer: Observer, where: Where, *, only: RunFolder | None = None
) -> None:
    """Run what is not complete yet (of one run, if `only` is given), seed by seed, then write the report."""
    config = prepared.config
    start: Scores | None = None

    def written(done: int) -> None:
        observer(AnswersWritten(done, len(prepared.federation)))

    due = [
        (run, prepared.built[label], seed)
        for seed in config.seeds
        for label in prepared.built
        if not _is_complete(run := folder.run(label, seed), config)
        and (only is None or run.path.resolve() == only.path.resolve())
    ]
    observer(StudyBegun(folder.path, len(due)))
    with using_threads(prepared.threads):
        for run, built, seed in due:
            if start is None:
                observer(StepBegun("scoring the untouched base"))
                start = score_start(prepared.workplace, prepared.federation, written)
            _run_one(run, prepared, built, seed, start, observer, where)
    observer(ReportBegun())
    write_report(folder.path)


def _is_complete(folder: RunFolder, config: Config) -> bool:
    if not (folder.path / "run.json").is_file():
        return False
    facts = folder.facts
    return facts.state == "complete" and facts.rounds >= config.federation.rounds


def _run_one(
    folder: RunFolder, prepared: Prepared, built: Built, seed: int, start: Scores, observer: Observer, where: Where
) -> None:
    """Carry one run to its last round, then write its adapters."""
    method, cohort = built.methods[seed], prepared.cohorts[seed]
    federation = replace(prepared.under(method), run=f"{built.label}/seed-{seed}")
    config = prepared.config.model_copy(
        update={"seeds": [seed], "methods": [built.recipe.entry], "output_dir": str(folder.path / "again")}
    )
    facts = _facts(prepared, built, seed)
    notes: list[str] = []
    with _marked(folder):
        remove_temporaries(folder.path)
        if (folder.path / "run.json").is_file():
            notes = _reopen(folder, config, facts, schedule_of(built.training, facts.rounds))
        else:
            folder.create(config, facts, client_table(prepared.workplace, federation))
        _write_graph(folder, method.facts.graph, cohort)
        observer(RunBegun(folder.path, facts))
        with folder.logging():
            for note in [*built.notes, *notes]:
                log.warning(note)
            clients = where(prepared, built, seed, federation, folder.path)
            course = course_of(config, built.training, seed)
            ended = run_rounds(
                federation, method, clients, cohort.schedule, folder, course=course, start=start, observer=observer
            )
            if prepared.workplace.evaluation.examples:
                folder.write_examples(examples_of(prepared.workplace, start, ended.test))
            _write_graph(folder, ended.graph, cohort)
            if method.facts.learned is not None:
                seen = sorted({int(k) for ids in cohort.schedule for k in ids})
                for note in lonely_notes(built.label, ended.graph, cohort, of=seen):
                    log.warning(note)
            serve = partial(clients.adapters, send=ended.send)
            write_adapters(folder, prepared, federation, method, serve, observer, start=start, ended=ended)
        records = folder.records()
        refused = sum(len(record["refused"]) for record in records)
        kept = sorted(number or len(records) for number in ended.chosen)
        early = None
        if ended.stopped_early is not None:
            early = {"round": len(records), "reason": ended.stopped_early}
        folder.update(
            replace(
                folder.facts,
                state="complete",
                finished=_now(),
                kept_rounds=(kept[0], kept[len(kept) // 2], kept[-1]) if course.keep == "best" else None,
                stopped_early=early,
                bytes_up=sum(record["bytes_up"] for record in records),
                bytes_down=sum(record["bytes_down"] for record in records),
                seconds=sum(record["seconds"] for record in records),
                ever_sampled=len({name for record in records for name in record["clients"]}),
                refused_uploads=refused,
                refused_replies=sum(int(record["notes"].get("refused_replies", 0)) for record in records),
            )
        )
    observer(RunDone(folder.path, refused))


def _reopen(folder: RunFolder, config: Config, facts: RunFacts, schedule: Schedule) -> list[str]:
    """Prepare an earlier run to go on: same graph, no stale adapters, and a note of when, where and with what.

    Returns what is to be logged. Raises MethodError if the graph is not the one the run began with.
    """
    began = folder.facts
    if began.graph_sha256 != facts.graph_sha256:
        raise MethodError(
            f"'{folder.path}': the task graph is not the one this run began with (a graph file or a data column has "
            "changed); put the old one back, or begin a new study"
        )
    if folder.adapters.is_dir():  # of an earlier end: they would pass for those of the rounds to come
        shutil.rmtree(folder.adapters)
    folder.rewrite(config)
    this_time: dict[str, Any] = {
        "started": facts.started,
        "versions": facts.versions,
        "device": facts.device,
        "command": facts.command,
    }
    notes = []
    if began.rounds < facts.rounds and schedule.depends_on_rounds:
        this_time["rounds_before"] = began.rounds
        notes.append(
            f"{facts.label}: the learning rate of earlier rounds followed a schedule of {began.rounds} rounds, that of "
            f"the rest follows one of {facts.rounds}: a run of {facts.rounds} rounds from the start would differ"
        )
    folder.update(
        replace(
            facts,
            started=began.started,
            versions=began.versions,
            device=began.device,
            command=began.command,
            resumed=[*began.resumed, this_time],
        )
    )
    if began.versions != facts.versions:
        log.warning("'%s' began with other library versions: the same bits are not promised", folder.path)
    return notes


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
        state: State = "interrupted" if outside or isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        signals = {KeyboardInterrupt: "by Ctrl-C", SystemExit: "by a signal"}
        why = next((text for kind, text in signals.items() if isinstance(error, kind)), type(error).__name__)
        log.log(logging.INFO if why in signals.values() else logging.ERROR, "%s: %s", state, why)
        with suppress(StoreError, OSError):  # a full disk: the state stays "running", which resumes as well
            folder.update(replace(folder.facts, state=state, finished=_now()))
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


def _facts(prepared: Prepared, built: Built, seed: int) -> RunFacts:
    method, entry = built.methods[seed], built.recipe.entry
    federation, cohort, config = prepared.under(method), prepared.cohorts[seed], prepared.config
    base, graph = prepared.workplace.base, method.facts.graph
    pulls = None
    if method.facts.pull is not None:
        pulls = [100 * float(share) for ids in cohort.schedule for share in method.facts.pull(torch.from_numpy(ids))]
    return RunFacts(
        schema=SCHEMA,
        state="running",
        method=method.name,
        label=entry.folder,
        settings=entry.settings
        | ({"with": entry.wrappers} if entry.wrappers else {})
        | ({"training": entry.training.given} if entry.training is not None and entry.training.given else {}),
        training=built.training.model_dump(mode="json"),
        seed=seed,
        rounds=config.federation.rounds,
        keep=config.evaluation.keep,
        clients=len(federation),
        sampled=prepared.sampled,
        personal=method.personal,
        base_model=config.model.base_model,
        template=prepared.intake.template.name,
        base_fingerprint=base.fingerprint,
        architecture=type(base.model).__name__,
        layout_fingerprint=federation.layout.fingerprint,
        graph_sha256=None if graph is None else graph.fingerprint,
        parameters=federation.layout.parameters,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        cohort=prepared.workplace.cohort,
        threads=prepared.threads,
        pull_percent=None if not pulls else [min(pulls), sum(pulls) / len(pulls), max(pulls)],
        versions={
            "fedmira": importlib.metadata.version("fedmira"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
        },
        command=sys.argv,
        started=_now(),
    )


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
            "lonely": len(graph.lonely),
            "edges": graph.edges(MAX_GRAPH_EDGES),
        },
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
