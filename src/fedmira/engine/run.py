"""The only loop over rounds: play, make durable, apply, measure.

Everything that differs between methods is in the Method; everything a method must not know is in this package.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmira.disk.folders import RoundRecord, RunFolder
from fedmira.engine.clients import Asked, Clients, Scores
from fedmira.engine.events import AnswersWritten, ClientsTuned, Observer, RoundDone
from fedmira.engine.federation import Federation
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.round import Round, Sender, mask_change, play
from fedmira.engine.scoring import final_scores, known, note, results_of, validate, view_of
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Clock, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How long a run is and when it is measured. every: rounds between validations of all clients."""

    rounds: int
    every: int
    seed: int
    learning_rate: float

    def is_due(self, number: int) -> bool:
        """Is everybody validated after this round?"""
        return number % self.every == 0 or number == self.rounds


@dataclass(frozen=True, eq=False)
class Ended:
    """What a run has come to. send: what any clients would be sent now; graph: what was learned on the way, if one was.

    test: of every client with the adapter that it uses now.
    """

    send: Sender
    graph: Graph | None
    test: Scores


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed while it is carried out."""

    federation: Federation
    method: Method
    clients: Clients
    course: Course
    folder: RunFolder
    ledger: Ledger
    observer: Observer

    @property
    def sender(self) -> Sender:
        """What the server would send now."""
        return Sender(self.method, self.ledger, self.clock)

    @property
    def clock(self) -> Clock:
        """Of the next round."""
        rate = self.method.regime.learning_rate
        return Clock(self.ledger.round + 1, learning_rate=self.course.learning_rate if rate is None else rate)

    def progress(self, clients: int) -> Callable[[int], None]:
        return lambda done: self.observer(AnswersWritten(done, clients))


def run_rounds(
    federation: Federation,
    method: Method,
    clients: Clients,
    schedule: Sequence[np.ndarray],
    folder: RunFolder,
    *,
    course: Course,
    start: Scores,
    observer: Observer,
) -> Ended:
    """Carry one method with one seed from the newest checkpoint to the last round.

    A round counts once its checkpoint is written; then it is applied and measured, and its line goes to metrics.jsonl.
    A crash loses at most the round under way. The newest durable round is measured again after a resume.
    """
    validation = torch.tensor([math.nan if value is None else value for value in start.validation], dtype=torch.float64)
    ledger = Ledger(federation, federation.first_state(course.seed, method, folder.path), validation)
    run = Run(federation, method, clients, course, folder, ledger, observer)
    facts = restore(folder.checkpoints, ledger, clients)
    folder.cut_back(ledger.round - 1)
    if ledger.round == 0:
        folder.append(None, results_of(federation.names, 0, view_of(method), start))
    drawn = method.has_row_of_each and federation.layout.virtual_tokens > 0
    if ledger.round == 0 and drawn:  # drawn virtual tokens change the base before anybody has trained
        validate(clients, method, ledger, run.sender, torch.arange(len(federation)), due=False)
    if ledger.round:
        log.info("resumed after round %d", ledger.round)
        _measure(run, facts, torch.from_numpy(schedule[ledger.round - 1]))
    for number in range(ledger.round + 1, course.rounds + 1):
        record = _one_round(run, schedule[number - 1])
        observer(RoundDone(record, course.rounds))
    view = view_of(method)
    if method.regime.tune is not None:
        _tune(run)
        view = "personal"
    send = run.sender
    ever = sorted({int(k) for ids in schedule[: course.rounds] for k in ids})
    count = len(ever) if method.has_row_of_each and not drawn else len(federation)
    final = final_scores(clients, method, ledger, send, ever, start, run.progress(count))
    last = [row for row in results_of(federation.names, ledger.round, view, final) if row.split == "test"]
    folder.append(None, last)
    learned = method.facts.learned
    return Ended(send, None if learned is None else learned(ledger.state), final)


def _one_round(run: Run, sampled: np.ndarray) -> RoundRecord:
    """One round, from sampling to its line of metrics.jsonl."""
    began = time.monotonic()
    ledger, clients = run.ledger, run.clients
    ids = torch.from_numpy(sampled)
    asked = clients.ask(ids)
    played = play(run.method, ledger, clients, asked.ids, run.clock)
    after: list[float | None] | None = None
    if run.method.regime.tolerance is not None:
        played, after = _let_refuse(run, played, run.method.regime.tolerance)
    facts = {**_facts(run, played, asked, ids), "loss_after": after}
    for name, reason in facts["refused"].items():
        log.warning("round %d: the upload of client '%s' was refused: %s", ledger.round + 1, name, reason)
    kept = clients.keep(played.answered)
    ledger.received(played.reply.ids)
    commit(run.folder.checkpoints, ledger, played.change, kept, facts)
    if kept is not None:
        kept.apply()
    ledger.apply(played.change)
    ledger.round += 1
    return _measure(run, facts, ids, began=began)


def _let_refuse(run: Run, played: Round, tolerance: float) -> tuple[Round, list[float | None]]:
    """Let clients whose loss a reply would worsen by more than `tolerance` keep what they uploaded.

    Returns the round so changed, and the losses of the clients asked. A client without a validation split, or whose
    upload was refused, has no say.
    """
    ledger, change = run.ledger, played.change
    proposed = Sender(run.method, ledger, replace(run.clock, round=run.clock.round + 1), ledger.after(change))
    after = run.clients.losses(played.ids, proposed)
    before = dict(zip(played.reply.ids.tolist(), played.reply.validation, strict=True))
    uploaded = {k: n for n, k in enumerate(played.answered.tolist())}
    rows = change.rows.clone()
    losses, refused = list(after), 0
    for n, k in enumerate(played.ids.tolist()):
        old, new = before.get(k), after[n]
        if k in uploaded and old is not None and new is not None and new > old + tolerance:
            rows[change.ids == k] = played.uploads.rows[uploaded[k]]
            losses[n] = old
            refused += 1
    changed = replace(change, rows=rows, notes={**change.notes, "refused_replies": refused})
    return replace(played, change=mask_change(run.method, ledger, changed)), losses


def _facts(run: Run, played: Round, asked: Asked, sampled: Tensor) -> dict[str, Any]:
    """What the record of a round says of training and merge, as JSON: all that is known before the round is applied.

    Figures of a sampled client are those of the client that was asked for it.
    """
    names, reply = run.federation.names, played.reply
    places = {k: n for n, k in enumerate(reply.ids.tolist())}
    admitted = set(played.answered.tolist())
    asked_for = [int(asked.ids[n]) if n >= 0 else None for n in asked.of.tolist()]
    whose = [None if k is None else places.get(k) for k in asked_for]
    clients = [names[k] for k in sampled.tolist()]
    unmoved = run.method.has_row_of_each and len(admitted) == len(played.ids) and _left_as_uploaded(played)
    return {
        "clients": clients,
        "answered": [name for name, k in zip(clients, asked_for, strict=True) if k in admitted],
        "train_loss": [math.nan if n is None else float(reply.losses[n]) for n in whose],
        "steps": [0 if n is None else int(reply.steps[n]) for n in whose],
        "loss_before": [
            reply.validation[n] if n is not None and k in admitted else None
            for n, k in zip(whose, asked_for, strict=True)
        ],
        "bytes_up": played.bytes_up,
        "bytes_down": played.bytes_down,
        "seconds_training": played.seconds_training,
        "seconds_merge": played.seconds_merge,
        "tokens": reply.tokens,
        "notes": dict(played.change.notes),
        "refused": {
            name: played.refused[k]
            for name, k in zip(clients, asked_for, strict=True)
            if k is not None and k in played.refused
        },
        "unmoved": unmoved,
    }


def _left_as_uploaded(played: Round) -> bool:
    """Did the merge leave every client with what it returned?"""
    change = played.change
    if not len(change.ids):
        return True  # nothing travels
    return torch.equal(change.ids, played.answered) and torch.equal(change.rows, played.uploads.rows)


def _measure(run: Run, facts: Mapping[str, Any], sampled: Tensor, *, began: float | None = None) -> RoundRecord:
    """Score the newest round, which is durable, and write its line of metrics.jsonl.

    began: when the round did; None where an earlier process carried it out.
    """
    again = time.monotonic()
    ledger, asked = run.ledger, run.clients.ask(sampled)
    due = run.course.is_due(ledger.round)
    facts = dict(facts)
    unmoved, after = facts.pop("unmoved"), facts.pop("loss_after")
    if not len(asked.ids):  # nobody trains: the losses known are still true
        after = facts["loss_before"] = known(ledger.validation[sampled])
    elif unmoved and after is None:  # nothing needs to be scored twice
        after = facts["loss_before"]
    if after is None:
        after = validate(run.clients, run.method, ledger, run.sender, sampled, due=due)
    else:
        note(ledger, sampled, after)
    if asked.pooled:
        facts["loss_before"] = after if facts["answered"] else [None] * len(sampled)
    everyone = known(ledger.validation)
    measured = [value for value in everyone if value is not None]
    earlier = 0.0 if began is not None else facts["seconds_training"] + facts["seconds_merge"]
    record = RoundRecord(
        round=ledger.round,
        loss_after=after,
        validation_loss=math.fsum(measured) / len(measured) if due and measured else None,
        seconds=earlier + time.monotonic() - (again if began is None else began),
        **facts,
    )
    results = results_of(run.federation.names, record.round, view_of(run.method), Scores(everyone, {})) if due else []
    run.folder.append(record, results)
    return record


def _tune(run: Run) -> None:
    """Let every client fine-tune what it would be sent now.

    Nothing of it enters the ledger: after a kill it is done again, to the same bits, and more rounds later go on from
    what the server has.
    """
    began, clients = time.monotonic(), len(run.federation)
    tuned = run.clients.tune(run.sender, lambda done: run.observer(ClientsTuned(done, clients)))
    for k, reason in tuned.refused.items():
        name = run.federation.names[k]
        log.warning("what client '%s' fine-tuned was refused (%s): it keeps what it was sent", name, reason)
    seconds = time.monotonic() - began
    run.folder.update(replace(run.folder.facts, seconds_tuning=seconds, tokens_tuning=tuned.tokens))
