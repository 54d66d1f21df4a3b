"""The only round loop: exchange, put in place, measure, make durable.

Everything that differs between methods is in the Method; everything a method must not know is in this package.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.config.sections import Config
from fedmira.disk.folders import RoundRecord, RunFolder
from fedmira.engine.exchange import Exchange, exchange, tune
from fedmira.engine.federation import Federation, Observer, first_state, make_training
from fedmira.engine.ledger import Ledger, commit, restore
from fedmira.engine.phase import Training
from fedmira.engine.scoring import (
    Scores,
    examples_of,
    final_scores,
    known,
    losses_of,
    note,
    results_of,
    validate,
    view_of,
)
from fedmira.graphs.graph import Graph
from fedmira.methods.base import Change, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ended:
    """What a run has come to: the adapters of any clients, and the graph that was learned on the way, if one was."""

    serve: Callable[[Tensor], Adapters]
    graph: Graph | None


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
    if method.learning_rate is not None:
        training = replace(training, learning_rate=method.learning_rate)
    validation = torch.tensor([math.nan if value is None else value for value in start.validation], dtype=torch.float64)
    ledger = Ledger(first_state(federation, method, seed, folder.path), validation, folder.path)
    restore(folder, ledger)
    folder.cut_back(ledger.round, validated=_is_due(config, ledger.round))
    view = view_of(method)
    names = [client.id for client in federation.clients]
    if ledger.round == 0:
        folder.append(None, results_of(names, 0, view, start))
    else:
        log.info("resumed after round %d", ledger.round)

    def serve(ids: Tensor) -> Adapters:
        served = method.serve(ledger.state, ledger.memory, ids)
        # Of a row that several share each has what its rank has room for, as in training; a pool trains at the largest.
        return served if method.trains == "pool" else federation.at_own_ranks(served, ids)

    if ledger.round == 0 and method.personal and federation.layout.virtual_tokens:
        validate(
            federation, method, ledger, serve, torch.arange(len(federation)), due=False
        )  # drawn virtual tokens change the base before anybody has trained
    for number in range(ledger.round + 1, config.federation.rounds + 1):
        record = _one_round(federation, method, ledger, folder, schedule[number - 1], training=training, serve=serve)
        observer("round", {"record": record, "rounds": config.federation.rounds})
    last: Callable[[Tensor], Adapters] = serve
    if method.tune is not None:
        last, view = tune(federation, method, ledger, folder, training, observer).take, "personal"
    ever = sorted({int(k) for ids in schedule[: config.federation.rounds] for k in ids})
    final = final_scores(federation, method, last, ever, start, observer)
    folder.append(None, [row for row in results_of(names, ledger.round, view, final) if row.split == "test"])
    if config.report.examples:
        folder.write_examples(examples_of(federation, start, final))
    return Ended(last, None if method.learned is None else method.learned(ledger.state))


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
    done = exchange(federation, method, ledger, sampled, training)
    ledger.remember(done.keepers, done.kept, len(federation))
    ledger.apply(done.change)
    ledger.round += 1
    due = _is_due(federation.config, ledger.round)
    before, after = _judge(federation, method, ledger, serve, done, due)
    notes = dict(done.change.notes)
    if method.accept is not None:
        after, notes["refused_replies"] = _refuse(ledger, done, before, after, method.accept)
    everyone = known(ledger.validation)
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
    folder.append(record, results_of(names, record.round, view_of(method), Scores(everyone, {})) if due else [])
    commit(folder, ledger, done.change, done.keepers)
    return record


def _judge(
    federation: Federation,
    method: Method,
    ledger: Ledger,
    serve: Callable[[Tensor], Adapters],
    done: Exchange,
    due: bool,
) -> tuple[list[float | None], list[float | None]]:
    """Return the sampled clients' validation losses with what they returned and with what they have now.

    Brings ledger.validation up to date.
    """
    ids = done.ids.tolist()
    if method.trains == "nobody":
        losses = known(ledger.validation[done.ids])
        return losses, losses
    if method.trains == "pool":  # what it returned is what everyone has now
        after = validate(federation, method, ledger, serve, done.ids, due)
        return after if len(done.answered) else [None] * len(ids), after
    before = losses_of(federation, done.uploads, done.ids, done.answered)
    same = torch.equal(done.change.ids, done.ids) and torch.equal(done.change.rows, done.uploads.rows)
    if method.personal and same:  # the merge moved nothing, so nothing needs to be scored twice
        note(ledger, ids, before)
        return before, before
    return before, validate(federation, method, ledger, serve, done.ids, due)


def _refuse(
    ledger: Ledger, done: Exchange, before: list[float | None], after: list[float | None], tolerance: float
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
    note(ledger, ids, losses)
    return losses, len(worse)


def _is_due(config: Config, number: int) -> bool:
    """Is everybody validated after this round?"""
    return number % config.evaluation.every == 0 or number == config.federation.rounds
