"""The only round loop: sample, send, train, admit, merge, measure, make durable.

Everything that differs between methods is in the Method; everything a method must not know is here.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, Layout, start_adapters
from fedmira.config import Config
from fedmira.data.batches import ClientData, Truncation, local_batches
from fedmira.data.partition import client_key
from fedmira.engine.gate import admit, check_change
from fedmira.engine.journal import Ledger, commit, restore
from fedmira.engine.phase import PhaseResult, Training, local_phase, plan_steps, train_together
from fedmira.evaluation.measure import PASS_TOKENS, measure_answers, measure_loss
from fedmira.graph import Graph
from fedmira.methods.base import Change, Clock, Memory, Message, Method, State
from fedmira.model.load import Base
from fedmira.optim import Optimizer, adamw, sgd
from fedmira.runs import Result, RoundRecord, RunFolder, View
from fedmira.store import Rows

log = logging.getLogger(__name__)

EXAMPLES_KEPT = 3  # of each client, with report.examples
START_BYTES = 64 << 20  # of rows in one pass that scores the untouched base
POOL = "*"  # names all clients' data together; no client is called so
HOLDER = torch.zeros(1, dtype=torch.int64)  # client 0, in whose place the pool's optimizer moments are kept

Observer = Callable[[str, Mapping[str, object]], None]  # (event, facts): round | tuning | scoring


@dataclass(frozen=True, eq=False)
class Federation:
    """What all runs of a study share. ranks [K] or, by module, [K, modules]; cohort: clients trained in one pass."""

    config: Config
    base: Base
    clients: tuple[ClientData, ...]
    layout: Layout
    ranks: Tensor
    cohort: int

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def largest_ranks(self) -> Tensor:
        """Those of a row that several clients share: [1] or [1, modules]."""
        return self.ranks.amax(dim=0, keepdim=True)

    @functools.cached_property
    def pool(self) -> ClientData:
        """All clients' training data as one client's, for methods that train on the pool; nothing to score it on."""
        everything = tuple(one for client in self.clients for one in client.train)
        return ClientData(POOL, POOL, None, {}, everything, (), (), Truncation())


@dataclass(frozen=True)
class Scores:
    """Every client at one moment. validation [K] in nats; test: metric -> [K]. None = the client has no such split."""

    validation: Sequence[float | None]
    test: Mapping[str, Sequence[float | None]]
    texts: Mapping[tuple[int, int], str] = field(default_factory=dict)  # (client, place in its test split) -> answer


@dataclass(frozen=True, eq=False)
class Ended:
    """What a run has come to: the adapters of any clients, and the graph that was learned on the way, if one was."""

    serve: Callable[[Tensor], Adapters]
    graph: Graph | None


def make_optimizer(config: Config) -> Optimizer:
    """Build the clients' optimizer from the config's training section."""
    training = config.training
    if training.optimizer == "sgd":
        return sgd(momentum=training.momentum, weight_decay=training.weight_decay)
    return adamw(betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)


def common_start(federation: Federation, seed: int, clients: int, scratch: Path | None = None) -> Adapters:
    """Draw the start that every client shares; one row, or for personal methods one for each of `clients`.

    Several rows are store.Rows: read by client, they take room once they differ from the start. scratch: a folder for
    them if they are too large for RAM.
    """
    ranks = federation.ranks if clients == len(federation) else federation.largest_ranks
    stream = torch.Generator().manual_seed(seed)
    distinct, kinds = torch.unique(ranks, dim=0, return_inverse=True)
    start = start_adapters(federation.layout, distinct, federation.config.lora.lora_alpha, stream)
    if clients == 1:
        return start
    rows = cast(Tensor, Rows(start.rows, kinds, scratch))  # reads and writes by client as one
    return Adapters(federation.layout, rows, ranks, start.scale[kinds])


def first_state(federation: Federation, method: Method, seed: int, scratch: Path | None = None) -> State:
    """Return what the server holds before round 1. scratch: as in common_start."""
    return method.init(common_start(federation, seed, len(federation) if method.personal else 1, scratch), Clock(0))


def score_start(federation: Federation, observer: Observer) -> Scores:
    """Score the untouched base on every client: B = 0 at the common start, so no method or seed changes it."""
    start = common_start(federation, 0, 1)
    everyone = range(len(federation))

    def serve(ids: Tensor) -> Adapters:
        return start.take(torch.zeros_like(ids))

    # everyone has the same row, so that a pass is limited by its tokens alone
    longest = max((len(one.ids) for client in federation.clients for one in client.validation), default=1)
    cohort = max(federation.cohort, min(PASS_TOKENS // longest, START_BYTES // (4 * federation.layout.size)))
    validation = measure_loss(federation.base, serve, federation.clients, everyone, split="validation", cohort=cohort)
    return replace(_test(federation, serve, everyone, observer), validation=validation)


def run_rounds(
    federation: Federation,
    method: Method,
    schedule: Sequence[np.ndarray],
    folder: RunFolder,
    *,
    seed: int,
    start: Scores,
    observer: Observer,
) -> Ended:
    """Carry one method with one seed from the newest checkpoint to the last round.

    Each round ends with its line of metrics.jsonl and then its checkpoint, which makes it count; a crash loses at most
    the round under way.
    """
    config = federation.config
    training = make_training(config, seed)
    validation = torch.tensor([math.nan if value is None else value for value in start.validation], dtype=torch.float64)
    ledger = Ledger(first_state(federation, method, seed, folder.path), validation, folder.path)
    restore(folder, ledger)
    folder.cut_back(ledger.round, validated=_is_due(config, ledger.round))
    view = _view(method)
    names = [client.id for client in federation.clients]
    if ledger.round == 0:
        folder.append(None, _results(names, 0, view, start))
    else:
        log.info("resumed after round %d", ledger.round)

    def serve(ids: Tensor) -> Adapters:
        return method.serve(ledger.state, ledger.memory, ids)

    for number in range(ledger.round + 1, config.federation.rounds + 1):
        record = _one_round(federation, method, ledger, folder, schedule[number - 1], training=training, serve=serve)
        observer("round", {"record": record, "rounds": config.federation.rounds})
    last: Callable[[Tensor], Adapters] = serve
    if method.tune is not None:
        last, view = _tune(federation, method, ledger, folder, training, observer).take, "personal"
    ever = sorted({int(k) for ids in schedule[: config.federation.rounds] for k in ids})
    final = _final_scores(federation, method, last, ever, start, observer)
    folder.append(None, [row for row in _results(names, ledger.round, view, final) if row.split == "test"])
    if config.report.examples:
        folder.write_examples(_examples(federation, start, final))
    return Ended(last, None if method.learned is None else method.learned(ledger.state))


@dataclass(frozen=True, eq=False)
class _Exchange:
    """What clients and server did in one round, before anything is put in place.

    ids [S] sampled; answered [n] of these were admitted, with `uploads` [n, P]; refused: position -> reason. kept: the
    memory of the clients `keepers`. Where the pool trains in their stead, it returns one upload, which answers for all.
    """

    ids: Tensor
    answered: Tensor
    refused: Mapping[int, str]
    uploads: Adapters
    change: Change
    losses: Tensor
    steps: Tensor
    tokens: int
    kept: Memory
    keepers: Tensor
    bytes_up: int = 0
    bytes_down: int = 0
    seconds_training: float = 0.0
    seconds_merge: float = 0.0


def _exchange(
    federation: Federation, method: Method, ledger: Ledger, sampled: np.ndarray, training: Training
) -> _Exchange:
    """Send, train, admit and merge; the ledger is read only."""
    began = time.monotonic()
    ids = torch.from_numpy(sampled)
    if method.trains == "nobody":
        return _stand_still(federation, ids)
    clock = Clock(ledger.round + 1, learning_rate=training.learning_rate)
    given, blank, phase = _phase(federation, method, ledger, ids, training, clock)
    trained = time.monotonic()
    pooled = method.trains == "pool"
    who = HOLDER if pooled else ids
    part = [federation.pool] if pooled else [federation.clients[k] for k in sampled]
    weights = torch.tensor([float(len(client.train)) for client in part], dtype=torch.float64)
    places, refused = admit(who, phase.returned, weights, federation.layout)
    scalars = {name: value[places] for name, value in phase.returned.scalars.items()}
    uploads = Message(phase.returned.rows[places], scalars)
    change = Change(who[places], uploads.rows)  # nobody answered: nothing changes
    if len(places):
        change = method.merge(ledger.state, who[places], uploads, weights[places], clock)
        check_change(change, method.name)
    if method.personal:
        change = _masked(change, federation)
    drop = () if training.keep_optimizer else training.optimizer.keys
    answered = who[places]
    if pooled:
        answered = ids if len(places) else ids[:0]
        refused = {k: reason for reason in refused.values() for k in ids.tolist()}
    return _Exchange(
        ids=ids,
        answered=answered,
        refused=refused,
        uploads=blank.take(places).with_rows(uploads.rows),
        change=change,
        losses=phase.losses.expand(len(ids)),  # the pool's for each of them
        steps=phase.steps.expand(len(ids)),
        tokens=phase.tokens,
        kept={name: value[places] for name, value in phase.memory.items() if name not in drop},
        keepers=who[places],
        bytes_up=phase.returned.bytes_each * len(ids) if method.exchanges else 0,
        bytes_down=given.bytes_each * len(ids) if method.exchanges else 0,
        seconds_training=trained - began,
        seconds_merge=time.monotonic() - trained,
    )


def _phase(
    federation: Federation, method: Method, ledger: Ledger, ids: Tensor, training: Training, clock: Clock
) -> tuple[Message, Adapters, PhaseResult]:
    """Let the clients of `ids`, or the pool in their stead, train from what they are sent; the ledger is read only.

    Returns what was sent, adapters that hold it at the clients' ranks, and what came back.
    """
    pooled = method.trains == "pool"
    who = HOLDER if pooled else ids
    given = method.send(ledger.state, who, clock)
    ranks = federation.largest_ranks if pooled else federation.ranks[ids]
    blank = Adapters(federation.layout, given.rows, ranks, federation.config.lora.lora_alpha / ranks.float())
    private = [name for name in ledger.memory if training.keep_optimizer or name not in training.optimizer.keys]
    memory = ledger.recall(who, private, first=method.private(blank))
    if pooled:
        plan = plan_pool(federation, ids, training, round_number=clock.round, steps=method.pool_steps)
        phase = train_together(
            federation.base,
            method,
            [federation.pool],
            [plan],
            blank,
            given,
            memory,
            training=training,
            clock=clock,
        )
        return given, blank, phase
    phase = local_phase(
        federation.base,
        method,
        [federation.clients[k] for k in ids.tolist()],
        blank,
        given,
        memory,
        training=training,
        clock=clock,
        cohort=federation.cohort,
    )
    return given, blank, phase


def plan_pool(
    federation: Federation, ids: Tensor, training: Training, *, round_number: int, steps: int | None = None
) -> list[np.ndarray]:
    """Return the pool's examples of each step in a round: as many steps, of as many examples, as those of `ids` take.

    Permutations of all examples, one after another from the pool's own stream, cut into batches of these sizes. steps:
    so many full batches instead.
    """
    count = len(federation.pool.train)
    sizes = [min(training.batch_size, count)] * (steps or 0)
    if steps is None:
        sizes = [
            len(batch) for k in ids.tolist() for batch in plan_steps(federation.clients[k], training, round_number)
        ]
    whole = local_batches(
        count,
        seed=training.seed,
        round=round_number,
        key=client_key(POOL),
        batch_size=count,
        steps=None,
        epochs=-(-sum(sizes) // count),
    )
    return np.split(np.concatenate(whole)[: sum(sizes)], np.cumsum(sizes)[:-1])


def _stand_still(federation: Federation, ids: Tensor) -> _Exchange:
    """A round in which nobody does anything."""
    nobody = ids[:0]
    blank = Adapters(federation.layout, torch.empty(0, federation.layout.size), nobody, torch.empty(0))
    return _Exchange(
        ids=ids,
        answered=nobody,
        refused={},
        uploads=blank,
        change=Change(nobody, blank.rows),
        losses=torch.full((len(ids),), math.nan),
        steps=torch.zeros_like(ids),
        tokens=0,
        kept={},
        keepers=nobody,
    )


def _tune(
    federation: Federation, method: Method, ledger: Ledger, folder: RunFolder, training: Training, observer: Observer
) -> Adapters:
    """Let every client train by itself from what it would be sent now, as `method.tune` says; return their adapters.

    Nothing of it enters the ledger: after a kill it is done again, to the same bits, and more rounds later go on from
    what the server holds. A client whose row is refused keeps what it was sent.
    """
    assert method.tune is not None
    began, tokens = time.monotonic(), 0
    kind, length = method.tune
    steps, epochs = (length, None) if kind == "steps" else (None, length)
    training = replace(training, local_steps=steps, local_epochs=epochs)
    clock = Clock(ledger.round + 1, learning_rate=training.learning_rate)
    own = common_start(federation, training.seed, len(federation), folder.path)
    alike = sorted(range(len(federation)), key=lambda k: len(federation.clients[k].train))  # in a pass, equal steps
    for first in range(0, len(alike), federation.cohort):
        ids = torch.tensor(alike[first : first + federation.cohort])
        given, blank, phase = _phase(federation, method, ledger, ids, training, clock)
        places, refused = admit(ids, phase.returned, torch.ones(len(ids)), federation.layout)
        rows = blank.with_rows(given.rows.clone()).mask_().rows
        rows[places] = phase.returned.rows[places]
        own.rows[ids] = rows
        tokens += phase.tokens
        for k, reason in refused.items():
            name = federation.clients[k].id
            log.warning("what client '%s' fine-tuned was refused (%s): it keeps what it was sent", name, reason)
        observer("tuning", {"done": first + len(ids), "clients": len(alike)})
    folder.update(seconds_tuning=time.monotonic() - began, tokens_tuning=tokens)
    return own


def _one_round(
    federation: Federation,
    method: Method,
    ledger: Ledger,
    folder: RunFolder,
    sampled: np.ndarray,
    *,
    training: Training,
    serve: Callable[[Tensor], Adapters],
) -> RoundRecord:
    """One round, from sampling to a durable checkpoint."""
    began = time.monotonic()
    done = _exchange(federation, method, ledger, sampled, training)
    ledger.remember(done.keepers, done.kept, len(federation))
    ledger.apply(done.change)
    ledger.round += 1
    due = _is_due(federation.config, ledger.round)
    before, after = _judge(federation, method, ledger, serve, done, due)
    notes = dict(done.change.notes)
    if method.accept is not None:
        after, notes["refused_replies"] = _refuse(ledger, done, before, after, method.accept)
    everyone = _known(ledger.validation)
    measured = [value for value in everyone if value is not None]
    names = [client.id for client in federation.clients]
    record = RoundRecord(
        round=ledger.round,
        clients=[names[k] for k in done.ids.tolist()],
        answered=[names[k] for k in done.answered.tolist()],
        train_loss=done.losses.tolist(),
        steps=done.steps.tolist(),
        loss_before=before,
        loss_after=after,
        validation_loss=sum(measured) / len(measured) if due and measured else None,
        bytes_up=done.bytes_up,
        bytes_down=done.bytes_down,
        seconds_training=done.seconds_training,
        seconds_merge=done.seconds_merge,
        seconds=time.monotonic() - began,
        tokens=done.tokens,
        notes=notes,
        refused={names[k]: reason for k, reason in done.refused.items()},
    )
    for name, reason in record.refused.items():
        log.warning("round %d: the upload of client '%s' was refused: %s", record.round, name, reason)
    folder.append(record, _results(names, record.round, _view(method), Scores(everyone, {})) if due else [])
    commit(folder, ledger, done.change, done.keepers)
    return record


def _judge(
    federation: Federation,
    method: Method,
    ledger: Ledger,
    serve: Callable[[Tensor], Adapters],
    done: _Exchange,
    due: bool,
) -> tuple[list[float | None], list[float | None]]:
    """Return the sampled clients' validation losses with what they returned and with what they have now.

    Brings ledger.validation up to date.
    """
    ids = done.ids.tolist()
    if method.trains == "nobody":
        known = _known(ledger.validation[done.ids])
        return known, known
    if method.trains == "pool":  # what it returned is what everyone has now
        after = _validate(federation, method, ledger, serve, done.ids, due)
        return after if len(done.answered) else [None] * len(ids), after
    before = _losses_of(federation, done.uploads, done.ids, done.answered)
    same = torch.equal(done.change.ids, done.ids) and torch.equal(done.change.rows, done.uploads.rows)
    if method.personal and same:  # the merge moved nothing, so nothing needs to be scored twice
        _note(ledger, ids, before)
        return before, before
    return before, _validate(federation, method, ledger, serve, done.ids, due)


def _refuse(
    ledger: Ledger, done: _Exchange, before: list[float | None], after: list[float | None], tolerance: float
) -> tuple[list[float | None], int]:
    """Let clients whose loss a reply worsens by more than `tolerance` keep what they uploaded; return losses and count.

    before, after: validation losses of the sampled clients with their uploads and with the replies. A client without a
    validation split, or whose upload was refused, has no say.
    """
    ids = done.ids.tolist()
    worse = [
        k
        for k, old, new in zip(ids, before, after, strict=True)
        if old is not None and new is not None and new > old + tolerance
    ]
    if not worse:
        return after, 0
    where = {int(k): place for place, k in enumerate(done.answered)}
    kept = done.uploads.rows[torch.tensor([where[k] for k in worse])]
    ledger.apply(Change(torch.tensor(worse), kept))
    losses = [old if k in worse else new for k, old, new in zip(ids, before, after, strict=True)]
    _note(ledger, ids, losses)
    return losses, len(worse)


def _is_due(config: Config, number: int) -> bool:
    """Is everybody validated after this round?"""
    return number % config.evaluation.every == 0 or number == config.federation.rounds


def make_training(config: Config, seed: int) -> Training:
    section = config.training
    return Training(
        optimizer=make_optimizer(config),
        learning_rate=section.learning_rate,
        batch_size=section.batch_size,
        local_steps=section.local_steps,
        local_epochs=section.local_epochs,
        max_grad_norm=section.max_grad_norm,
        keep_optimizer=section.keep_optimizer,
        dropout=config.lora.lora_dropout,
        seed=seed,
    )


def _masked(change: Change, federation: Federation) -> Change:
    """Zero what a merge put beyond a client's own rank."""
    ranks = federation.ranks[change.ids]
    rows = Adapters(federation.layout, change.rows, ranks, ranks.float()).mask_().rows
    return replace(change, rows=rows)


def _losses_of(federation: Federation, uploads: Adapters, ids: Tensor, answered: Tensor) -> list[float | None]:
    """Validation loss of the sampled clients, each with the row it returned; None for a refused upload."""
    where = {int(k): position for position, k in enumerate(answered)}
    values = measure_loss(
        federation.base,
        lambda some: uploads.take(torch.tensor([where[int(k)] for k in some])),
        federation.clients,
        answered.tolist(),
        split="validation",
        cohort=federation.cohort,
    )
    return [values[where[int(k)]] if int(k) in where else None for k in ids]


def _validate(
    federation: Federation,
    method: Method,
    ledger: Ledger,
    serve: Callable[[Tensor], Adapters],
    ids: Tensor,
    due: bool,
) -> list[float | None]:
    """Bring ledger.validation up to date; return the sampled clients' losses after the merge.

    Personal methods change the sampled clients only, so the others' losses stand. A shared model changes everybody's,
    and everybody is scored when a validation is due.
    """
    sampled = ids.tolist()
    some = functools.partial(
        measure_loss, federation.base, serve, federation.clients, split="validation", cohort=federation.cohort
    )
    after = some(sampled)  # by themselves, so that their losses are to the bit the same whether all are due or not
    _note(ledger, sampled, after)
    if due and not method.personal:
        others = sorted(set(range(len(federation))) - set(sampled))
        _note(ledger, others, some(others))
    return after


def _known(losses: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in losses.tolist()]


def _note(ledger: Ledger, ids: Sequence[int], values: Sequence[float | None]) -> None:
    for k, value in zip(ids, values, strict=True):
        ledger.validation[k] = math.nan if value is None else value


def _final_scores(
    federation: Federation,
    method: Method,
    serve: Callable[[Tensor], Adapters],
    ever: Sequence[int],
    start: Scores,
    observer: Observer,
) -> Scores:
    """Test every client with the adapter it would use now; never-sampled ones of a personal method are at the start."""
    if method.trains == "nobody":
        return replace(start, validation=[None] * len(federation))
    if not method.personal or method.tune is not None:
        return _test(federation, serve, range(len(federation)), observer)
    scores = _test(federation, serve, ever, observer)
    whole = {metric: list(values) for metric, values in start.test.items()}
    for metric, values in scores.test.items():
        for k, value in zip(ever, values, strict=True):
            whole[metric][k] = value
    return Scores([None] * len(federation), whole, {**start.texts, **scores.texts})


def _test(
    federation: Federation, serve: Callable[[Tensor], Adapters], ids: Sequence[int], observer: Observer
) -> Scores:
    """Every metric of the config on the test split, in the order of `ids`; no validation."""
    config = federation.config.evaluation
    loss = measure_loss(federation.base, serve, federation.clients, ids, split="test", cohort=federation.cohort)
    scores = {"loss": loss}
    texts: dict[tuple[int, int], str] = {}
    keeps = federation.config.report.examples

    def written(k: int, place: int, text: str) -> None:
        if keeps and place < EXAMPLES_KEPT:
            texts[k, place] = text

    metrics = [metric for metric in config.metrics if metric != "loss"]
    if metrics or keeps:
        answers = measure_answers(
            federation.base,
            serve,
            federation.clients,
            ids,
            split="test",
            cohort=federation.cohort,
            metrics=metrics,
            max_new_tokens=config.max_new_tokens,
            max_examples=config.max_examples if metrics else EXAMPLES_KEPT,
            progress=lambda done: observer("scoring", {"done": done, "clients": len(ids)}),
            written=written,
        )
        scores |= {metric: [one[metric] for one in answers] for metric in metrics}
    return Scores([None] * len(ids), scores, texts)


def _examples(federation: Federation, start: Scores, final: Scores) -> list[dict[str, object]]:
    """Test examples with what the untouched base and the run's adapter write; only where the user asked for them."""
    decode = federation.base.tokenizer.decode
    return [
        {
            "client": federation.clients[k].id,
            "prompt": decode(federation.clients[k].test[place].question, skip_special_tokens=True),
            "references": list(federation.clients[k].test[place].answers),
            "base": start.texts.get((k, place), ""),
            "answer": text,
        }
        for (k, place), text in sorted(final.texts.items())
    ]


def _view(method: Method) -> View:
    """Whose adapter the numbers are about: each client's own, or the one that all share."""
    return "personal" if method.personal else "global"


def _results(names: Sequence[str], number: int, view: View, scores: Scores) -> list[Result]:
    rows = [
        Result(name, number, view, "validation", "loss", value)
        for name, value in zip(names, scores.validation, strict=True)
    ]
    for metric, values in scores.test.items():
        rows += [Result(name, number, view, "test", metric, value) for name, value in zip(names, values, strict=True)]
    return rows
