"""What the clients of a run have paid for their releases: on disk before the release, and never beyond the budget.

privacy.jsonl of the run's folder has a line for every local phase that was paid for. A phase that is carried out again
after a stop, from the same rows and under the same conditions, draws the same sample and the same noise from noise.key:
it is the same release, and costs nothing more. In any other case it is a new one, with new noise, and is paid for.
"""

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmira.disk.files import NO_LINK, append_lines, write_atomic
from fedmira.errors import MethodError, StoreError
from fedmira.privacy.accountant import Release, Spent, max_epsilon
from fedmira.privacy.noise import KEY_BYTES, poisson_sample
from fedmira.privacy.steps import PrivateSteps

FILE = "privacy.jsonl"
KEY_FILE = "noise.key"  # removed once the run is complete: who has it can take the noise off


@dataclass(frozen=True)
class Terms:
    """What is promised. epsilon, delta: of each client over the whole run. gradients: of one step, at most."""

    epsilon: float
    delta: float
    noise_multiplier: float
    clip: float
    gradients: int = 1

    def release(self, share: "Share") -> Release:
        """Return what one step of a client is."""
        return Release(share.rate, self.gradients, self.noise_multiplier)


@dataclass(frozen=True)
class Share:
    """How one client trains: its examples, those of a step in the mean, and its steps in a round."""

    examples: int
    per_step: int
    steps: int

    @property
    def rate(self) -> float:
        """The probability with which a step's sample has an example."""
        return self.per_step / self.examples


def count_affordable(terms: Terms, shares: Mapping[str, Share], schedule: Sequence[Sequence[str]]) -> tuple[int, float]:
    """Return how many rounds of a schedule of clients the budget pays for, and epsilon after the first."""

    def after(rounds: int) -> float:
        times = Counter(client for clients in schedule[:rounds] for client in clients)
        spent = [{terms.release(shares[client]): count * shares[client].steps} for client, count in times.items()]
        return max_epsilon(spent, terms.delta)

    first = after(1)
    low, high = 0, len(schedule)  # the budget pays for `low` rounds, and not for more than `high`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if after(middle) <= terms.epsilon else (low, middle - 1)
    return low, first


@dataclass(eq=False)
class Budget:
    """The account of one run. shares: of its clients, by id; conditions: under which sums come out the same."""

    folder: Path
    terms: Terms
    shares: Mapping[str, Share]
    conditions: Sequence[str]
    paid: set[str] = field(default_factory=set)  # marks of the phases that were paid for

    @cached_property
    def key(self) -> bytes:
        """The secret of this run."""
        return key_of(self.folder)

    @cached_property
    def spent(self) -> dict[str, Counter[Release]]:
        """What each client has paid for, from disk."""
        spent: dict[str, Counter[Release]] = {}
        for line in read_payments(self.folder):
            self.paid.add(line["mark"])
            _book(spent, line)
        return spent

    def refuses(self, clients: Sequence[str]) -> str | None:
        """Say why these clients cannot pay for another round; None = they can."""
        after = max_epsilon((self._after(client) for client in clients), self.terms.delta)
        if after <= self.terms.epsilon:
            return None
        return (
            f"privacy: another round would take a client's epsilon to {after:.3g} at delta = {self.terms.delta:g}, "
            f"above the budget of {self.terms.epsilon:g}"
        )

    def _after(self, client: str) -> Spent:
        spent = Counter(self.spent.get(client, {}))
        spent[self._release(client)] += self.shares[client].steps
        return spent

    def _release(self, client: str) -> Release:
        return self.terms.release(self.shares[client])

    def pay(
        self, clients: Sequence[str], *, round_number: int, start: Iterable[Tensor]
    ) -> tuple[PrivateSteps, list[list[np.ndarray]]]:
        """Pay for one local phase of these clients; return its private steps, and the sample of each step.

        start: all that the phase begins from. Raises MethodError if it is beyond the budget.
        """
        mark = self._mark(clients, round_number, start)
        spent = self.spent
        if mark not in self.paid:
            if reason := self.refuses(clients):
                raise MethodError(reason)
            each = {client: [self._release(client).rate, self.shares[client].steps] for client in clients}
            line = {
                "round": round_number,
                "mark": mark,
                "gradients": self.terms.gradients,
                "noise_multiplier": self.terms.noise_multiplier,
                "clients": each,
            }
            append_lines(self.folder / FILE, [json.dumps(line)])
            self.paid.add(mark)
            _book(spent, line)
        shares = [self.shares[client] for client in clients]
        plans = [
            [
                poisson_sample(share.examples, share.rate, key=self.key, purpose=f"sample/{mark}/{client}/{step}")
                for step in range(share.steps)
            ]
            for client, share in zip(clients, shares, strict=True)
        ]
        expected = {client: share.per_step for client, share in zip(clients, shares, strict=True)}
        terms = self.terms
        return PrivateSteps(terms.clip, terms.noise_multiplier, terms.gradients, expected, self.key, mark), plans

    def _mark(self, clients: Sequence[str], round_number: int, start: Iterable[Tensor]) -> str:
        """Name a phase by all that decides it; without the key nobody can tell what it began from."""
        digest = hashlib.blake2b(key=self.key, digest_size=16)
        digest.update(json.dumps([round_number, [*clients], [*self.conditions]]).encode())
        for value in start:
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def key_of(folder: Path) -> bytes:
    """Return the secret of a run, drawn by the operating system and on disk before it is used.

    Raises StoreError if it is damaged.
    """
    path = folder / KEY_FILE
    if not path.exists():
        write_atomic(path, secrets.token_bytes(KEY_BYTES))
    with os.fdopen(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:
        key = file.read()
    if len(key) != KEY_BYTES:
        raise StoreError(
            f"'{path}' has {len(key)} bytes, a key has {KEY_BYTES}: remove it, and the run goes on with a new one"
        )
    return key


def _book(spent: dict[str, Counter[Release]], line: Mapping[str, Any]) -> None:
    for client, (rate, steps) in line["clients"].items():
        release = Release(rate, line["gradients"], line["noise_multiplier"])
        spent.setdefault(client, Counter())[release] += steps


def read_payments(folder: Path) -> list[dict[str, Any]]:
    """Read privacy.jsonl; [] if nothing was paid.

    A half-written last line (a crash) paid for nothing, and is removed. Raises StoreError if another one is damaged.
    """
    return read_lines(folder / FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read an account; raises as read_payments does."""
    if not path.exists():
        return []
    text = path.read_bytes()
    *lines, rest = text.split(b"\n")
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise StoreError(
            f"'{path}' is damaged: {error}; what was released can no longer be counted: restore it from a copy, or "
            "begin a new study"
        ) from None
    if rest:
        write_atomic(path, text[: len(text) - len(rest)])
    return found


def read_spent(folder: Path) -> dict[str, Counter[Release]]:
    """Return what each client of a run has paid for."""
    spent: dict[str, Counter[Release]] = {}
    for line in read_payments(folder):
        _book(spent, line)
    return spent
