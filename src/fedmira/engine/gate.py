"""What may reach a method: every upload is judged here by itself, in simulation and at a server alike.

A refused upload counts as silence: that client keeps its row, the others go on. Reasons are the wire's words: schema,
identity, round, duplicate, size, not_finite, norm, weight (contracts page, "Wire").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmira.adapters import Layout, norms
from fedmira.adapters.added import check_pairs
from fedmira.engine.federation import Federation
from fedmira.errors import WireError
from fedmira.methods.base import Change, Message

SCHEMA = 1  # of the header
PIECE = 2**18  # numbers that are looked at together
MAX_NORM = 1e6  # of one client's row; far above any adapter that still computes in float32
MAX_SCALAR = 1e12  # of a declared scalar; its sums over clients stay finite in float32


@dataclass(frozen=True)
class Header:
    """What an upload says of itself."""

    run_id: str
    round: int
    client: str
    nonce: str
    base_hash: str
    layout_hash: str
    method: str
    weight: float  # training examples
    metrics: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True, eq=False)
class Upload:
    """One client's upload: its header, and a message with one row [1, Q]."""

    header: Header
    message: Message


@dataclass(eq=False)
class Expected:
    """What the server waits for in a round. clients: name -> position of those it asked; columns: Q.

    Grows while uploads come in: a client answers once, and a nonce is used once.
    """

    federation: Federation
    method: str
    round: int
    clients: Mapping[str, int]
    columns: int
    answered: set[str] = field(default_factory=set)
    nonces: set[str] = field(default_factory=set)


def refusal(upload: Upload, expected: Expected) -> str | None:
    """Return why an upload may not be merged, as one of the wire's words, or None."""
    header, message, federation = upload.header, upload.message, expected.federation
    names = (header.schema, header.method, header.run_id, header.base_hash, header.layout_hash)
    if names != (SCHEMA, expected.method, federation.run, federation.base, federation.layout_hash):
        return "schema"
    if header.client not in expected.clients:
        return "identity"
    if header.round != expected.round:
        return "round"
    if header.client in expected.answered or header.nonce in expected.nonces:
        return "duplicate"
    rows = [message.rows, *message.more.values()]
    if any(row.shape != (1, expected.columns) or not row.is_floating_point() for row in rows):
        return "size"
    if any(scalar.shape != (1,) for scalar in message.scalars.values()):
        return "size"
    lengths = torch.stack([_length(row) for row in rows])
    if not all(bool(torch.isfinite(value).all()) for value in (lengths, *message.scalars.values())):
        return "not_finite"
    if float(lengths.max()) > MAX_NORM:
        return "norm"
    if any(bool((scalar.double().abs() > MAX_SCALAR).any()) for scalar in message.scalars.values()):
        return "norm"
    if not 0 < header.weight < float("inf"):
        return "weight"
    return None


def admit(uploads: Sequence[Upload], expected: Expected) -> tuple[Tensor, dict[int, str]]:
    """Return the places [n] of the uploads that may be merged, and client position -> reason of the refused ones.

    An upload of somebody who was not asked has no position: it is only left out.
    """
    places: list[int] = []
    refused: dict[int, str] = {}
    for index, upload in enumerate(uploads):
        reason = refusal(upload, expected)
        if reason is None:
            places.append(index)
            expected.answered.add(upload.header.client)
            expected.nonces.add(upload.header.nonce)
        elif upload.header.client in expected.clients and upload.header.client not in expected.answered:
            refused[expected.clients[upload.header.client]] = reason
    return torch.tensor(places, dtype=torch.int64), refused


def _length(value: Tensor) -> Tensor:
    """Return the 2-norm [] of all numbers, piece by piece: a copy of all in float64 would take twice their memory.

    Each piece is copied to the same place: what is allocated anew for each, malloc does not always use again.
    """
    if value.numel() <= PIECE:
        return norms(value.reshape(1, -1))[0]
    pieces = torch.split(value.reshape(-1), PIECE)
    copied = torch.empty(PIECE, dtype=torch.float64)
    return norms(torch.cat([norms(copied[: len(piece)].copy_(piece)[None]) for piece in pieces])[None])[0]


def check_change(change: Change, method: str, layout: Layout) -> None:
    """Refuse a merge whose result is not finite, or does not fit the base, before it replaces anything."""
    values = [change.rows, *(change.shared or {}).values(), *change.tables.values()]
    for value in values:
        if value.is_floating_point() and not bool(torch.isfinite(_length(value))):
            raise WireError(
                "not_finite", f"the merge of '{method}' gave rows that are not finite; nothing was replaced"
            )
    if change.base is not None:
        check_pairs(change.base, layout)
