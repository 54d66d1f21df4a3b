"""Noise on what clients send: drawn from a secret key, counted, and compared with what it hides.

u = w_sent + min(1, C / |d|) d + N(0, sigma^2) on every number that is sent, with d what a client has learned. Each
client adds the noise to its own upload. Whatever its data are, its update has length C at most, so two possible ones
differ by at most 2 C: an upload is a Gaussian answer with noise multiplier sigma / (2 C), and all that the server makes
of uploads is post-processing.
"""

import functools
import hashlib
import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedmira.disk.files import append_lines
from fedmira.privacy.accountant import gaussian_epsilon
from fedmira.privacy.budget import read_lines
from fedmira.privacy.noise import KEY_BYTES, gaussian

FILE = "uploads.jsonl"
ADJACENCY = (
    "all training, validation and test examples of one client replaced by others; known to all are who takes part in "
    "which round, each client's number of examples, rank and group"
)
SAMPLING = "none: who takes part is known"
LONGER = 1 + 1e-4  # an update in float32 may be longer than its limit, by its last digits


@dataclass(frozen=True, eq=False)
class Hidden:
    """What noise hides of some clients' updates. total [P]: their sum, in float64; variance: of all noise on it.

    marks: client -> a name of what it sends, which tells nothing of it; none where the noise is not secret.
    """

    total: Tensor
    variance: float
    marks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, updates: Tensor, deviations: Tensor, marks: Mapping[str, str] | None = None) -> "Hidden":
        """Measure the updates [S, P] of some clients, and the noise on them by its standard deviations [S, P]."""
        total, variance = updates.double().sum(dim=0).cpu(), float(deviations.double().square().sum())
        return cls(total, variance, marks or {})


def signal_to_noise(hidden: Sequence[Hidden]) -> float | None:
    """|mean of the updates| / root of the expected square of |mean of their noise|; None: there is no noise."""
    variance = sum(one.variance for one in hidden)
    if not variance:
        return None
    total = functools.reduce(torch.add, (one.total for one in hidden))
    return float(total.norm()) / math.sqrt(variance)


@dataclass(frozen=True, eq=False)
class UploadNoise:
    """Draws the noise of clients' uploads. key: without it nobody can draw it again."""

    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))

    def draw(self, updates: Tensor, *, clients: Sequence[str], round_number: int) -> tuple[Tensor, dict[str, str]]:
        """Return numbers of the standard normal distribution [S, P] for the updates [S, P] of clients, and their marks.

        The same update in the same round has the same noise and mark, so that a round that is carried out again after a
        stop is the same release. Another update has others: the same noise on both would give their difference away.
        """
        rows, marks = [], {}
        for client, update in zip(clients, updates.detach().cpu(), strict=True):
            digest = hashlib.blake2b(key=self.key, digest_size=16)
            digest.update(f"{round_number}/{client}/".encode())
            digest.update(update.contiguous().view(torch.uint8).numpy().data)
            marks[client] = digest.hexdigest()
            purpose = f"upload/{round_number}/{marks[client]}/{client}"
            rows.append(torch.from_numpy(gaussian(len(update), key=self.key, purpose=purpose)))
        return torch.stack(rows).to(updates), marks


@dataclass(eq=False)
class Uploads:
    """The account of a run: what each client has sent.

    uploads.jsonl has a line for every round, on disk before the uploads leave. An upload that is made again, with the
    same key from the same update, is the same release; with another key (the run had ended, and rounds were added) or
    from another update (the server sent something else) it is a new one.
    """

    folder: Path
    noise_multiplier: float  # in units of the longest difference of two updates
    delta: float

    @functools.cached_property
    def booked(self) -> set[tuple[str, str]]:
        """(client, mark) of every upload, from disk."""
        return {(client, mark) for line in read_lines(self.folder / FILE) for client, mark in line["clients"].items()}

    def book(self, marks: Mapping[str, str], round_number: int) -> None:
        """Write down what these clients send in a round. marks: client -> the mark of its upload."""
        new = {*marks.items()} - self.booked
        if new:
            append_lines(self.folder / FILE, [json.dumps({"round": round_number, "clients": dict(sorted(new))})])
            self.booked.update(new)

    @property
    def most(self) -> int:
        """Uploads of the client that has sent most."""
        return max(Counter(client for client, _ in self.booked).values(), default=0)

    def epsilon(self) -> float:
        """Return the largest epsilon of all clients so far."""
        return gaussian_epsilon(self.noise_multiplier, self.most, self.delta)
