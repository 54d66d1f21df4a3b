"""One run of a study from its first round to its last, wherever its clients are."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

from fedmira.config.sections import Config
from fedmira.disk.files import remove_temporaries, write_json
from fedmira.disk.folders import RunFolder
from fedmira.disk.run_facts import SCHEMA, RunFacts, State
from fedmira.engine.clients import Clients, Scores
from fedmira.engine.events import Observer
from fedmira.engine.federation import Federation
from fedmira.engine.rates import Schedule
from fedmira.engine.run import Ended, run_rounds
from fedmira.errors import FedMiraError, MethodError, Stopped, StoreError, WireError
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Cohort
from fedmira.study.assemble import Built
from fedmira.study.events import RunBegun, RunDone
from fedmira.study.notes import lonely_notes
from fedmira.study.passes import PassShape
from fedmira.study.training import course_of, schedule_of

log = logging.getLogger(__name__)

MAX_GRAPH_EDGES = 1_000_000  # a larger graph is described in graph.json, not listed
Someone = TypeVar("Someone", bound=Clients)


@dataclass(frozen=True, eq=False)
class Job:
    """One run, and what it needs beside its clients. config: of the study; clients: gives clients.json.

    ram_bytes: of the rows of all clients, as of a Table.
    """

    folder: RunFolder
    config: Config
    built: Built
    cohort: Cohort
    federation: Federation
    facts: RunFacts
    clients: Callable[[], Mapping[str, Any]]
    start: Scores
    ram_bytes: int | None = None


def is_complete(folder: RunFolder, config: Config) -> bool:
    """Has a run all the rounds that a config asks for?"""
    if not (folder.path / "run.json").is_file():
        return False
    facts = folder.facts
    return facts.state == "complete" and facts.rounds >= config.federation.rounds


def describe_run(
    config: Config,
    built: Built,
    cohort: Cohort,
    federation: Federation,
    *,
    template: str,
    architecture: str,
    dtype: str,
    device: str,
    shape: PassShape,
    threads: int,
    versions: Mapping[str, str],
) -> RunFacts:
    """Return what run.json says of a run that begins. config: of the study; shape: of its passes."""
    method, entry = built.methods[cohort.seed], built.recipe.entry
    graph, pulls = method.facts.graph, None
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
        seed=cohort.seed,
        rounds=config.federation.rounds,
        keep=config.evaluation.keep,
        clients=len(federation),
        sampled=len(cohort.schedule[-1]),
        personal=method.personal,
        base_model=config.model.base_model,
        template=template,
        base_fingerprint=federation.base,
        architecture=architecture,
        layout_fingerprint=federation.layout.fingerprint,
        start_sha256=None if federation.given is None else federation.given.fingerprint,
        graph_sha256=None if graph is None else graph.fingerprint,
        parameters=federation.layout.parameters,
        dtype=dtype,
        device=device,
        cohort=shape.cohort,
        recompute=shape.recompute,
        at_once=shape.at_once,
        threads=threads,
        pull_percent=None if not pulls else [min(pulls), sum(pulls) / len(pulls), max(pulls)],
        versions=versions,
        command=sys.argv,
        started=now(),
        joined=None if federation.since is None else _later(federation.names, federation.since.tolist()),
    )


def _later(names: Sequence[str], since: Sequence[int]) -> dict[str, int] | None:
    """Return the first round of each client that joined after round 1; None if none did."""
    return {name: number for name, number in zip(names, since, strict=True) if number > 1} or None


def carry_out(
    job: Job, open_clients: Callable[[], Someone], finish: Callable[[Someone, Ended], None], observer: Observer
) -> None:
    """Carry a run from the newest checkpoint to its last round. finish: what is written when it has been tested."""
    folder, facts, cohort = job.folder, job.facts, job.cohort
    config = job.config.model_copy(
        update={"seeds": [facts.seed], "methods": [job.built.recipe.entry], "output_dir": str(folder.path / "again")}
    )
    method = job.built.methods[facts.seed]
    notes: list[str] = []
    with _marked(folder):
        remove_temporaries(folder.path)
        if (folder.path / "run.json").is_file():
            notes = _reopen(folder, config, facts, schedule_of(job.built.training, facts.rounds))
            if facts.joined and set(folder.names.by_id) != set(cohort.ids):
                # after run.json, which says who joined: else they would pass for clients of the first round
                write_json(folder.path / "clients.json", dict(job.clients()))
                folder = RunFolder(folder.path)
        else:
            folder.create(config, facts, job.clients())
        _write_graph(folder, method.facts.graph, cohort)
        observer(RunBegun(folder.path, facts))
        with folder.logging():
            for note in [*job.built.notes, *notes]:
                log.warning(note)
            clients = open_clients()
            course = course_of(config, job.built.training, facts.seed)
            ended = run_rounds(
                job.federation,
                method,
                clients,
                cohort.schedule,
                folder,
                course=course,
                start=job.start,
                observer=observer,
                ram_bytes=job.ram_bytes,
            )
            _write_graph(folder, ended.graph, cohort)
            if method.facts.learned is not None:
                seen = sorted({int(k) for ids in cohort.schedule for k in ids})
                for note in lonely_notes(job.built.label, ended.graph, cohort, of=seen):
                    log.warning(note)
            finish(clients, ended)
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
                finished=now(),
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
    grown = began.joined != facts.joined  # which changes the graph
    if began.graph_sha256 != facts.graph_sha256 and not grown:
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
        memory = _is_out_of_memory(error)
        of_the_disk = isinstance(error, FedMiraError) and isinstance(error.__cause__, OSError)
        outside = memory or of_the_disk or isinstance(error, OSError | WireError)
        goes_on = outside or isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
        state: State = "interrupted" if goes_on else "failed"
        asked = {KeyboardInterrupt: "by Ctrl-C", SystemExit: "by a signal", Stopped: str(error)}
        why = next((text for kind, text in asked.items() if isinstance(error, kind)), type(error).__name__)
        log.log(logging.INFO if why in asked.values() else logging.ERROR, "%s: %s", state, why)
        with suppress(StoreError, OSError):  # a full disk: the state stays "running", which resumes as well
            folder.update(replace(folder.facts, state=state, finished=now()))
        if outside:
            less = _less_memory(folder.facts.cohort) if memory else ""
            raise Stopped(f"{_told(error)}; finished rounds are saved{less}") from error
        raise


def _less_memory(cohort: int) -> str:
    """Say what takes less memory than a pass of so many clients."""
    if cohort > 1:
        return "; if there will be no more memory, resume with federation.cohort=N, fewer clients in a pass"
    return (
        "; a pass has one client already: if there will be no more memory, begin a study with "
        "training.gradient_checkpointing: true, or with a smaller training.batch_size or data.max_length"
    )


def _told(error: BaseException) -> str:
    """Say what stopped a run: our words and the system's. Those of a library may hold text of an example."""
    if isinstance(error, FedMiraError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}{f': {error.filename!r}' if error.filename else ''}"
    return "out of memory" if _is_out_of_memory(error) else type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for a GPU's memory, and says it in words of that of the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
