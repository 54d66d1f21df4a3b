"""What a client half may use: gradients and losses of the client's data, its optimizer, its random streams."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmira.adapters import Adapters
from fedmira.adapters.optim import Optimizer, clip_, on_columns
from fedmira.data.batches import Batch, ClientData
from fedmira.data.partition import client_key
from fedmira.evaluation.measure import measure_loss
from fedmira.methods.base import Clock, Tools
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import gradients, losses

Moments = dict[str, dict[str, Tensor]]  # whose ("main", or a second trained row) -> name -> [S, ...]


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


@dataclass(eq=False)
class Toolbox:
    """Makes the Tools of clients that share a pass. rows [S, P]: theirs, for the shape of buffers and moments.

    trained: columns bool [P]. moments: of the optimizer, changed in place and added to. losses [S]: sums over steps.
    """

    base: Base
    clients: Sequence[ClientData]
    training: Training
    clock: Clock
    rows: Tensor
    trained: Tensor
    moments: Moments = field(default_factory=dict)

    @functools.cached_property
    def losses(self) -> Tensor:
        return torch.zeros(len(self.clients), dtype=torch.float64, device=self.rows.device)

    @functools.cached_property
    def gradient(self) -> Tensor:
        return torch.zeros_like(self.rows)

    @functools.cached_property
    def second_gradient(self) -> Tensor:
        """Few methods need curvature; the others do without the memory."""
        return torch.zeros_like(self.rows)

    @functools.cached_property
    def partly(self) -> bool:
        """Are there columns that are not trained?"""
        return not bool(self.trained.all())

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        return on_columns(self.training.optimizer, self.trained) if self.partly else self.training.optimizer

    def tools(self, step: int, moments: Sequence[int], batch: Batch | None, *, steps: Tensor | None = None) -> Tools:
        """Return the tools of the first clients. moments: of each one's stream; steps [S]: of each in this round."""
        call = _Call(self, moments, batch)
        clock = replace(self.clock, step=step, steps=None if steps is None else steps[: len(moments)])
        return Tools(clock, call.grad, call.update, call.rng, call.curvature, call.loss)


@dataclass(eq=False)
class _Call:
    """One moment of a phase, by client: 0 = begin, 1 + step, or 1 + own steps = finish; streams depend on it alone."""

    box: Toolbox
    moments: Sequence[int]
    batch: Batch | None
    counted: bool = False  # is this step's loss known?

    def rng(self, name: str) -> Sequence[np.random.Generator]:
        seed, number, salt = self.box.training.seed, self.box.clock.round, client_key(name)
        keys = [client_key(client.id) for client in self.box.clients[: len(self.moments)]]
        return [
            np.random.default_rng([seed, number, key, moment, salt])
            for key, moment in zip(keys, self.moments, strict=True)
        ]

    def dropout(self) -> Dropout | None:
        rate = self.box.training.dropout
        return Dropout(rate, [int(stream.integers(2**40)) for stream in self.rng("dropout")]) if rate else None

    def grad(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        into = self.box.gradient[: len(self.moments)]
        values, _ = gradients(self.box.base, adapters, self._batch(), into=into, dropout=self.dropout())
        if not self.counted:  # a method may ask again at other points; the loss of a step is the one it began with
            self.box.losses[: len(values)] += values
        self.counted = True
        return values, self._of_trained(into)

    def curvature(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        into, streams = self.box.second_gradient[: len(self.moments)], self.rng("curvature")
        _, tokens = gradients(
            self.box.base, adapters, self._batch(), into=into, dropout=self.dropout(), streams=streams
        )
        return tokens, self._of_trained(into)

    def update(self, adapters: Adapters, gradient: Tensor, *, of: str = "main") -> Adapters:
        box = self.box
        if box.training.max_grad_norm is not None:
            clip_(gradient, box.training.max_grad_norm)
        if of not in box.moments:
            box.moments[of] = box.optimizer.start(box.rows)
        moments = {name: value[: len(adapters)] for name, value in box.moments[of].items()}
        box.optimizer.update(adapters.rows, gradient, moments, box.clock.learning_rate)
        return adapters.mask_()

    def loss(self, adapters: Adapters, *, on: Literal["validation", "batch"] = "validation") -> Tensor:
        if on == "batch":
            sums, counts = losses(self.box.base, adapters, self._batch())
            return sums.double() / counts
        clients = self.box.clients[: len(self.moments)]
        everyone = range(len(clients))
        values = measure_loss(
            self.box.base, adapters.take, clients, everyone, split="validation", cohort=max(1, len(clients))
        )
        return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)

    def _batch(self) -> Batch:
        assert self.batch is not None, "begin, finish and use have no batch"
        return self.batch

    def _of_trained(self, gradient: Tensor) -> Tensor:
        """Zero, in place, the gradient of columns that are not trained."""
        return gradient.mul_(self.box.trained) if self.box.partly else gradient
