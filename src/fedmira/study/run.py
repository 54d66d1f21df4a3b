"""Run a study, or continue one: every method with every seed, each into a separate folder, then the report."""

import importlib.metadata
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmira.config.sections import Config
from fedmira.disk.files import read_json
from fedmira.disk.folders import RunFolder, StudyFolder
from fedmira.disk.run_facts import SCHEMA, RunFacts
from fedmira.engine.clients import AtHand, Scores
from fedmira.engine.events import AnswersWritten, Observer
from fedmira.engine.executor import Executor
from fedmira.engine.federation import Federation
from fedmira.engine.run import Ended
from fedmira.engine.scoring import examples_of, score_start
from fedmira.errors import StoreError
from fedmira.methods.base import Cohort
from fedmira.names import ClientNames
from fedmira.reports.render import write_report
from fedmira.study.assemble import Built, Materials, Prepared, client_table, prepare
from fedmira.study.carry_out import Job, carry_out, describe_run, is_complete
from fedmira.study.client_privacy import upload_account
from fedmira.study.clients import clients_of
from fedmira.study.events import ReportBegun, StepBegun, StudyBegun
from fedmira.study.handover import write_adapters
from fedmira.study.passes import PassShape
from fedmira.study.privacy import account, forget_key
from fedmira.study.spreading import spread
from fedmira.study.threads import using_threads
from fedmira.study.trackers import tracking

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")


# (study, entry of `methods`, seed, the federation with that method's rows, the run's folder) -> its clients
Where = Callable[[Prepared, Built, int, Federation, Path], AtHand]


def in_this_process(prepared: Prepared, built: Built, seed: int, federation: Federation, folder: Path) -> AtHand:
    """Simulate the clients of one run here; what is too large for RAM goes to `folder`."""
    return clients_of(
        prepared.config,
        built.methods[seed],
        built.recipe.wrappers,
        built.training,
        prepared.workplace,
        federation,
        folder,
        seed=seed,
        threads=prepared.threads,
        data=lambda: [client["sha256"] for client in client_table(prepared.workplace, federation).values()],
        scratch=folder,
    )


@dataclass(eq=False)
class Common:
    """What studies of the same data, base and evaluation share, so that it is loaded and scored once.

    start: scores of the untouched base; wanted: metrics that a later study needs of it, beside its own. executor: the
    actors that compute, where a study is spread; they end with `close`.
    """

    materials: Materials | None = None
    start: Scores | None = None
    wanted: Sequence[str] = ()
    executor: Executor | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    def prepare(self, config: Config, observer: Observer, saved: RunFacts | None = None) -> Prepared:
        """Check a study, with the data and the base of an earlier one."""
        prepared = prepare(config, observer, saved, materials=self.materials)
        self.materials = prepared.materials
        return prepared

    def place(self, prepared: Prepared, observer: Observer) -> Prepared:
        """Let actors compute the passes of a study that is to be spread."""
        if prepared.workers is None:
            return prepared
        if self.executor is None:
            observer(StepBegun(f"starting {prepared.workers} actors of Ray"))
            self.executor = self.opened.enter_context(spread(prepared))
        return replace(prepared, workplace=replace(prepared.workplace, executor=self.executor))

    def close(self) -> None:
        """End what was started for these studies; a later one starts it anew."""
        self.executor = None
        self.opened.close()

    def score_start(self, prepared: Prepared, observer: Observer) -> Scores:
        """Return the scores of the untouched base, in the metrics that this study evaluates."""

        def written(done: int) -> None:
            observer(AnswersWritten(done, len(prepared.federation)))

        metrics = ("loss", *prepared.workplace.evaluation.metrics)
        if self.start is None or not set(metrics) <= set(self.start.test):
            observer(StepBegun("scoring the untouched base"))
            evaluation = prepared.workplace.evaluation
            more = tuple(metric for metric in self.wanted if metric not in metrics)
            workplace = replace(
                prepared.workplace, evaluation=replace(evaluation, metrics=(*evaluation.metrics, *more))
            )
            self.start = score_start(workplace, prepared.federation, written)
        return replace(self.start, test={metric: self.start.test[metric] for metric in metrics})


@contextmanager
def lasting(common: Common | None) -> Iterator[Common]:
    """Yield what studies share: what is there and outlasts the block, or a new one that ends with it."""
    if common is not None:
        yield common
        return
    common = Common()
    try:
        yield common
    finally:
        common.close()


def start(
    folder: StudyFolder,
    config: Config,
    observer: Observer,
    *,
    overwrite: bool,
    where: Where = in_this_process,
    common: Common | None = None,
) -> None:
    """Run a new study. overwrite: what is in the folder is removed once all that can be wrong has been checked.

    common: what earlier studies have loaded and scored.
    """
    with lasting(common) as common:
        prepared = common.place(common.prepare(config, observer), observer)
        if overwrite and folder.path.is_dir():
            with folder.held():
                folder.clear()
        folder.create(config)
        with folder.held(), tracking(config.report_to, folder.path, observer) as watched:
            _run_all(folder, prepared, watched, where, common)


def go_on(
    folder: StudyFolder,
    config: Config,
    observer: Observer,
    *,
    only: RunFolder | None,
    rewrite: bool,
    where: Where = in_this_process,
    common: Common | None = None,
) -> None:
    """Carry a stored study, or `only` one of its runs, to its end. rewrite: `config` has changed and is stored.

    common: what earlier studies have loaded and scored.
    """
    with lasting(common) as common, folder.held(), tracking(config.report_to, folder.path, observer) as watched:
        _check_schema(folder, config)
        prepared = common.prepare(config, observer, saved_facts(folder))
        _check_clients(folder, prepared)
        prepared = common.place(prepared, observer)
        if rewrite:
            folder.rewrite(config)
        _run_all(folder, prepared, watched, where, common, only=only)


def _check_schema(folder: StudyFolder, config: Config) -> None:
    """Refuse to go on with a run whose checkpoints an earlier version wrote."""
    for run in folder.runs():
        facts = run.facts
        if facts.schema < SCHEMA and not is_complete(run, config):
            raise StoreError(
                f"'{run.path}' was begun by FedMira {facts.versions['fedmira']} with checkpoints of schema "
                f"{facts.schema}, and this version continues schema {SCHEMA}: finish it with the version that "
                "began it ('fedmira resume' there), or run its config.yaml anew"
            )


def saved_facts(folder: StudyFolder) -> RunFacts | None:
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
    folder: StudyFolder,
    prepared: Prepared,
    observer: Observer,
    where: Where,
    common: Common,
    *,
    only: RunFolder | None = None,
) -> None:
    """Run what is not complete yet (of one run, if `only` is given), seed by seed, then write the report."""
    config = prepared.config
    due = [
        (run, prepared.built[label], seed)
        for seed in config.seeds
        for label in prepared.built
        if not is_complete(run := folder.run(label, seed), config)
        and (only is None or run.path.resolve() == only.path.resolve())
    ]
    observer(StudyBegun(folder.path, len(due)))
    with using_threads(prepared.threads):
        for run, built, seed in due:
            _run_one(run, prepared, built, seed, common.score_start(prepared, observer), observer, where)
    observer(ReportBegun())
    write_report(folder.path)


def _run_one(
    folder: RunFolder, prepared: Prepared, built: Built, seed: int, start: Scores, observer: Observer, where: Where
) -> None:
    """Carry one run to its last round, then write its adapters."""
    method, cohort = built.methods[seed], prepared.cohorts[seed]
    federation = replace(prepared.under(method), run=f"{built.label}/seed-{seed}")

    def finish(clients: AtHand, ended: Ended) -> None:
        spent = account(prepared.config, method, prepared.workplace.clients, folder.path)
        if spent is not None:
            folder.update(replace(folder.facts, privacy=spent))
        sent = upload_account(prepared.config, method, built.recipe.wrappers, folder.path)
        if sent is not None:
            folder.update(replace(folder.facts, client_privacy=sent))
        if prepared.workplace.evaluation.examples:
            folder.write_examples(examples_of(prepared.workplace, start, ended.test))
        serve = partial(clients.adapters, send=ended.send)
        write_adapters(folder, prepared, federation, method, serve, observer, start=start, ended=ended)
        forget_key(folder.path)

    job = Job(
        folder=folder,
        config=prepared.config,
        built=built,
        cohort=cohort,
        federation=federation,
        facts=_facts(prepared, built, cohort, federation),
        clients=partial(client_table, prepared.workplace, federation),
        start=start,
    )
    carry_out(job, partial(where, prepared, built, seed, federation, folder.path), finish, observer)


def _facts(prepared: Prepared, built: Built, cohort: Cohort, federation: Federation) -> RunFacts:
    base = prepared.workplace.base
    return describe_run(
        prepared.config,
        built,
        cohort,
        federation,
        template=prepared.intake.template.name,
        architecture=type(base.model).__name__,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        shape=PassShape.of(prepared.workplace),
        threads=prepared.threads,
        versions={
            "fedmira": importlib.metadata.version("fedmira"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
        },
    )
