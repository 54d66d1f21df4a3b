"""Where clients are is a value: simulated in this process, somewhere else, or nobody at all.

The server's half of a round (round.py, gate.py, ledger.py) knows clients by this Protocol alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.disk.checkpoints import Tensors
from fedmira.engine.gate import Header
from fedmira.methods.base import Clock, Message


class Send(Protocol):
    """What the server would send any clients now, as it travels: ids [n] -> message. clock: of the round to come."""

    @property
    def clock(self) -> Clock: ...

    def __call__(self, ids: Tensor) -> Message: ...


@dataclass(frozen=True, eq=False)
class Asked:
    """Whom the server asks in a round. ids [n]: to these it sends; of [S]: who of them answers for each sampled client.

    -1 = nobody answers for that client. pooled: one answers for all, and what it returned is what everyone has.
    """

    ids: Tensor
    of: Tensor
    pooled: bool = False


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back of a round: of the clients `ids` [n], in that order.

    message: rows [n, Q] of the columns that travel, scalars, further rows. headers: what each upload says of itself.
    losses [n]: mean over a client's local steps; steps [n]; validation [n]: its loss with the adapter it would use if
    the server changed nothing, None = no such split or not shared. tokens: trained on; scored: of validation, in the
    method's own half. silent: client -> why it sends nothing. notes: numbers for the round's record, for whoever
    has the clients: they are computed from what is not sent.
    """

    ids: Tensor
    message: Message
    headers: tuple[Header, ...]
    losses: Tensor
    steps: Tensor
    validation: Sequence[float | None]
    tokens: int = 0
    scored: int = 0
    silent: Mapping[int, str] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Every client at one moment. validation [K] in nats; test: metric -> [K]. None = the client has no such split."""

    validation: Sequence[float | None]
    test: Mapping[str, Sequence[float | None]]
    texts: Mapping[tuple[int, int], str] = field(default_factory=dict)  # (client, place in its test split) -> answer


@dataclass(frozen=True)
class Tuned:
    """What came of fine-tuning. refused: client -> why it keeps what it was sent; figures: client -> Facts.figures."""

    tokens: int
    refused: Mapping[int, str]
    figures: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


class Kept(Protocol):
    """What clients remember of a round, once it counts; in a simulation a checkpoint holds it."""

    def files(self, *, full: bool) -> Mapping[str, Tensors]:
        """Return the checkpoint's files: of all clients (full), or of those of the round."""
        ...

    @property
    def bytes_of_all(self) -> int: ...

    @property
    def bytes_of_round(self) -> int: ...

    def apply(self) -> None:
        """Remember it from now on."""
        ...


class Trainers(Protocol):
    """All that a round needs of the clients."""

    def train(self, ids: Tensor, send: Send) -> Reply:
        """Let the clients `ids` [n] carry out their half of a round from what `send` says they are sent.

        It may be asked for some of them at a time, and again: the server's state is that before the round until the
        reply is there.
        """
        ...


class Restored(Protocol):
    """Those that a checkpoint may hold something of."""

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what a checkpoint holds of clients; called for each checkpoint of a chain in turn."""
        ...


class Clients(Trainers, Restored, Protocol):
    """The clients of a federation, by position 0 ... K - 1: all that a run needs of them."""

    def ask(self, sampled: Tensor) -> Asked:
        """Say whom the server asks where the clients `sampled` [S] are drawn."""
        ...

    def stops(self, sampled: Tensor) -> str | None:
        """Say why the clients `sampled` [S] cannot take part in one more round; None = they can."""
        ...

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        """Return each client's own validation loss with what the server would send now; None = no such split."""
        ...

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        """Return every metric on the test split of the clients `ids`, in that order; no validation.

        progress: called with the number of clients whose answers are written.
        """
        ...

    def tune(self, send: Send, progress: Callable[[int], None]) -> Tuned:
        """Let every client train alone, from what it would be sent now; from then on each uses its own adapter.

        progress: called with the number of clients that have.
        """
        ...

    def set_aside(self, ids: Tensor, send: Send) -> None:
        """Let the clients `ids` set aside the adapters that they would use now, instead of what they had set aside."""
        ...

    def take_up(self) -> None:
        """From now on let each client use the adapter that it has set aside; one that has none goes on as before."""
        ...

    def keep(self, ids: Tensor) -> Kept | None:
        """Count the last round of the clients `ids`, whose uploads were admitted; None = nothing is kept here."""
        ...


class AtHand(Clients, Protocol):
    """Clients whose adapters the user of this machine may have: those of a simulation, wherever it is computed."""

    def adapters(self, ids: Tensor, send: Send) -> Adapters:
        """Return the adapters that the clients `ids` use now, at their ranks."""
        ...


def nobody(sampled: Tensor) -> Asked:
    """Ask nobody."""
    return Asked(sampled[:0], torch.full_like(sampled, -1))


def everybody(sampled: Tensor) -> Asked:
    """Ask the sampled clients themselves."""
    return Asked(sampled, torch.arange(len(sampled)))
