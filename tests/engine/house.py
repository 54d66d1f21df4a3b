"""A tiny federation and one run of one method on it, with what its clients were sent, trained and returned."""

import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests import tiny
from tests.run_facts import run_facts
from torch import Tensor

from fedmira.adapters import Adapters, Layout
from fedmira.config.sections import Config
from fedmira.data.batches import ClientData
from fedmira.disk.folders import RunFolder
from fedmira.engine.clients import Scores
from fedmira.engine.events import Event, Observer, RoundDone, silent
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, restore
from fedmira.engine.phase import PhaseResult
from fedmira.engine.run import Course, Ended, run_rounds
from fedmira.engine.scoring import score_start
from fedmira.engine.simulated import Simulated
from fedmira.engine.tools import Training
from fedmira.engine.trainees import Pool, make_clients
from fedmira.engine.workplace import Workplace
from fedmira.methods.base import Change, Clock, Cohort, Message, Method, State
from fedmira.model.base.load import Base
from fedmira.study.assemble import evaluation_of
from fedmira.study.training import course_of, training_of

RANKS = (2, 1, 2, 1)
TRAIN = (5, 2, 3, 4)  # in batches of two: 3, 1, 2 and 2 steps
SCHEDULE = ((0, 1), (1, 2), (0, 1))  # client 3 never; 2 once; 0 pauses; 1 always
SEED = 3

Sampled = Sequence[Sequence[int]]


@functools.cache
def base() -> Base:
    return tiny.base("gpt2", targets=["c_attn"], dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class House:
    """A federation on a tiny GPT-2, and how it trains."""

    config: Config
    workplace: Workplace
    federation: Federation

    def __len__(self) -> int:
        return len(self.federation)

    @property
    def clients(self) -> tuple[ClientData, ...]:
        return self.workplace.clients

    @property
    def layout(self) -> Layout:
        return self.federation.layout

    @property
    def ranks(self) -> Tensor:
        return self.federation.ranks

    @property
    def training(self) -> Training:
        return training_of(self.config, SEED)

    @property
    def common_start(self) -> Tensor:
        """The row [K, P] that each client begins with."""
        rows, kinds = self.federation.start_rows(SEED)
        return rows[kinds]

    def cohort(self, schedule: Sampled = SCHEDULE, columns: Sequence[Mapping[str, str]] | None = None) -> Cohort:
        return Cohort(
            tuple(client.id for client in self.clients),
            tuple(len(client.train) for client in self.clients),
            tuple(columns or [{}] * len(self)),
            tuple(np.array(ids) for ids in schedule),
            SEED,
        )

    def course(self, rounds: int | None = None) -> Course:
        course = course_of(self.config, self.config.training, SEED)
        return course if rounds is None else replace(course, rounds=rounds)

    def start(self) -> Scores:
        return score_start(self.workplace, self.federation, lambda done: None)


def house(
    *,
    clients: Sequence[ClientData] | None = None,
    ranks: Sequence[int] = RANKS,
    cohort: int = 8,
    count: int = len(SCHEDULE),
    metrics: Sequence[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    early_stopping: Mapping[str, Any] | None = None,
    **training: Any,
) -> House:
    """cohort: clients in one pass; count: rounds; evaluation, training: settings of these sections."""
    settings = {
        "seeds": [SEED],
        "output_dir": "unused",
        "model": {"base_model": "tiny", "dtype": "float32", "device": "cpu"},
        "lora": {"r": 2, "lora_alpha": 3},
        "data": {"path": "unused"},
        "federation": {"rounds": count, "early_stopping": early_stopping},
        "training": {"local_epochs": 1, "batch_size": 2, "learning_rate": 0.02, **training},
        "evaluation": {**(evaluation or {}), **({} if metrics is None else {"metrics": list(metrics)})},
        "methods": [{"name": "local"}],
    }
    config = Config.model_validate(settings)
    own = clients or [tiny.client(f"c{k}", train=size) for k, size in enumerate(TRAIN)]
    names = tuple(client.id for client in own)
    some = torch.tensor(ranks[: len(own)])
    federation = Federation(names, tiny.layout(base(), 2), some, 3, run="tiny/seed-3", base=base().fingerprint)
    return House(config, Workplace(base(), tuple(own), cohort, evaluation_of(config)), federation)


@dataclass(frozen=True, eq=False)
class Ran:
    """A run. By round: rows that the sampled clients began with, what came of their training, rows that were merged.

    stored: all rows that the round left behind, as its checkpoint gives them back: the server's, or where nothing
    travels the clients' own.
    """

    house: House
    folder: RunFolder
    clients: Simulated | Pool
    ended: Ended
    sent: list[Tensor] = field(default_factory=list)
    phases: list[PhaseResult] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        return self.serve(torch.arange(len(self.house))).rows

    def serve(self, ids: Tensor) -> Adapters:
        """The adapters that the clients `ids` use in the end."""
        return self.clients.adapters(ids, self.ended.send)

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.folder.records()

    @property
    def results(self) -> list[dict[str, str]]:
        with (self.folder.path / "results.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def run(
    of: House,
    method: Method,
    path: Path,
    *,
    schedule: Sampled = SCHEDULE,
    rounds: int | None = None,
    start: Scores | None = None,
    observer: Observer = silent,
    label: str = "",
) -> Ran:
    """Run a method from what is at `path`, or from the start. start: scores of the untouched base, if known."""
    federation = of.federation.under(method, of.workplace.base.width)
    folder = RunFolder(path)
    if not path.exists():
        folder.create(of.config, run_facts(label=label or method.name, seed=SEED), {})
    clients = make_clients(of.workplace, federation, method, of.training, scratch=folder.path)
    found = Ran(of, folder, clients, None)  # type: ignore[arg-type]
    merge = method.merge

    def watched_merge(state: State, ids: Tensor, uploads: Message, weights: Tensor, clock: Clock) -> Change:
        found.merged.append(uploads.rows.clone())
        return merge(state, ids, uploads, weights, clock)

    method = replace(method, merge=watched_merge)
    trainer = clients.trainer if isinstance(clients, Pool) else clients
    work = trainer.work

    def watched_work(ids: Tensor, start: Any, given: Message, *arguments: Any, **options: Any) -> PhaseResult:
        found.sent.append(given.rows.clone())
        found.phases.append(work(ids, start, given, *arguments, **options))
        return found.phases[-1]

    trainer.work = watched_work  # type: ignore[method-assign]

    def observe(event: Event) -> None:
        if isinstance(event, RoundDone):
            found.stored.append(stored_rows(of, method, folder))
        observer(event)

    ended = run_rounds(
        federation,
        method,
        clients,
        tuple(np.array(ids) for ids in schedule),
        folder,
        course=of.course(rounds),
        start=of.start() if start is None else start,
        observer=observe,
    )
    return replace(found, ended=ended)


def stored_rows(of: House, method: Method, folder: RunFolder) -> Tensor:
    """What is durable now: the server's rows, or the clients' own where nothing travels."""
    federation = of.federation.under(method, of.workplace.base.width)
    ledger = Ledger(federation, federation.first_state(SEED, method), torch.zeros(len(of), dtype=torch.float64))
    clients = make_clients(of.workplace, federation, method, of.training)
    restore(folder.checkpoints, ledger, clients)
    if not method.sends_nothing:
        return ledger.table[torch.arange(len(ledger.table))]
    memory = (clients.trainer if isinstance(clients, Pool) else clients).memory
    assert isinstance(clients, Simulated | Pool)
    if "row" not in memory.tables:
        return of.common_start[: memory.clients]
    return memory.tables["row"][torch.arange(memory.clients)]


def with_client(method: Method, **parts: Any) -> Method:
    """Return the method with some functions of its client's half replaced."""
    return replace(method, client=replace(method.client, **parts))


def spoil(round_number: int | None = None, *, everybody: bool = False) -> Callable[[Method], Method]:
    """In one round the first of the stack, which has the most steps, ends with what is no number; or everybody does.

    Both what it returns and its own row, so that nobody can use either.
    """

    def change(method: Method) -> Method:
        def finish(adapters: Any, memory: Any, given: Message, tools: Any) -> Any:
            message, memory = method.client.finish(adapters, memory, given, tools)
            rows = message.rows.clone()
            if round_number is None or tools.clock.round == round_number:
                rows[slice(None) if everybody else slice(1)] = float("nan")
                adapters.rows[slice(None) if everybody else slice(1)] = float("nan")
            return replace(message, rows=rows), memory

        return with_client(method, finish=finish)

    return change


def without_seconds(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if not key.startswith("seconds")} for one in records]
