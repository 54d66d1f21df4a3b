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
from fedmira.engine.rates import CONSTANT, Schedule, by_client
from fedmira.errors import MethodError
from fedmira.evaluation.measure import measure_examples, measure_loss
from fedmira.methods.base import Clock, Tools
from fedmira.methods.wrappers import from_streams
from fedmira.model.base.load import Base
from fedmira.model.packed.lora import Dropout
from fedmira.model.passes import count_labelled, gradients, losses
from fedmira.privacy.steps import PrivateSteps
from fedmira.privacy.uploads import Hidden, UploadNoise

Moments = dict[str, dict[str, Tensor]]  # whose ("main", or a second trained row) -> name -> [S, ...]


@dataclass(frozen=True, eq=False)
class Training:
    """How clients train; plain values from the config.

    batch_size: examples in one pass. accumulation: passes whose gradients make one optimizer step. recompute: blocks in
    backward; None: as the workplace has measured. at_once: examples of a client that fit in a pass, None = a batch.
    private: how the gradients of this phase are made private; None = they are not. noise: of what clients send, for
    methods that ask for it.
    """

    optimizer: Optimizer
    learning_rate: float
    batch_size: int
    local_steps: int | None
    local_epochs: int | None
    max_grad_norm: float | None
    keep_optimizer: bool
    dropout: float
    seed: int
    accumulation: int = 1
    schedule: Schedule = CONSTANT
    recompute: bool | None = None
    at_once: int | None = None
    private: PrivateSteps | None = None
    noise: UploadNoise = field(default_factory=UploadNoise)

    @property
    def examples_per_pass(self) -> int:
        return self.batch_size if self.at_once is None else min(self.at_once, self.batch_size)

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.accumulation


@dataclass(eq=False)
class Toolbox:
    """Makes the Tools of clients that share a pass. rows [S, P]: theirs, for the shape of buffers and moments.

    trained: columns bool [P]. moments: of the optimizer, changed in place and added to. losses [S]: sums over steps.
    reports: may clients' losses leave them? scored: tokens of validation that clients asked a loss of, in all.
    """

    base: Base
    clients: Sequence[ClientData]
    training: Training
    clock: Clock
    rows: Tensor
    trained: Tensor
    moments: Moments = field(default_factory=dict)
    reports: bool = True
    scored: int = 0
    hidden: list[Hidden] = field(default_factory=list)  # by the noise on what is sent

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
    def part_of_gradient(self) -> Tensor:
        """The gradient of one pass, before it is added to those of the same step; needed where several are."""
        return torch.zeros_like(self.rows)

    @functools.cached_property
    def partly(self) -> bool:
        """Are there columns that are not trained?"""
        return not bool(self.trained.all())

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        return on_columns(self.training.optimizer, self.trained) if self.partly else self.training.optimizer

    def tools(
        self, step: int, moments: Sequence[int], batches: Sequence[Batch] = (), *, steps: Tensor | None = None
    ) -> Tools:
        """Return the tools of the first clients, for one step.

        moments: of each one's stream; batches: what its gradient is taken on, one pass each; steps [S]: of each client
        in this round. From step = the largest of `steps` on, the learning rate is the mean over a client's steps.
        """
        steps = None if steps is None else steps[: len(moments)]
        clock = replace(self.clock, step=step, steps=steps)
        if steps is not None and not self.training.schedule.is_constant:
            clock = replace(clock, learning_rate=self._rate(step, steps.tolist()))
        call = _Call(self, clock, moments, batches)
        reports, noise = self.reports, call.noise
        return Tools(clock, call.grad, call.update, call.rng, call.curvature, call.loss, call.each, reports, noise)

    def _rate(self, step: int, steps: Sequence[int]) -> float | Tensor:
        """Return the learning rate of a step, of all clients or [S, 1]."""
        schedule, peak, number = self.training.schedule, self.training.learning_rate, self.clock.round
        if step >= max(steps):
            rates = [schedule.mean(peak, round_number=number, steps=count) for count in steps]
        else:
            rates = [schedule.at(peak, round_number=number, step=step, steps=count) for count in steps]
        return by_client(rates, self.rows.device)


@dataclass(eq=False)
class _Call:
    """One moment of a phase, by client: 0 = begin, 1 + step, or 1 + own steps = finish; streams depend on it alone."""

    box: Toolbox
    clock: Clock
    moments: Sequence[int]
    batches: Sequence[Batch]
    counted: bool = False  # is this step's loss known?
    released: int = 0  # private gradients of this step

    def rng(self, name: str) -> Sequence[np.random.Generator]:
        seed, number, salt = self.box.training.seed, self.box.clock.round, client_key(name)
        keys = [client_key(client.id) for client in self.box.clients[: len(self.moments)]]
        return [
            np.random.default_rng([seed, number, key, moment, salt])
            for key, moment in zip(keys, self.moments, strict=True)
        ]

    def noise(self, updates: Tensor, deviations: Tensor, streams: Sequence[np.random.Generator] | None) -> Tensor:
        if streams is not None:
            self.box.hidden.append(Hidden.of(updates, deviations))
            return from_streams(updates, deviations, streams)
        clients = [client.id for client in self.box.clients[: len(self.moments)]]
        numbers, marks = self.box.training.noise.draw(updates, clients=clients, round_number=self.box.clock.round)
        self.box.hidden.append(Hidden.of(updates, deviations, marks))
        return numbers * deviations

    def dropout(self, part: int) -> Dropout | None:
        """The masks of one pass of the step."""
        rate, name = self.box.training.dropout, f"dropout/{part}" if part else "dropout"
        return Dropout(rate, [int(stream.integers(2**40)) for stream in self.rng(name)]) if rate else None

    def grad(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        into = self.box.gradient[: len(self.moments)]
        if self.box.training.private is not None:
            values = self._release(self.box.training.private, adapters, into)
        else:
            values, _ = self._accumulate(adapters, into)
        if not self.counted:  # a method may ask again at other points; the loss of a step is the one it began with
            self.box.losses[: len(values)] += values
        self.counted = True
        return values, self._of_trained(into)

    def _release(self, private: PrivateSteps, adapters: Adapters, into: Tensor) -> Tensor:
        """Write private gradients to `into`; return nan as losses [S], which are not private and stay unknown."""
        box = self.box
        private.gradient(
            box.base,
            adapters,
            self._batches(),
            clients=[client.id for client in box.clients[: len(self.moments)]],
            into=into,
            trained=box.trained,
            step=self.clock.step,
            number=self.released,
            dropout=box.training.dropout,
            recompute=bool(box.training.recompute),
        )
        self.released += 1
        return torch.full((len(into),), float("nan"), device=into.device)

    def _check_public(self, what: str) -> None:
        if self.box.training.private is not None:
            raise MethodError(
                f"the method asks for {what}, which privacy cannot give: gradients alone are made private"
            )

    def curvature(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        self._check_public("curvature on training examples")
        into = self.box.second_gradient[: len(self.moments)]
        _, tokens = self._accumulate(adapters, into, streams=self.rng("curvature"))
        return tokens, self._of_trained(into)

    def _accumulate(
        self, adapters: Adapters, into: Tensor, *, streams: Sequence[np.random.Generator] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `gradients` of all examples of the step, whose passes follow one another; so do draws from `streams`.

        The loss is the mean over the labelled tokens of the whole step, not a mean of the passes' means.
        Source: transformers' Trainer (num_items_in_batch).
        """
        base, batches, recompute = self.box.base, self._batches(), bool(self.box.training.recompute)
        if len(batches) == 1:
            return gradients(
                base, adapters, batches[0], into=into, dropout=self.dropout(0), streams=streams, recompute=recompute
            )
        each = [count_labelled(batch, adapters.layout.virtual_tokens) for batch in batches]
        tokens = torch.stack(each).sum(dim=0).to(base.device)
        part = self.box.part_of_gradient[: len(self.moments)]
        sums = torch.zeros(len(self.moments), dtype=torch.float64, device=base.device)
        for index, batch in enumerate(batches):
            values, _ = gradients(
                base,
                adapters,
                batch,
                into=part if index else into,
                dropout=self.dropout(index),
                streams=streams,
                tokens=tokens,
                recompute=recompute,
            )
            sums += values
            if index:
                into.add_(part)
        return sums.to(values.dtype), tokens

    def update(self, adapters: Adapters, gradient: Tensor, *, of: str = "main", who: Tensor | None = None) -> Adapters:
        box = self.box
        if box.training.max_grad_norm is not None:
            clip_(gradient, box.training.max_grad_norm)
        if of not in box.moments:
            box.moments[of] = box.optimizer.start(box.rows)
        moments = {name: value[: len(adapters)] for name, value in box.moments[of].items()}
        rest = [] if who is None else (~who).nonzero().flatten().tolist()
        kept = [(value, value[rest]) for value in (adapters.rows, *moments.values()) if rest]
        if len(rest) < len(adapters):
            box.optimizer.update(adapters.rows, gradient, moments, self.clock.learning_rate)
        for value, before in kept:
            value[rest] = before
        return adapters.mask_()

    def loss(self, adapters: Adapters, *, on: Literal["validation", "batch"] = "validation") -> Tensor:
        if on == "batch":
            self._check_public("losses on training examples")
            passes = [losses(self.box.base, adapters, batch) for batch in self._batches()]
            sums, counts = (torch.stack(values).sum(dim=0) for values in zip(*passes, strict=True))
            return sums.double() / counts
        clients = self._scored()
        everyone = range(len(clients))
        values = measure_loss(
            self.box.base, adapters.take, clients, everyone, split="validation", cohort=max(1, len(clients))
        )
        return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)

    def each(self, adapters: Adapters) -> tuple[Tensor, Tensor]:
        return measure_examples(self.box.base, adapters, self._scored(), split="validation")

    def _scored(self) -> Sequence[ClientData]:
        """The clients of this moment, whose validation is scored and counted."""
        clients = self.box.clients[: len(self.moments)]
        self.box.scored += sum(len(example.ids) for client in clients for example in client.validation)
        return clients

    def _batches(self) -> Sequence[Batch]:
        assert self.batches, "begin, finish and use have no batch"
        return self.batches

    def _of_trained(self, gradient: Tensor) -> Tensor:
        """Zero, in place, the gradient of columns that are not trained."""
        return gradient.mul_(self.box.trained) if self.box.partly else gradient
