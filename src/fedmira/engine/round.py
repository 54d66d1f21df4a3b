"""One round: send, train, admit, merge. It is carried out here and nowhere else, wherever the clients are.

Nothing is applied here. This is the server's half: it knows rows, names and numbers, no base model and no data.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmira.adapters.added import BaseVersions
from fedmira.adapters.columns import count_columns, lay_over, pack
from fedmira.engine.clients import Reply, Trainers
from fedmira.engine.gate import Expected, Upload, admit, check_change
from fedmira.engine.ledger import Ledger
from fedmira.methods.base import Change, Clock, Message, Method, State


@dataclass(frozen=True, eq=False)
class Round:
    """What a round came to, before anything is applied.

    ids [n] were asked; answered [m] of these were admitted, with the whole rows `uploads` [m, P]; refused: client ->
    reason, one of the wire's words, or why it was silent. Seconds: of training, waiting included, and of the rest.
    """

    ids: Tensor
    answered: Tensor
    refused: Mapping[int, str]
    uploads: Message
    change: Change
    reply: Reply
    bytes_up: int
    bytes_down: int
    seconds_training: float
    seconds_merge: float


def play(method: Method, ledger: Ledger, clients: Trainers, ids: Tensor, clock: Clock) -> Round:
    """Carry out one round of the clients `ids` [n]; the ledger is only read."""
    began = time.monotonic()
    federation = ledger.federation
    layout = federation.layout
    up = method.travels(layout, clock) & method.trained(layout, clock)
    send = _Counted(Sender(method, ledger, clock))
    reply = clients.train(ids, send)
    trained = time.monotonic()
    names = {federation.names[k]: k for k in ids.tolist()}
    expected = Expected(federation, method.name, clock.round, names, int(up.sum()))
    uploads = [Upload(header, reply.message.take(slice(n, n + 1))) for n, header in enumerate(reply.headers)]
    places, refused = admit(uploads, expected)
    answered = reply.ids[places]
    returned = reply.message if len(places) == len(reply.ids) else reply.message.take(places)
    whole = returned
    if not bool(up.all()):
        sent = message_of(method, ledger, ledger.state, answered, clock).rows
        whole = returned.map(lambda rows: lay_over(sent, up, rows))
    weights = torch.tensor([uploads[n].header.weight for n in places.tolist()], dtype=torch.float64)
    change = merge_admitted(method, ledger, answered, whole, weights, clock)
    return Round(
        ids=ids,
        answered=answered,
        refused={**reply.silent, **refused},
        uploads=whole,
        change=change,
        reply=reply,
        bytes_up=sum(_payloads(reply.message, count_columns(layout, up, federation.ranks[reply.ids]))),
        bytes_down=sum(send.bytes_of.values()),
        seconds_training=trained - began,
        seconds_merge=time.monotonic() - trained,
    )


def merge_admitted(
    method: Method, ledger: Ledger, ids: Tensor, returned: Message, weights: Tensor, clock: Clock
) -> Change:
    """Return what the merge decides: nothing where nobody answered; finite; within each client's rank.

    Raises WireError if it is not finite.
    """
    if not len(ids):
        return Change(ids, returned.rows)
    change = method.merge(ledger.state, ids, returned, weights, clock)
    check_change(change, method.name, ledger.federation.layout)
    return mask_change(method, ledger, change)


def mask_change(method: Method, ledger: Ledger, change: Change) -> Change:
    """Zero, in the change's own rows, what a merge put beyond a rank, and into the gaps that align parts."""
    if method.has_row_of_each:
        return replace(change, rows=ledger.federation.adapters(change.ids, change.rows).mask_().rows)
    stored = ledger.state.adapters
    return replace(change, rows=stored.take(change.ids, rows=change.rows).mask_().rows)


@dataclass(frozen=True, eq=False)
class Sender:
    """What the server would send any clients at `clock`, as it travels. state: instead of the ledger's newest."""

    method: Method
    ledger: Ledger
    clock: Clock
    state: State | None = None

    def __call__(self, ids: Tensor) -> Message:
        travels = self.method.travels(self.ledger.federation.layout, self.clock)
        state = self.ledger.state if self.state is None else self.state
        return message_of(self.method, self.ledger, state, ids, self.clock).map(lambda rows: pack(rows, travels))


@dataclass(frozen=True, eq=False)
class _Counted:
    """What the server sends in a round. bytes_of: client -> bytes of its message, however often that was made."""

    send: Sender
    bytes_of: dict[int, int] = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        return self.send.clock

    def __call__(self, ids: Tensor) -> Message:
        message, federation = self.send(ids), self.send.ledger.federation
        travels = self.send.method.travels(federation.layout, self.clock)
        counts = count_columns(federation.layout, travels, federation.ranks[ids])
        self.bytes_of.update(zip(ids.tolist(), _payloads(message, counts), strict=True))
        return message


def message_of(method: Method, ledger: Ledger, state: State, ids: Tensor, clock: Clock) -> Message:
    """Return what a method sends the clients `ids`, whole rows, with the changes of the base up to a state."""
    message = method.message(state, ids, clock)
    return message if not state.base else replace(message, base=BaseVersions(state.base, ledger.known[ids]))


def _payloads(message: Message, counts: Tensor) -> list[int]:
    """Bytes of each client's message: its numbers of the columns that travel, for every row, and 8 for each scalar.

    Beside them the changes of the base that it does not have yet. What is absent is not counted. counts [S]: as
    count_columns gives them.
    """
    rows, scalars = (_present(message, names, len(counts)) for names in (("rows", *message.more), message.scalars))
    missing = torch.tensor([0] * len(counts) if message.base is None else message.base.bytes_missing)
    each: list[int] = (rows * counts * message.rows.element_size() + 8 * scalars + missing).tolist()
    return each


def _present(message: Message, names: Iterable[str], count: int) -> Tensor:
    """Return how many of these rows or scalars each client's message has [S]."""
    present = torch.zeros(count, dtype=torch.int64)
    for name in names:
        present += ~message.absent[name] if name in message.absent else 1
    return present
