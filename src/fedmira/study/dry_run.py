"""Look before you run: what a study would cost, and what its examples look like to the model. Nothing is written."""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fedmira.adapters import Layout
from fedmira.config.sections import Config
from fedmira.data.batches import Encoded
from fedmira.disk import table
from fedmira.disk.folders import StudyFolder
from fedmira.engine.cost import Plan, Speeds, Work, count_run, count_start, plan_cohort
from fedmira.engine.federation import Observer, first_state, make_optimizer
from fedmira.engine.probe import measure_speeds
from fedmira.export.peft_folder import count_exported
from fedmira.methods import build
from fedmira.study import handover
from fedmira.study.assemble import Prepared, prepare, take_in, using_threads
from fedmira.study.trackers import check_trackers

COPIES = 4  # full checkpoints and the deltas since, at most, in the size of one that is full


@dataclass(frozen=True)
class Shown:
    """One training example as the model gets it: pieces of text, and whether loss is taken on each."""

    client: str
    tokens: int
    labels: int
    pieces: tuple[tuple[str, bool], ...]


def silent(event: str, facts: object) -> None:
    """Observe nothing."""


def show_examples(config: Config, *, observer: Observer = silent) -> Iterator[Shown]:
    """Yield the first training example of every client, as tokenised and cut. Raises as `run` does, without a base."""
    tokenizer, intake = take_in(config, observer)
    for client in intake.clients:
        example = client.train[0]
        pieces = tuple((tokenizer.decode(example.ids[a:b]), trained) for a, b, trained in _spans(example))
        yield Shown(client.id, len(example.ids), example.labels, pieces)


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

    Raises what `run` would raise before it starts.
    """
    check_trackers(config.report_to)
    folder = StudyFolder(Path(config.output_dir))
    folder.check_free(overwrite=overwrite)
    prepared = prepare(config, observer)
    observer("start", {"what": "measuring a few passes"})
    with using_threads(prepared.threads):
        return _plan(prepared)


def _plan(prepared: Prepared) -> Plan:
    federation = prepared.federation
    config, clients, base = federation.config, federation.clients, federation.base
    seed = config.seeds[0]
    cohort = prepared.cohorts[seed]
    sampled = len(cohort.schedule[0])
    plain = build("local", {}, cohort)
    first = torch.from_numpy(cohort.schedule[0])

    kinds = {one.layout: one for one in map(federation.under, prepared.methods.values())}  # few have rows of their own
    passes = [
        plan_cohort(base, layout, clients, batch_size=config.training.batch_size, sampled=sampled) for layout in kinds
    ]

    @functools.cache
    def measure(layout: Layout, *, pooled: bool = False) -> Speeds:
        """A pool's passes are one client's."""
        own = {federation.layout: federation, **kinds}[layout]
        return measure_speeds(own, plain, first[:1] if pooled else first, seed=seed)

    speeds = measure(federation.layout)  # the untouched base is scored with these
    writes = any(metric != "loss" for metric in config.evaluation.metrics)
    start_work = count_start(clients, writes=writes, max_examples=config.evaluation.max_examples)
    ever = len({int(k) for ids in cohort.schedule for k in ids})
    works: dict[str, Work] = {}
    seconds: dict[str, float] = {}
    travels: dict[str, int] = {}
    adapters, checkpoints = 0, 0
    rows = {"memory": 0, "disk": 0}  # of the run that needs most; runs follow each other
    moments = sum(name != "steps" for name in make_optimizer(config).keys) if config.training.keep_optimizer else 0
    for entry in prepared.entries:
        method = prepared.methods[entry.folder, seed]
        under = federation.under(method)
        each = under.layout.size * 4
        works[entry.folder] = count_run(
            clients,
            cohort.schedule,
            method=method,
            batch_size=config.training.batch_size,
            steps=config.training.local_steps,
            epochs=config.training.local_epochs,
            every=config.evaluation.every,
            writes=writes,
            max_examples=config.evaluation.max_examples,
        )
        own_speeds = measure(under.layout)
        if method.trains == "pool":
            own_speeds = replace(own_speeds, trained=measure(under.layout, pooled=True).trained)
        seconds[entry.folder] = own_speeds.seconds(works[entry.folder])
        own_rows = float(under.layout.sizes(under.ranks).double().mean())  # of a round's clients, on average
        travels[entry.folder] = round(2 * sampled * 4 * own_rows) if method.exchanges else 0
        shared = 0 if method.personal else len(first_state(under, method, seed).adapters)
        own = ever if method.personal else 0  # rows that differ from the start
        tuned = len(clients) if method.tune is not None else 0
        kept = moments * {"nobody": 0, "pool": 1, "sampled": ever}[method.trains]
        needed = {"memory": shared * each, "disk": 0}
        needed["disk" if len(clients) * each > table.RAM_BYTES else "memory"] += (own + kept + tuned) * each
        rows = {place: max(rows[place], needed[place]) for place in rows}
        changed = 0 if method.trains == "nobody" else shared + own
        checkpoints += COPIES * (changed + kept) * each * len(config.seeds)
        whole = count_exported(under.layout) * 4
        links = len(clients) * whole > handover.LINK_BYTES  # then equal adapters share a file
        distinct = own + (own < len(clients)) if method.personal else tuned or shared
        adapters += (distinct if links else len(clients)) * whole * len(config.seeds)
    runs = len(prepared.entries) * len(config.seeds)
    return Plan(
        clients=len(clients),
        sampled=sampled,
        rounds=config.federation.rounds,
        cohort=federation.cohort,
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
        parameters=max(layout.parameters for layout in kinds),
        memory={
            "base": sum(value.numel() * value.element_size() for value in base.model.parameters()),
            "rows": rows["memory"],
            "cohort": federation.cohort * max(one.bytes_each for one in passes),
            "free": min(one.bytes_free for one in passes),
        },
        disk={
            "adapters": adapters,
            "rows": rows["disk"],
            "checkpoints": checkpoints,
            "free": _free_disk(Path(config.output_dir)),
        },
        bytes_per_round=travels,
        speeds=speeds,
        start_seconds=speeds.seconds(start_work),
        work=works,
        run_seconds=seconds,
        runs=runs,
        total_seconds=speeds.seconds(start_work) + len(config.seeds) * sum(seconds.values()),
    )


def _free_disk(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
