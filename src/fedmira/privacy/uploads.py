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
from collections.abc import Sequence
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
    """What noise hides of some clients' updates. total [P]: their sum, in float64; variance: of all noise on it."""

    total: Tensor
    variance: float

    @classmethod
    def of(cls, updates: Tensor, deviations: Tensor) -> "Hidden":
        """Measure the updates [S, P] of some clients, and the noise on them by its standard deviations [S, P]."""
        return cls(updates.double().sum(dim=0).cpu(), float(deviations.double().square().sum()))


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

    def draw(self, updates: Tensor, *, clients: Sequence[str], round_number: int) -> Tensor:
        """Return numbers of the standard normal distribution [S, P] for the updates [S, P] of these clients.

        The same update in the same round has the same noise, so that a round that is carried out again after a stop is
        the same release. Another update has other noise: the same one on both would give their difference away.
        """
        rows = []
        for client, update in zip(clients, updates.detach().cpu(), strict=True):
            content = hashlib.sha256(update.contiguous().view(torch.uint8).numpy().data).hexdigest()
            purpose = f"upload/{round_number}/{content}/{client}"
            rows.append(torch.from_numpy(gaussian(len(update), key=self.key, purpose=purpose)))
        return torch.stack(rows).to(updates)


@dataclass(eq=False)
class Uploads:
    """The account of a run: in which rounds each client has sent an upload.

    uploads.jsonl has a line for every round, before it is carried out. One that is carried out again with the same key
    is the same release; with another key (the run had ended, and rounds were added) it is a new one.
    """

    folder: Path
    key: bytes
    noise_multiplier: float  # in units of the longest difference of two updates
    delta: float

    @functools.cached_property
    def booked(self) -> set[tuple[str, int, str]]:
        """(key, round, client) of every upload, from disk."""
        lines = read_lines(self.folder / FILE)
        return {(line["key"], line["round"], client) for line in lines for client in line["clients"]}

    @functools.cached_property
    def _name(self) -> str:
        """Names the key, and tells nothing of it."""
        return hashlib.sha256(b"name" + self.key).hexdigest()[:16]

    def book(self, clients: Sequence[str], round_number: int) -> None:
        """Write down that these clients send an upload in this round."""
        new = {(self._name, round_number, client) for client in clients} - self.booked
        if new:
            line = {"key": self._name, "round": round_number, "clients": [client for _, _, client in sorted(new)]}
            append_lines(self.folder / FILE, [json.dumps(line)])
            self.booked.update(new)

    @property
    def most(self) -> int:
        """Uploads of the client that has sent most."""
        return max(Counter(client for _, _, client in self.booked).values(), default=0)

    def epsilon(self) -> float:
        """Return the largest epsilon of all clients so far."""
        return gaussian_epsilon(self.noise_multiplier, self.most, self.delta)
