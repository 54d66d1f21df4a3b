"""Look before you run: what a study would cost, and what its examples look like to the model. Nothing is written."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import Layout
from fedmira.adapters.columns import count_columns
from fedmira.config.sections import Config
from fedmira.data.batches import Encoded
from fedmira.disk import table
from fedmira.disk.folders import StudyFolder
from fedmira.engine.cost import Plan, Speeds, Work, count_run, count_start
from fedmira.engine.events import Observer, silent
from fedmira.engine.federation import Federation
from fedmira.engine.probe import measure_speeds
from fedmira.engine.scoring import view_of
from fedmira.engine.tools import Training
from fedmira.export.peft_folder import count_exported
from fedmira.methods import build, recipe_of
from fedmira.methods.base import Clock
from fedmira.study import handover
from fedmira.study.assemble import Built, Prepared, keep_positions, prepare
from fedmira.study.client_privacy import told
from fedmira.study.events import StepBegun
from fedmira.study.intake import take_in
from fedmira.study.passes import plan_passes
from fedmira.study.threads import using_threads
from fedmira.study.trackers import check_trackers
from fedmira.study.training import training_of

log = logging.getLogger(__name__)

COPIES = 4  # full checkpoints and the deltas since, at most, in the size of one that is full


@dataclass(frozen=True)
class Shown:
    """One training example as the model gets it: pieces of text, and whether loss is taken on each."""

    client: str  # id
    name: str
    tokens: int
    labels: int
    pieces: tuple[tuple[str, bool], ...]


def show_examples(config: Config, *, observer: Observer = silent, whole: str | None = None) -> Iterator[Shown]:
    """Yield the first training example of every client, as tokenised and cut. Raises as `run` does, without a base.

    whole: the name of the only client, which has all data.
    """
    config = keep_positions(config, [recipe_of(entry) for entry in config.methods])
    tokenizer, intake = take_in(config, observer, whole=whole)
    for client in intake.clients:
        example = client.train[0]
        yield Shown(client.id, client.name, len(example.ids), example.labels, pieces_of(example, tokenizer.decode))


def pieces_of(example: Encoded, decode: Callable[[Sequence[int]], str]) -> tuple[tuple[str, bool], ...]:
    """Cut the text that an example's ids are, decoded as a whole, where loss begins and ends.

    A piece decoded alone would hide what its context makes of it, such as a space before its first word.
    """
    pieces: list[tuple[str, bool]] = []
    before = ""
    for _, stop, trained in _spans(example):
        text = decode(example.ids[:stop])
        while not text.startswith(before):  # half a character at its end, which the next token completes
            pieces[-1], before = (pieces[-1][0][:-1], pieces[-1][1]), before[:-1]
        pieces.append((text[len(before) :], trained))
        before = text
    return tuple(pieces)


def _spans(example: Encoded) -> Iterator[tuple[int, int, bool]]:
    """Cut an example into runs of ids with and without loss."""
    done = 0
    for start, stop in example.labelled:
        if done < start:
            yield done, start, False
        yield start, stop, True
        done = stop


def plan_study(config: Config, *, overwrite: bool = False, observer: Observer = silent) -> Plan:
    """Check everything that `run` checks, measure a short probe, and return what the study would cost.

    Raises what `run` would raise before it starts; only an output_dir that is taken is a warning.
    """
    check_trackers(config.report_to)
    folder = StudyFolder(Path(config.output_dir))
    folder.check_place()
    if folder.is_begun and not overwrite:  # not an error: nothing is written
        log.warning("output_dir '%s' is not empty: 'run' needs another one, or --overwrite for a study", folder.path)
    began, began_cpu = time.monotonic(), time.process_time()
    prepared = prepare(config, observer)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - began_cpu
    observer(StepBegun("measuring a few passes"))
    with using_threads(prepared.threads):
        return _plan(prepared, seconds, cpu_seconds)


def _plan(prepared: Prepared, prepare_seconds: float, prepare_cpu: float) -> Plan:
    """prepare_seconds, prepare_cpu: spent on what a study prepares too, before its first pass."""
    config, workplace = prepared.config, prepared.workplace
    clients, base = workplace.clients, workplace.base
    seed = config.seeds[0]
    schedule = prepared.cohorts[seed].schedule
    sampled = prepared.sampled
    kinds = prepared.kinds()  # few have rows of their own
    passes = prepared.plans or plan_passes(workplace, prepared.passes(), sampled, workers=prepared.workers)
    probe = _Probe(prepared, torch.from_numpy(schedule[0]))
    speeds = probe.measure(prepared.federation, training_of(config, seed))  # the untouched base is scored with these
    writes = bool(workplace.evaluation.metrics)
    start_work = count_start(clients, writes=writes, max_examples=config.evaluation.max_examples)
    costs = {label: _cost(prepared, built, seed, probe) for label, built in prepared.built.items()}
    needed = [cost.rows for cost in costs.values()]  # of the run that needs most; runs follow each other
    runs = len(prepared.built) * len(config.seeds)
    seconds = {label: cost.seconds for label, cost in costs.items()}
    total = speeds.seconds(start_work) + len(config.seeds) * sum(seconds.values())
    return Plan(
        clients=len(clients),
        sampled=sampled,
        rounds=config.federation.rounds,
        cohort=workplace.cohort,
        workers=prepared.workers,
        examples=sum(len(client.train) for client in clients),
        tokens=sum(client.tokens for client in clients),
        trained_tokens=sum(client.trained_tokens for client in clients),
        truncation=asdict(prepared.intake.truncation),
        by_client={
            client.id: {
                "train": len(client.train),
                "validation": len(client.validation),
                "test": len(client.test),
                "trained_tokens": client.trained_tokens,
            }
            for client in clients
        },
        names={client.id: client.name for client in clients},
        parameters=max(layout.parameters for layout in kinds),
        memory={
            "base": sum(value.numel() * value.element_size() for value in base.model.parameters()),
            "rows": max(rows["memory"] for rows in needed),
            "cohort": workplace.cohort * max(one.bytes_each for one in passes),
            "free": min(one.bytes_free for one in passes),
        },
        disk={
            "adapters": len(config.seeds) * sum(cost.adapters for cost in costs.values()),
            "rows": max(rows["disk"] for rows in needed),
            "checkpoints": len(config.seeds) * sum(cost.checkpoints for cost in costs.values()),
            "free": _free_disk(Path(config.output_dir)),
        },
        client_privacy={
            label: said
            for label, built in prepared.built.items()
            if (said := told(config, built.methods[seed], built.recipe.wrappers, schedule))
        },
        bytes_per_round={label: cost.travels for label, cost in costs.items()},
        speeds=speeds,
        prepare_seconds=prepare_seconds,
        start_seconds=speeds.seconds(start_work),
        training={
            label: given.given
            for label, built in prepared.built.items()
            if (given := built.recipe.entry.training) is not None and given.given
        },
        work={label: cost.work for label, cost in costs.items()},
        run_seconds=seconds,
        runs=runs,
        total_seconds=prepare_seconds + total,
        cpu_seconds=prepare_cpu + total * speeds.cpu,
    )


@dataclass(frozen=True, eq=False)
class _Probe:
    """Measures the speed of each layout and size of batch once. ids [S]: the clients of the first round."""

    prepared: Prepared
    ids: Tensor
    known: dict[tuple[Layout, int, int, bool], Speeds] = field(default_factory=dict)

    def measure(self, federation: Federation, training: Training, *, pooled: bool = False) -> Speeds:
        """Return speeds of training, scoring and answers. pooled: a pool's passes are one client's."""
        key = (federation.layout, training.batch_size, training.accumulation, pooled)
        if key not in self.known:
            plain = build("local", {}, self.prepared.cohorts[training.seed])
            ids = self.ids[:1] if pooled else self.ids
            self.known[key] = measure_speeds(self.prepared.workplace, federation, plain, training, ids)
        return self.known[key]


@dataclass(frozen=True)
class _Cost:
    """What one run of a method costs. rows: bytes in memory and on disk; others in bytes and seconds."""

    work: Work
    seconds: float
    travels: int
    rows: dict[str, int]
    checkpoints: int
    adapters: int


def _cost(prepared: Prepared, built: Built, seed: int, probe: _Probe) -> _Cost:
    config, clients = prepared.config, prepared.workplace.clients
    method, training = built.methods[seed], training_of(prepared.config, seed, built.training)
    federation, schedule, regime = prepared.under(method), prepared.cohorts[seed].schedule, method.regime
    row = federation.layout.size * 4
    work = count_run(
        clients,
        schedule,
        method=method,
        training=training,
        every=config.evaluation.every,
        writes=bool(prepared.workplace.evaluation.metrics),
        max_examples=config.evaluation.max_examples,
        ends=2 if config.evaluation.keep == "best" else 1,
    )
    speeds = probe.measure(federation, training)
    if regime.trainees == "pool":
        speeds = replace(speeds, trained=probe.measure(federation, training, pooled=True).trained)
    clock = Clock(1)
    down = method.travels(federation.layout, clock)
    up = down & method.trained(federation.layout, clock)
    numbers_down, numbers_up = (
        float(count_columns(federation.layout, columns, federation.ranks).double().mean()) for columns in (down, up)
    )
    sampled = torch.from_numpy(schedule[0])
    rows_down = len(sampled) if method.facts.rows_down is None else int(method.facts.rows_down(sampled).sum())
    ever = len({int(k) for ids in schedule for k in ids})
    trainees = {"nobody": 0, "pool": 1, "sampled": ever}[regime.trainees]
    at_server = ever if method.has_row_of_each else method.count_rows(len(clients))  # rows that differ from the start
    moments = sum(name != "steps" for name in training.optimizer.keys) if training.keep_optimizer else 0
    first = method.message(federation.first_state(seed, method), sampled[:1], clock)
    keeps_its_row = not bool(down.all()) or "rows" in first.absent
    kept = trainees * (moments + keeps_its_row)
    best = 0  # rows of the best rounds, with the clients or, of a shared adapter, with the server
    if config.evaluation.keep == "best" and trainees:
        best = ever if method.has_row_of_each else len(clients) if view_of(method) == "personal" else at_server
    if not bool(down.any()):
        at_server = 0
    changed = at_server if trainees else 0
    tuned = len(clients) if regime.tune is not None else 0
    rows = {"memory": 0 if method.has_row_of_each else at_server * row, "disk": 0}
    of_clients = (at_server if method.has_row_of_each else 0) + kept + tuned + best
    rows["disk" if len(clients) * row > table.RAM_BYTES else "memory"] += of_clients * row
    whole = count_exported(federation.layout) * 4
    links = len(clients) * whole > handover.LINK_BYTES  # then equal adapters share a file
    distinct = ever + (ever < len(clients)) if method.has_row_of_each else tuned or method.count_rows(len(clients))
    return _Cost(
        work=work,
        seconds=speeds.seconds(work),
        travels=round(4 * (rows_down * numbers_down + len(sampled) * numbers_up)),
        rows=rows,
        checkpoints=COPIES * (changed + kept + best) * row,
        adapters=(distinct if links else len(clients)) * whole,
    )


def _free_disk(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
