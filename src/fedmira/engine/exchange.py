"""What clients and server do in one round: send, train, admit, merge. Nothing is put in place here."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters, scales
from fedmira.data.batches import ClientData, local_batches
from fedmira.data.partition import client_key
from fedmira.disk.folders import RunFolder
from fedmira.engine.federation import HOLDER, POOL, Federation, Observer, common_start
from fedmira.engine.gate import admit, check_change
from fedmira.engine.ledger import Ledger
from fedmira.engine.phase import PhaseResult, Training, local_phase, plan_steps
from fedmira.methods.base import Change, Clock, Memory, Message, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Exchange:
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


def exchange(
    federation: Federation, method: Method, ledger: Ledger, sampled: np.ndarray, training: Training
) -> Exchange:
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
    trainees = _trainees(federation, method, ids)
    weights = torch.tensor([float(len(client.train)) for client in trainees], dtype=torch.float64)
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
    return Exchange(
        ids=ids,
        answered=answered,
        refused=refused,
        uploads=blank.take(places, rows=uploads.rows),
        change=change,
        losses=phase.losses.expand(len(ids)),  # the pool's for each of them
        steps=phase.steps.expand(len(ids)),
        tokens=phase.tokens,
        kept={name: value[places] for name, value in phase.memory.items() if name not in drop},
        keepers=who[places],
        bytes_up=_payload(phase.returned, blank) if method.exchanges else 0,
        bytes_down=_payload(given, blank) if method.exchanges else 0,
        seconds_training=trained - began,
        seconds_merge=time.monotonic() - trained,
    )


def _payload(message: Message, of: Adapters) -> int:
    """Bytes of all clients' messages. A client sends and gets no more of a whole row than its rank has room for."""
    whole = message.rows.shape[1] == of.layout.size
    absent = int((of.layout.size - of.layout.sizes(of.ranks)).sum()) if whole else 0
    return message.bytes_each * len(of) - message.rows.element_size() * absent


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
    blank = Adapters(federation.layout, given.rows, ranks, scales(ranks, federation.config.lora.lora_alpha))
    private = [name for name in ledger.memory if training.keep_optimizer or name not in training.optimizer.keys]
    memory = ledger.recall(who, private, first=method.private(blank))
    plans = None
    if pooled:
        plans = [plan_pool(federation, ids, training, round_number=clock.round, steps=method.pool_steps)]
    phase = local_phase(
        federation.base,
        method,
        _trainees(federation, method, ids),
        blank,
        given,
        memory,
        training=training,
        clock=clock,
        cohort=federation.cohort,
        plans=plans,
    )
    return given, blank, phase


def _trainees(federation: Federation, method: Method, ids: Tensor) -> list[ClientData]:
    """Whose data a round trains on: the clients of `ids`, or the pool in their stead."""
    return [federation.pool] if method.trains == "pool" else [federation.clients[k] for k in ids.tolist()]


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


def _stand_still(federation: Federation, ids: Tensor) -> Exchange:
    """A round in which nobody does anything."""
    nobody = ids[:0]
    blank = Adapters(federation.layout, torch.empty(0, federation.layout.size), nobody, torch.empty(0))
    return Exchange(
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


def tune(
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


def _masked(change: Change, federation: Federation) -> Change:
    """Zero what a merge put beyond a client's own rank."""
    ranks = federation.ranks[change.ids]
    rows = Adapters(federation.layout, change.rows, ranks, ranks.float()).mask_().rows
    return replace(change, rows=rows)
