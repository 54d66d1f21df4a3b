"""An adapter for a client that comes when the study is over; nothing of the run changes.

    start:   what the method gives a client that joins after the last round: its neighbours' mean, the shared row, its
             own choice among the stored means (MIRA with lambda: auto), or the common start
    adapted: its own local steps from there, by the method's client half
    alone:   as many steps from the common start, as `local` trains

It is a client more of the run's federation, behind all others, whose first round is the one after the last.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fedmira.adapters import Adapters
from fedmira.config.sections import Config, MethodEntry
from fedmira.data.batches import ClientData
from fedmira.disk.files import make_folder, write_json
from fedmira.disk.folders import RunFolder, StudyFolder, find_study
from fedmira.disk.run_facts import RunFacts
from fedmira.engine.clients import Scores
from fedmira.engine.events import Observer
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, restore
from fedmira.engine.newcomers import take_in as take_in_newcomers
from fedmira.engine.round import Sender
from fedmira.engine.run import Ended
from fedmira.engine.scoring import score_loss, score_start, score_test_split
from fedmira.engine.simulated import Simulated
from fedmira.engine.trainees import make_clients
from fedmira.errors import ConfigError, MethodError, StoreError
from fedmira.methods import recipe_of
from fedmira.methods.base import Clock, Method, begin_from_what_was_sent
from fedmira.study.assemble import Built, Materials, Prepared, client_table, prepare
from fedmira.study.events import StepBegun
from fedmira.study.handover import write_adapters
from fedmira.study.intake import take_in
from fedmira.study.threads import using_threads
from fedmira.study.training import training_of

FACTS = "adapt.json"  # beside the adapter


@dataclass(frozen=True)
class Scored:
    """One adapter of the new client. what: untouched base, start, adapted or alone; losses in nats; None = no example.

    test: metric -> value.
    """

    what: str
    validation: float | None
    test: dict[str, float | None]


@dataclass(frozen=True)
class Adapted:
    """What came of it. path: the PEFT folder; steps: local steps taken, from the start and alone."""

    path: Path
    client: str
    method: str
    examples: int
    steps: int
    scores: tuple[Scored, ...]


def adapt(
    run: Path,
    data: Path,
    *,
    client: str | None = None,
    steps: int | None = None,
    output: Path = Path("adapted"),
    overwrite: bool = False,
    observer: Observer,
) -> Adapted:
    """Give a client with the data of a file, in the study's format, an adapter from a finished run.

    client: its name; None: the file's. steps: local steps; None: as many as a client of the run took on average. The
    folder OUTPUT/CLIENT must not be there, or is replaced with overwrite. Raises StoreError, ConfigError, DataError,
    MethodError or ModelError before anything is trained.
    """
    folder, config = _find(run)
    if config.privacy is not None:
        raise MethodError("adapt: the run trained with privacy, and a newcomer would train without; not offered yet")
    facts = folder.facts
    name = data.name.partition(".")[0] if client is None else client
    tokenizer, intake = take_in(config, observer)
    newcomer = _read(config, data, name, observer)
    if intake.names.find(name, [one.id for one in intake.clients]) or newcomer.id in intake.names.by_id:
        raise ConfigError([f"--client '{name}': the run has a client of that name; give the new one another"], "adapt")
    target = output / newcomer.id
    if target.exists() and not overwrite:
        raise StoreError(f"'{target}' is there already; choose another --output, or give --overwrite")
    config = _with_rank(config, len(intake.clients))
    materials = Materials(tokenizer, replace(intake, clients=[*intake.clients, newcomer]))
    prepared = prepare(config, observer, facts, materials=materials)
    _check_data(folder, prepared)
    built = prepared.built[facts.label]
    method = built.methods[facts.seed]
    if method.regime.trainees != "sampled":
        raise MethodError(f"'{facts.label}' has no clients that train: take a run of another method")
    count = _usual_steps(folder) if steps is None else steps
    place = len(prepared.federation) - 1
    with using_threads(prepared.threads), tempfile.TemporaryDirectory(prefix="fedmira-adapt-") as scratch:
        opened = _Newcomer(prepared, built, facts, folder, place, Path(scratch))
        observer(StepBegun("training the new client"))
        scores, ended, served = opened.train(count)
        if target.exists():
            shutil.rmtree(target)
        make_folder(output)
        opened.export(served, ended, output, observer)
    done = Adapted(target, name, facts.label, len(newcomer.train), count, tuple(scores))
    write_json(target / FACTS, {**asdict(done), "path": str(target), "run": str(folder.path)})
    return done


def _find(run: Path) -> tuple[RunFolder, Config]:
    """Return a complete run and its config. Raises StoreError."""
    study, folder = find_study(run)
    if folder is None:
        runs = study.runs()
        if len(runs) != 1:
            listed = ", ".join(str(one.path.relative_to(study.path)) for one in runs) or "none"
            raise StoreError(f"'{run}' is a study: give one of its runs: {listed}")
        (folder,) = runs
    if folder.facts.state != "complete":
        raise StoreError(
            f"'{folder.path}' is {folder.facts.state}: a new client starts from its end; finish it first, with "
            f"'fedmira resume {folder.path}'"
        )
    if not folder.checkpoints.is_dir():
        raise StoreError(f"'{folder.path}' has no checkpoints: a new client starts from the state of its last round")
    return folder, StudyFolder(folder.path).config()


def _read(config: Config, data: Path, name: str, observer: Observer) -> ClientData:
    """Read a file as the only client of its data."""
    if not name.strip():
        raise ConfigError(["--client: the name is empty"], "adapt")
    section = config.data.model_copy(update={"path": str(data), "subsample": 1.0})
    _, intake = take_in(config.model_copy(update={"data": section}), observer, whole=name)
    (newcomer,) = intake.clients
    return newcomer


def _with_rank(config: Config, clients: int) -> Config:
    """Give the client behind a list of ranks the usual one."""
    ranks = config.lora.ranks
    if not isinstance(ranks, list) or len(ranks) != clients:
        return config
    return config.model_copy(update={"lora": config.lora.model_copy(update={"ranks": [*ranks, config.lora.r]})})


def _check_data(folder: RunFolder, prepared: Prepared) -> None:
    """Raise StoreError if the run's clients do not have the data that it began with: graphs are made of them."""
    began = json.loads((folder.path / "clients.json").read_text(encoding="utf-8"))
    table = client_table(prepared.workplace, prepared.federation)
    changed = [name for name, one in began.items() if table.get(name, {}).get("sha256") != one["sha256"]]
    if changed:
        raise StoreError(
            f"data.path '{prepared.config.data.path}' is not the data this run began with: {len(changed)} clients "
            f"differ, such as '{folder.names.shown(changed[0])}'; put the old data back"
        )


def _usual_steps(folder: RunFolder) -> int:
    """Return how many local steps a client that was drawn took in all rounds, on average."""
    taken: dict[str, int] = {}
    for record in folder.records():
        for name, steps in zip(record["clients"], record["steps"], strict=True):
            taken[name] = taken.get(name, 0) + steps
    return max(1, round(sum(taken.values()) / max(1, len(taken))))


class _Newcomer:
    """The new client in the run's last state."""

    def __init__(
        self,
        prepared: Prepared,
        built: Built,
        facts: RunFacts,
        folder: RunFolder,
        place: int,
        scratch: Path,
    ) -> None:
        self.prepared, self.built, self.folder = prepared, built, folder
        self.method = built.methods[facts.seed]
        self.place, self.scratch, self.seed = place, scratch, facts.seed
        self.ids = torch.tensor([place])

    def train(self, steps: int) -> tuple[list[Scored], Ended, Adapters]:
        """Score the untouched base and the start, train from the start and alone, and score both."""
        prepared, place = self.prepared, self.place
        rounds = len(self.folder.records())
        since = torch.tensor([1] * place + [rounds + 1])
        federation = replace(prepared.under(self.method), since=since)
        clients, send = self._open(self.method, federation, from_run=True)
        begins = self.method.client.begin is not begin_from_what_was_sent  # its choice is part of its start
        first = clients.alone(self.ids, send, steps=0) if begins else clients.adapters(self.ids, send)
        start = self._score("start", clients, first)
        adapted = clients.alone(self.ids, send, steps=steps)
        after = self._score("adapted", clients, adapted)
        entry = MethodEntry.model_validate({"name": "local"})
        local = recipe_of(entry).build(prepared.cohorts[self.seed])
        others, sent = self._open(local, prepared.federation, from_run=False)
        alone = self._score("alone", others, others.alone(self.ids, sent, steps=steps))
        only = replace(prepared.workplace, clients=(prepared.workplace.clients[place],))
        base = score_start(only, replace(prepared.federation, names=prepared.federation.names[place:]), lambda _: None)
        self.base = base
        untouched = Scored("untouched base", base.validation[0], {name: one[0] for name, one in base.test.items()})
        test = Scores([], {name: [None] * place + [value] for name, value in after.test.items()})
        ended = Ended(send, None, test, [0] * (place + 1))
        return [untouched, start, after, alone], ended, adapted

    def _open(self, method: Method, federation: Federation, *, from_run: bool) -> tuple[Simulated, Sender]:
        prepared = self.prepared
        training = training_of(prepared.config, self.seed, self.built.training)
        clients = make_clients(prepared.workplace, federation, method, training, scratch=self.scratch)
        assert isinstance(clients, Simulated)
        state = federation.first_state(self.seed, method, self.scratch)
        ledger = Ledger(federation, state, torch.full((len(federation),), float("nan"), dtype=torch.float64))
        if from_run:
            after = partial(take_in_newcomers, ledger, method)
            restore(self.folder.checkpoints, ledger, clients, after=after, only_read=True)
        rate = training.learning_rate if method.regime.learning_rate is None else method.regime.learning_rate
        return clients, Sender(method, ledger, Clock(ledger.round + 1, learning_rate=rate))

    def _score(self, what: str, clients: Simulated, used: Adapters) -> Scored:
        """Score one adapter of the new client."""
        workplace, place, gate = self.prepared.workplace, self.place, clients.method.client.gate

        def serve(ids: torch.Tensor) -> Adapters:
            return used.take(torch.zeros_like(ids))

        (validation,) = score_loss(workplace, serve, [place], gate, split="validation")
        test = score_test_split(workplace, serve, [place], lambda _: None, gate=gate).test
        return Scored(what, validation, {name: values[0] for name, values in test.items()})

    def export(self, served: Adapters, ended: Ended, output: Path, observer: Observer) -> None:
        """Write the PEFT folder."""
        place, tuned = self.place, replace(self.method.regime, tune=("steps", 1))
        before: list[float | None] = [None] * place
        padded = {name: [*before, *values] for name, values in self.base.test.items()}
        write_adapters(
            self.folder,
            self.prepared,
            self.prepared.under(self.method),
            replace(self.method, regime=tuned),
            lambda ids: served,
            observer,
            start=Scores([], padded),
            ended=ended,
            into=output,
            only=[place],
        )
