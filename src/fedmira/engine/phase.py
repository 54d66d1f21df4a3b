"""The local phase of a cohort: all sampled clients take their local steps together, in one pass per step.

Clients are ordered by their number of steps, so that those still at work are a prefix: a client that has finished keeps
its row and its moments untouched, because it is no longer in any batch.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.optim import Optimizer, clip_
from fedmira.data.batches import Batch, ClientData, collate, local_batches
from fedmira.data.partition import client_key
from fedmira.methods.base import Clock, Memory, Message, Method, Tools
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import gradients


@dataclass(frozen=True, eq=False)
class Training:
    """How clients train; plain values from the config."""

    optimizer: Optimizer
    learning_rate: float
    batch_size: int
    local_steps: int | None
    local_epochs: int | None
    max_grad_norm: float | None
    keep_optimizer: bool
    dropout: float
    seed: int


@dataclass(frozen=True, eq=False)
class PhaseResult:
    """What a phase gives, in the order of the clients it was given. losses [S]: mean over each client's own steps."""

    returned: Message
    memory: Memory
    losses: Tensor
    steps: Tensor
    tokens: int


def plan_steps(client: ClientData, training: Training, round_number: int) -> list[np.ndarray]:
    """Return the training examples of each local step of one client in one round, from its own stream."""
    return local_batches(
        len(client.train),
        seed=training.seed,
        round=round_number,
        key=client_key(client.id),
        batch_size=training.batch_size,
        steps=training.local_steps,
        epochs=training.local_epochs,
    )


def local_phase(
    base: Base,
    method: Method,
    clients: Sequence[ClientData],
    start: Adapters,
    given: Message,
    memory: Memory,
    *,
    training: Training,
    clock: Clock,
    cohort: int,
    plans: Sequence[Sequence[np.ndarray]] | None = None,
) -> PhaseResult:
    """Train `clients` from what the server sent, at most `cohort` of them in one pass.

    start: an Adapters whose rows are overwritten by `given` (ranks and scales of these clients). given and memory are
    read only. plans: the training examples of each step of each client; None: as plan_steps draws them.
    Raises ShapeError if rows and clients disagree.
    """
    if plans is None:
        plans = [plan_steps(client, training, clock.round) for client in clients]
    order = sorted(range(len(clients)), key=lambda position: -len(plans[position]))
    pieces: list[tuple[list[int], PhaseResult]] = []
    for first in range(0, len(order), cohort):
        chosen = order[first : first + cohort]
        index = torch.tensor(chosen)
        pieces.append(
            (
                chosen,
                _train_together(
                    base,
                    method,
                    [clients[position] for position in chosen],
                    [plans[position] for position in chosen],
                    start.take(index),
                    _pick(given, index),
                    {name: value[index] for name, value in memory.items()},
                    training=training,
                    clock=clock,
                ),
            )
        )
    back = torch.argsort(torch.tensor(order))
    return PhaseResult(
        returned=Message(
            torch.cat([piece.returned.rows for _, piece in pieces])[back],
            {
                name: torch.cat([piece.returned.scalars[name] for _, piece in pieces])[back]
                for name in pieces[0][1].returned.scalars
            },
        ),
        memory={name: torch.cat([piece.memory[name] for _, piece in pieces])[back] for name in pieces[0][1].memory},
        losses=torch.cat([piece.losses for _, piece in pieces])[back],
        steps=torch.cat([piece.steps for _, piece in pieces])[back],
        tokens=sum(piece.tokens for _, piece in pieces),
    )


def _train_together(
    base: Base,
    method: Method,
    clients: Sequence[ClientData],
    plans: Sequence[Sequence[np.ndarray]],
    adapters: Adapters,
    given: Message,
    memory: Memory,
    *,
    training: Training,
    clock: Clock,
) -> PhaseResult:
    """One pass per step for clients in descending order of their number of steps."""
    adapters = adapters.with_rows(given.rows.to(base.device, copy=True)).mask_()
    given = Message(given.rows.to(base.device), {name: value.to(base.device) for name, value in given.scalars.items()})
    memory = {name: value.to(base.device) for name, value in memory.items()}
    steps = torch.tensor([len(plan) for plan in plans])
    sums = torch.zeros(len(clients), dtype=torch.float64, device=base.device)  # read at the end: a step never waits
    gradient = torch.zeros_like(adapters.rows)
    clock = replace(clock, learning_rate=training.learning_rate)
    trained = 0
    last = int(steps.max())
    for name, value in training.optimizer.start(adapters.rows).items():
        memory.setdefault(name, value)

    @functools.cache
    def second_gradient() -> Tensor:
        """Few methods ask for curvature; the others do without the memory."""
        return torch.zeros_like(gradient)

    def tools(step: int, moments: Sequence[int], batch: Batch | None) -> Tools:
        """moments: 0 = begin, 1 + step, or 1 + own steps = finish; for each client, so that streams are its own."""
        count = len(moments)
        keys = [client_key(client.id) for client in clients[:count]]
        first_call = True

        def rng(name: str) -> Sequence[np.random.Generator]:
            salt = client_key(name)
            return [
                np.random.default_rng([training.seed, clock.round, key, moment, salt])
                for key, moment in zip(keys, moments, strict=True)
            ]

        def dropout() -> Dropout | None:
            if not training.dropout:
                return None
            return Dropout(training.dropout, [int(stream.integers(2**40)) for stream in rng("dropout")])

        def grad(current: Adapters) -> tuple[Tensor, Tensor]:
            assert batch is not None, "begin and finish have no batch"
            losses, _ = gradients(base, current, batch, into=gradient[:count], dropout=dropout())
            nonlocal first_call
            if first_call:  # a method may ask again at other points; the loss of a step is the one it began with
                sums[:count] += losses
            first_call = False
            return losses, gradient[:count]

        def curvature(current: Adapters) -> tuple[Tensor, Tensor]:
            assert batch is not None, "begin and finish have no batch"
            into = second_gradient()[:count]
            _, tokens = gradients(base, current, batch, into=into, dropout=dropout(), streams=rng("curvature"))
            return tokens, into

        def update(current: Adapters, push: Tensor, held: Memory) -> tuple[Adapters, Memory]:
            if training.max_grad_norm is not None:
                clip_(push, training.max_grad_norm)
            own = {name: held[name] for name in training.optimizer.keys}
            training.optimizer.update(current.rows, push, own, clock.learning_rate)
            return current.mask_(), held

        return Tools(
            clock=replace(clock, step=step, steps=steps[:count]), grad=grad, update=update, rng=rng, curvature=curvature
        )

    everyone = len(clients)
    adapters, memory = method.begin(adapters, memory, given, tools(0, [0] * everyone, None))
    for step in range(last):
        count = int((steps > step).sum())
        examples = [
            [client.train[i] for i in plan[step]] for client, plan in zip(clients[:count], plans[:count], strict=True)
        ]
        batch = collate(examples, pad_id=base.pad_id)
        trained += int(batch.lengths.sum())
        view = adapters.head(count)
        held = {name: value[:count] for name, value in memory.items()}
        after, kept = method.step(view, held, _pick(given, slice(count)), tools(step, [1 + step] * count, batch))
        _write_back(view.rows, after.rows)
        for name, value in kept.items():
            _write_back(held[name], value)
    message, memory = method.finish(adapters, memory, given, tools(last, (1 + steps).tolist(), None))
    return PhaseResult(
        returned=Message(message.rows.cpu(), {name: value.cpu() for name, value in message.scalars.items()}),
        memory={name: value.cpu() for name, value in memory.items()},
        losses=sums.cpu() / steps,
        steps=steps,
        tokens=trained,
    )


def _write_back(place: Tensor, value: Tensor) -> None:
    """Keep what a step returned; a step that worked in place returns the place itself."""
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)


def _pick(message: Message, index: Tensor | slice) -> Message:
    scalars: Mapping[str, Tensor] = {name: value[index] for name, value in message.scalars.items()}
    return Message(message.rows[index], scalars)
