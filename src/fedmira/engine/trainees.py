"""Whose data a method's rounds train on: the sampled clients', all clients' in one place, or nobody's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.data.batches import local_batches
from fedmira.data.partition import client_key
from fedmira.engine.clients import Asked, Reply, Scores, Send, Tuned, nobody
from fedmira.engine.federation import Federation
from fedmira.engine.memory import Staged
from fedmira.engine.phase import plan_steps
from fedmira.engine.scoring import score_test_split
from fedmira.engine.simulated import Simulated
from fedmira.engine.tools import Training
from fedmira.engine.workplace import POOL, Workplace
from fedmira.errors import MethodError
from fedmira.methods.base import Method
from fedmira.privacy.budget import Budget
from fedmira.privacy.uploads import UploadNoise, Uploads


class Pool:
    """All clients' training data in one place, trained on by one who answers for all; everybody uses its row."""

    def __init__(
        self,
        workplace: Workplace,
        federation: Federation,
        method: Method,
        training: Training,
        *,
        scratch: Path | None = None,
    ) -> None:
        alone = federation.together(POOL, training.seed)
        self.workplace, self.federation = workplace, federation
        self.trainer = Simulated(workplace.pool, alone, method, training, scratch=scratch)
        self.scorer = Simulated(workplace, federation, method, training)
        self.sampled = torch.empty(0, dtype=torch.int64)

    def ask(self, sampled: Tensor) -> Asked:
        self.sampled = sampled
        return Asked(HOLDER, torch.zeros_like(sampled), pooled=True)

    def stops(self, sampled: Tensor) -> str | None:
        return None

    def train(self, ids: Tensor, send: Send) -> Reply:
        number, steps = send.clock.round, self.trainer.method.regime.pool_steps
        plan = plan_pool(self.workplace, self.sampled, self.trainer.training, round_number=number, steps=steps)
        reply = self.trainer.carry_out(ids, send, plans=[plan])
        name = self.federation.names[int(HOLDER)]
        return replace(reply, headers=tuple(replace(header, client=name) for header in reply.headers))

    def losses(self, ids: Tensor, send: Send) -> list[float | None]:
        return self.scorer.measure(ids, lambda some_ids: self.adapters(some_ids, send))

    def adapters(self, ids: Tensor, send: Send) -> Adapters:
        """Return the pool's row for each of the clients `ids`, at the largest ranks."""
        return self.trainer.adapters(HOLDER, send).take(torch.zeros_like(ids))

    def test(self, ids: Sequence[int], send: Send, progress: Callable[[int], None]) -> Scores:
        return score_test_split(self.workplace, lambda some_ids: self.adapters(some_ids, send), ids, progress)

    def tune(self, send: Send, progress: Callable[[int], None]) -> Tuned:
        raise NotImplementedError("clients of a pool do not fine-tune: a Method that says so is refused")

    def set_aside(self, ids: Tensor, send: Send) -> None:
        """Set the pool's row aside, which everybody uses."""
        if len(ids):
            self.trainer.set_aside(HOLDER, send)

    def take_up(self) -> None:
        self.trainer.take_up()

    def keep(self, ids: Tensor) -> Staged:
        return self.trainer.keep(ids)

    def restore(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.trainer.restore(files)


class Nobody(Simulated):
    """Clients that are scored and never asked to train."""

    def ask(self, sampled: Tensor) -> Asked:
        return nobody(sampled)

    def train(self, ids: Tensor, send: Send) -> Reply:
        none = torch.empty(0)
        return Reply(ids, send(ids), (), none, none.long(), [])


HOLDER = torch.zeros(1, dtype=torch.int64)  # client 0, in whose name the pool answers
KINDS: Mapping[str, type[Simulated] | type[Pool]] = {"sampled": Simulated, "pool": Pool, "nobody": Nobody}


def make_clients(
    workplace: Workplace,
    federation: Federation,
    method: Method,
    training: Training,
    *,
    scratch: Path | None = None,
    budget: Budget | None = None,
    key: bytes | None = None,
    uploads: Uploads | None = None,
) -> Simulated | Pool:
    """Return the clients that a method's rounds are carried out with, at its own learning rate if it has one.

    budget: of their examples' privacy. key: of the noise on what they send; None = one of this process. uploads: the
    account of what they have sent. Raises MethodError if a pool is to have a budget.
    """
    if method.regime.learning_rate is not None:
        training = replace(training, learning_rate=method.regime.learning_rate)
    if key is not None:
        training = replace(training, noise=UploadNoise(key))
    clients = KINDS[method.regime.trainees](workplace, federation, method, training, scratch=scratch)
    if isinstance(clients, Pool):
        if budget is not None:
            raise MethodError(
                f"method '{method.name}' trains on all data in one place, of which no client has a budget"
            )
        return clients
    clients.budget, clients.uploads = budget, uploads
    return clients


def plan_pool(
    workplace: Workplace, ids: Tensor, training: Training, *, round_number: int, steps: int | None = None
) -> list[np.ndarray]:
    """Return the pool's examples of each step in a round: as many steps, of as many examples, as those of `ids` take.

    Permutations of all examples, one after another from the pool's own stream, cut into batches of these sizes. steps:
    this number of full steps instead.
    """
    (pool,) = workplace.pool.clients
    count = len(pool.train)
    sizes = [min(training.examples_per_step, count)] * (steps or 0)
    if steps is None:
        sizes = [len(batch) for k in ids.tolist() for batch in plan_steps(workplace.clients[k], training, round_number)]
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
